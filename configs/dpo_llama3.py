"""DPO of Llama-3-8B-Instruct on UltraFeedback, for a TPU pod or a node of GPUs. Start it on every host alike.

    export HF_TOKEN=...  # the model is gated: accept its licence on its page first
    python -m jaxalign.train --config=configs/dpo_llama3.py --config.workdir=/shared/dpo_llama3

Hyper-parameters: batch 128, one epoch, AdamW, cosine with 10% warm-up, as zephyr-7b-dpo-full and SimPO's DPO baselines;
beta 0.01 and learning rate 7e-7 are SimPO's best for DPO on Llama-3-Instruct. Published for that baseline: AlpacaEval 2
length-controlled win rate 26.0 before, 40.3 after, on pairs that they made from UltraFeedback's prompts with the model
itself; these here are UltraFeedback's own pairs.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/dpo_llama3.py
--topology=v5e:4x4 --model_config=configs/shapes/llama3_8b.json`): 14.3 of 16.9 GB of each chip of v5e:4x4, 27.8 of
102.8 GB of v5p:2x2x2. There gradient_accumulation_steps=4 takes 31.4 GB and gathers the weights half as often.

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
    config.gradient_accumulation_steps = 8
    config.max_length = 2048

    config.model.path = arg or "meta-llama/Meta-Llama-3-8B-Instruct"
    config.model.remat = "full"
    config.data.path = "HuggingFaceH4/ultrafeedback_binarized"
    config.data.split = "train_prefs"
    config.data.eval.split = "test_prefs"

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "sigmoid"
    config.loss.beta = 0.01
    config.optim.learning_rate = 7e-7
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 100
    config.checkpoint.every = 100
    config.checkpoint.every_minutes = 30.0
    config.checkpoint.keep_best = 1
    config.checkpoint.best_metric = "eval_rewards/accuracies"
    config.checkpoint.best_mode = "max"
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    config.export.step = "best"
    return config
