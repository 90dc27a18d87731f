"""GRPO of Qwen2.5-0.5B-Instruct on GSM8K, after the one published curve of a single small machine. Not for a laptop.

    pip install -e ".[tpu,math]"  # or [cuda,math]
    python -m jaxalign.train --config=configs/grpo_gsm8k_qwen2p5_0p5b.py --config.workdir=gs://BUCKET/grpo_gsm8k_0p5b

Hyper-parameters: those of slime's run on one GB10: 100 rollouts of 20 questions x 8 completions, one update each,
learning rate 1e-6 constant, clipping from 0.8 to 1.28, no KL term; a reward of 1 where what stands in \\boxed{} equals
the answer as mathematics. How long completions may be is not published: 1,024 tokens here. Published: greedy test
accuracy from 43.59% (575 of 1,319) to 50.19% (662), answers without a box from 2.5% to 0.2%, completions 15% shorter.
Measure both ends by `python -m jaxalign.evaluate --task=openai/gsm8k --name=main --split=test
--format=configs/grpo_gsm8k_qwen2p5_0p5b.py:ask --reward=math --max_new_tokens=1024 --model=MODEL`.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/grpo_gsm8k_qwen2p5_0p5b.py
--topology=v5e:2x2 --model_config=configs/shapes/qwen2p5_0p5b.json`): 4.4 of 16.9 GB of each chip of v5e:2x2; 4.3 of
102.8 GB on v5p:2x2x1. The sampler's programs need 2.7 GB on v5e:2x2.

Expected time: not run. Expected numbers: not run.
"""

from typing import Any

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def ask(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K as a prompt, in the words of Qwen's own evaluation."""
    asked = f"{row['question']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    return {"prompt": [{"role": "user", "content": asked}], "answer": row["answer"]}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id or a folder."""
    config = jaxalign_config.base()
    config.steps = 100
    config.batch_size = 160
    config.gradient_accumulation_steps = 4
    config.max_length = 1536

    config.model.path = arg or "Qwen/Qwen2.5-0.5B-Instruct"
    config.model.remat = "full"
    config.data.path = "openai/gsm8k"
    config.data.name = "main"
    config.data.format = "grpo_gsm8k_qwen2p5_0p5b.ask"
    config.data.eval.split = "test"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "grpo"
    config.loss.epsilon_high = 0.28
    config.optim.learning_rate = 1e-6
    config.optim.schedule = "constant"

    config.rollout.num_generations = 8
    config.rollout.max_completion_length = 1024
    config.rewards.functions = ("math",)
    config.rewards.workers = 4

    config.eval.every = 20
    config.eval.max_rows = 256
    config.eval.temperature = 0.0
    config.checkpoint.every = 20
    return config
