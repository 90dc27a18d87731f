"""zephyr-7b-dpo-qlora: the same as configs/dpo_zephyr.py with adapters on 4-bit weights.

    python -m jaxalign.train --config=configs/dpo_qlora_zephyr.py --config.workdir=gs://BUCKET/dpo_qlora_zephyr

Hyper-parameters: the recipe zephyr-7b-beta of huggingface/alignment-handbook: rank and alpha 128, dropout 0.05, all
seven projections, learning rate 5e-6, else as for full weights. A GPU there takes 4 x 4 pairs: this is the batch of
eight. It begins with the merged weights of the SFT model; the handbook's begins with an adapter of its own, and reruns
that mixed up base and adapter scored 1.88, 4.4 and 4.6 of MT-Bench's 10: here a wrong base is refused.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/dpo_qlora_zephyr.py
--topology=v5e:2x2 --model_config=configs/shapes/mistral_7b.json`): 9.3 of 16.9 GB of each chip of v5e:2x2.

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
    config.gradient_accumulation_steps = 16
    config.max_length = 1024

    config.model.path = arg or "alignment-handbook/zephyr-7b-sft-full"
    config.model.remat = "full"
    config.model.quantize = "nf4"
    config.lora.rank = 128
    config.lora.alpha = 128.0
    config.lora.dropout = 0.05
    config.data.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.split = "train_prefs"
    config.data.eval.split = "test_prefs"
    config.data.max_prompt_length = 512

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "sigmoid"
    config.loss.beta = 0.01
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 100
    config.checkpoint.every = 100
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
