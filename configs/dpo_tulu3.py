"""Llama-3.1-Tulu-3-8B-DPO: length-normalised DPO on Tulu 3's preferences. Start it on every host alike.

    python -m jaxalign.train --config=configs/dpo_tulu3.py --config.workdir=gs://BUCKET/dpo_tulu3

Hyper-parameters: those published for it (docs/tulu3.md of allenai/open-instruct): beta 5 on mean log-probs, learning
rate 5e-7, linear with 10% warm-up, no weight decay, batch 128, 2,048 tokens, one epoch, seed 8. NeMo-RL's test of the
same recipe expects a first loss of 0.6931 and one below 0.68 at step 150. Not published: how gradients are clipped, and
an evaluation set (here: 0.3% of the pairs are held out). Its accumulation and its mesh are ours.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/dpo_tulu3.py
--topology=v5p:2x2x2 --model_config=configs/shapes/tulu3_8b.json`): 27.8 of 102.8 GB of each chip of v5p:2x2x2.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id, a folder, or gs://BUCKET/FOLDER."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 8
    config.batch_size = 128
    config.gradient_accumulation_steps = 8
    config.max_length = 2048

    config.model.path = arg or "allenai/Llama-3.1-Tulu-3-8B-SFT"
    config.model.remat = "full"
    config.data.path = "allenai/llama-3.1-tulu-3-8b-preference-mixture"
    config.data.eval.fraction = 0.003

    # Tulu's vocabulary of 128,264 divides by 8 and no further.
    config.mesh.data = -1
    config.mesh.fsdp = 8

    config.loss.name = "sigmoid_norm"
    config.loss.beta = 5.0
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "linear"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 200
    config.checkpoint.every = 200
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
