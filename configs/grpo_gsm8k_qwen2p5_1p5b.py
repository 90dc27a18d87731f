"""GRPO of Qwen2.5-1.5B-Instruct on GSM8K, after SkyRL's continuous test. Not for a laptop.

    python -m jaxalign.train --config=configs/grpo_gsm8k_qwen2p5_1p5b.py --config.workdir=gs://BUCKET/grpo_gsm8k_1p5b

Hyper-parameters: rollouts of 1,024 questions x 5 completions, four updates each (256 questions), learning rate 1e-6, a
KL term of 0.001, prompts of at most 512 tokens, completions of at most 1,024, one epoch (7 rollouts); a reward of 1
where the last "#### number" is the answer. Published there, as bounds over ten runs: test and train accuracy of at
least 0.69 after that epoch, completions of at most 232 tokens in the mean, sampled and trained log-probs at most 0.0104
apart.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/grpo_gsm8k_qwen2p5_1p5b.py
--topology=v5e:4x4 --model_config=configs/shapes/qwen2p5_1p5b.json`): 5.1 of 16.9 GB of each chip of v5e:4x4; 9.5 of
102.8 GB on v5p:2x2x2.

Expected time: not run. Expected numbers: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K as a prompt, in the words of verl's and SkyRL's."""
    asked = f'{row["question"]} Let\'s think step by step and output the final answer after "####".'
    return {"prompt": [{"role": "user", "content": asked}], "answer": row["answer"]}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id or a folder."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.batch_size = 1280
    config.gradient_accumulation_steps = 10
    config.max_length = 1536

    config.model.path = arg or "Qwen/Qwen2.5-1.5B-Instruct"
    config.model.remat = "full"
    config.data.path = "openai/gsm8k"
    config.data.name = "main"
    config.data.format = "grpo_gsm8k_qwen2p5_1p5b.ask"
    config.data.eval.split = "test"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "grpo"
    config.loss.beta = 0.001
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 5
    config.rollout.steps_per_generation = 4
    config.rollout.max_completion_length = 1024
    config.rollout.slots = 512
    config.rewards.functions = ("gsm8k",)
    config.rewards.workers = 4

    config.eval.every = 4
    config.eval.temperature = 0.0
    config.checkpoint.every = 4
    return config
