"""zephyr-7b-sft-full: Mistral-7B learns UltraChat, Zephyr's first stage and the control of what begins with it.

    python -m jaxalign.train --config=configs/sft_zephyr.py --config.workdir=gs://BUCKET/sft_zephyr

Hyper-parameters: the recipe zephyr-7b-beta of huggingface/alignment-handbook (sft/config_full.yaml): learning rate
2e-5, cosine with 10% warm-up, one epoch, batch 128 (8 GPUs x 16), 2,048 tokens, seed 42, Zephyr's chat template. There
all tokens of a conversation are scored (TRL's default); set `data.train_on=assistant` for the answers alone. Published:
no figure of its own but the MT-Bench of what it begins (configs/dpo_zephyr.py).

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/sft_zephyr.py
--topology=v5e:4x4 --model_config=configs/shapes/mistral_7b.json`): 12.2 of 16.9 GB of each chip of v5e:4x4.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another base model: a hub id or a folder."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 42
    config.batch_size = 128
    config.gradient_accumulation_steps = 4
    config.max_length = 2048

    config.model.path = arg or "mistralai/Mistral-7B-v0.1"
    config.model.remat = "full"
    config.tokenizer.chat_template = ZEPHYR
    config.data.path = "HuggingFaceH4/ultrachat_200k"
    config.data.split = "train_sft"
    config.data.eval.split = "test_sft"
    config.data.train_on = "all"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "sft"
    config.optim.learning_rate = 2e-5
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 500
    config.eval.max_rows = 1000
    config.checkpoint.every = 100
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
