"""DPO of Llama-3.1-70B on Tulu 3's preferences, for 32 chips of TPU v5p or more. Start it on every host alike.

    python -m jaxalign.preflight --config=configs/dpo_llama3_70b.py --topology=v5p:2x4x4 \\
        --model_config=configs/shapes/tulu3_70b.json
    python -m jaxalign.train --config=configs/dpo_llama3_70b.py --config.workdir=gs://BUCKET/dpo_llama3_70b

Hyper-parameters: those of the command that made Llama-3.1-Tulu-3-70B-DPO, as published (docs/tulu3.md of
allenai/open-instruct): length-normalised DPO with beta 5, learning rate 2e-7, linear with 10% warm-up, no weight decay,
batch 128 (64 GPUs x 1 x 2), 2,048 tokens, one epoch, on the same model and pairs. Not published there: the seed, how
gradients are clipped, and an evaluation set (here: 0.3% of the pairs are held out). Its accumulation and its mesh are
ours: they change memory, not the result.

Memory by the TPU compiler (libtpu 0.0.42, the command above): 69.3 of 102.8 GB of each chip of v5p:2x4x4.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id, a folder, or gs://BUCKET/FOLDER."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 42
    config.batch_size = 128
    config.gradient_accumulation_steps = 8
    config.max_length = 2048

    config.model.path = arg or "allenai/Llama-3.1-Tulu-3-70B-SFT"
    config.model.remat = "full"
    config.data.path = "allenai/llama-3.1-tulu-3-70b-preference-mixture"
    config.data.eval.fraction = 0.003

    # Tulu's vocabulary of 128,264 divides by 8 and no further. More chips than 32 take more rows.
    config.mesh.data = -1
    config.mesh.fsdp = 8
    config.mesh.tensor = 4

    config.loss.name = "sigmoid_norm"
    config.loss.beta = 5.0
    config.optim.learning_rate = 2e-7
    config.optim.schedule = "linear"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 200
    config.checkpoint.every = 200
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
