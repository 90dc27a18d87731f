"""Mistral-ORPO-beta: Mistral-7B learns UltraFeedback's chosen answers and to prefer them, without SFT before.

    python -m jaxalign.train --config=configs/orpo_mistral.py --config.workdir=gs://BUCKET/orpo_mistral

Hyper-parameters: scripts/run_mistral_orpo_beta.sh of xfactlab/orpo (https://arxiv.org/abs/2403.07691): the odds ratio's
weight 0.1, learning rate 5e-6 with 200 warm-up steps, 5 epochs at most (the best by evaluation is kept), batch 32 (4
A100 x 8), 2,048 tokens, prompts of at most 1,792, Zephyr's chat template, Argilla's cleaned UltraFeedback. There the
learning rate then falls with 1 / sqrt(step), which no schedule here does: it falls in a line. Published for the
released model: AlpacaEval 2 length-controlled win rate 14.7 (as measured by SimPO's authors).

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/orpo_mistral.py
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
    config.epochs = 5.0
    config.seed = 42
    config.batch_size = 32
    config.gradient_accumulation_steps = 2
    config.max_length = 2048

    config.model.path = arg or "mistralai/Mistral-7B-v0.1"
    config.model.remat = "full"
    config.tokenizer.chat_template = ZEPHYR
    config.data.path = "argilla/ultrafeedback-binarized-preferences-cleaned"
    config.data.eval.fraction = 0.01
    config.data.max_prompt_length = 1792

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "orpo"
    config.loss.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "linear"
    config.optim.warmup_steps = 200

    config.eval.every = 500
    config.checkpoint.every = 500
    config.checkpoint.every_minutes = 30.0
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric = "eval_loss"
    config.checkpoint.best_mode = "min"
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    config.export.step = "best"
    return config
