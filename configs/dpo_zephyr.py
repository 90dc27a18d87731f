"""zephyr-7b-dpo-full: DPO of Mistral-7B after UltraChat (configs/sft_zephyr.py) on UltraFeedback.

    python -m jaxalign.train --config=configs/dpo_zephyr.py --config.workdir=gs://BUCKET/dpo_zephyr

Hyper-parameters: the recipe zephyr-7b-beta of huggingface/alignment-handbook (dpo/config_full.yaml): beta 0.01,
learning rate 5e-7, cosine with 10% warm-up, one epoch, batch 128 (8 GPUs x 8 x 2), 1,024 tokens, seed 42. Published for
it: MT-Bench 7.57 (7.81 and 7.32 in its two turns); a rerun on 4 GPUs gave 7.54 and 7.13 in them. Its handbook cuts
prompts to 512 tokens: here a prompt is never cut, so a longer one is left out. Its accumulation and its mesh are ours:
they change memory, not the result.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/dpo_zephyr.py
--topology=v5e:4x4 --model_config=configs/shapes/mistral_7b.json`): 13.1 of 16.9 GB of each chip of v5e:4x4.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id or a folder."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 42
    config.batch_size = 128
    config.gradient_accumulation_steps = 4
    config.max_length = 1024

    config.model.path = arg or "alignment-handbook/zephyr-7b-sft-full"
    config.model.remat = "full"
    config.data.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.split = "train_prefs"
    config.data.eval.split = "test_prefs"
    config.data.max_prompt_length = 512

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "sigmoid"
    config.loss.beta = 0.01
    config.optim.learning_rate = 5e-7
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 100
    config.checkpoint.every = 100
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
