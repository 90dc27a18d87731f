"""KTO of Llama-3-8B-Instruct with the defaults of its authors' HALOs. Start it on every host alike.

    export HF_TOKEN=...  # the model is gated: accept its licence on its page first
    python -m jaxalign.train --config=configs/kto_llama3.py --config.workdir=gs://BUCKET/kto_llama3

Hyper-parameters: ContextualAI/HALOs (https://arxiv.org/abs/2402.01306): beta 0.1, both weights 1, AdamW with learning
rate 5e-6, weight decay 0.01 and eps 1e-5, 10% warm-up and then a constant rate, one epoch, batch 32 of at most 1,024
tokens, of which the prompt has at most 512 (there a longer one is cut, here left out), gradients clipped at 5. The
pairs are those of its launch scripts (UltraFeedback answered by the model itself, judged by ArmoRM), each taken apart
into a desirable and an undesirable answer. Published for KTO on Llama-3-8B-Instruct by SimPO's authors, on the earlier
pairs judged by PairRM and with other settings: AlpacaEval 2 length-controlled win rate 33.1.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/kto_llama3.py
--topology=v5e:4x4 --model_config=configs/shapes/llama3_8b.json`): 12.7 of 16.9 GB of each chip of v5e:4x4.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is another model of the family: a hub id or a folder."""
    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 1
    config.batch_size = 32
    config.gradient_accumulation_steps = 2
    config.max_length = 1024

    config.model.path = arg or "meta-llama/Meta-Llama-3-8B-Instruct"
    config.model.remat = "full"
    config.data.path = "princeton-nlp/llama3-ultrafeedback-armorm"
    config.data.split = "train"
    config.data.eval.split = "test"
    config.data.max_prompt_length = 512

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "kto"
    config.loss.beta = 0.1
    config.optim.learning_rate = 5e-6
    config.optim.schedule = "constant"
    config.optim.warmup_ratio = 0.1
    config.optim.weight_decay = 0.01
    config.optim.eps = 1e-5
    config.optim.max_grad_norm = 5.0

    config.eval.every = 400
    config.checkpoint.every = 200
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
