"""SimPO in the settings of its paper's table, one of them by name: `configs/simpo.py:llama3-instruct-v0.2`.

    python -m jaxalign.train --config=configs/simpo.py:mistral-base --config.workdir=gs://BUCKET/simpo

Hyper-parameters: README.md and training_configs/ of princeton-nlp/SimPO (https://arxiv.org/abs/2405.14734): cosine with
10% warm-up, one epoch, batch 128, seed 42, and per setting beta, gamma / beta and the learning rate below. Rows have
2,048 tokens, prompts at most 1,800 (mistral-base: 1,024 and 512); here a prompt is never cut, so a longer one is left
out. The accumulation and the mesh are ours: they change memory, not the result. Published length-controlled win rates
of AlpacaEval 2, with the model that each began from and the paper's DPO:

    mistral-base            21.4    (SFT  8.4, DPO 15.1)
    mistral-instruct        32.1    (SFT 17.1, DPO 26.8)
    llama3-base             22.0    (SFT  6.2, DPO 18.2)
    llama3-instruct         44.7    (SFT 26.0, DPO 40.3)
    llama3-instruct-v0.2    53.7    (SFT 26.0, DPO 48.2)

The sixth setting, Gemma-2-9b-it, is left out: Gemma is no model that jaxalign knows. The authors warn that Llama 3's
present tokenizer puts a second BOS before a rendered chat in some evaluations, which moves the results.

Memory by the TPU compiler (libtpu 0.0.42; `python -m jaxalign.preflight --config=configs/simpo.py:SETTING
--topology=v5e:4x4 --model_config=configs/shapes/SHAPE.json`), of 16.9 GB of each chip of v5e:4x4: mistral-base (shape
mistral_7b) 12.2 GB, mistral-instruct (mistral_7b_v02) 12.2 GB, the others (llama3_8b) 13.2 GB.

Expected time: not run. Expected numbers: not run.
"""

from ml_collections import ConfigDict

from jaxalign import config as jaxalign_config

# setting: model, pairs, beta, gamma / beta, learning rate
SETTINGS = {
    "mistral-base": (
        "alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized", 2.0, 0.8, 3e-7,
    ),
    "mistral-instruct": (
        "mistralai/Mistral-7B-Instruct-v0.2", "princeton-nlp/mistral-instruct-ultrafeedback", 2.5, 0.1, 5e-7,
    ),
    "llama3-base": ("princeton-nlp/Llama-3-Base-8B-SFT", "HuggingFaceH4/ultrafeedback_binarized", 2.0, 0.5, 6e-7),
    "llama3-instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback", 2.5, 0.55, 1e-6,
    ),
    "llama3-instruct-v0.2": (
        "meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback-armorm", 10.0, 0.3, 1e-6,
    ),
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is the setting; llama3-instruct when None."""
    if arg is not None and arg not in SETTINGS:
        raise ValueError(f"no setting of SimPO is named {arg!r}; there are {', '.join(SETTINGS)}")
    model, pairs, beta, gamma_beta_ratio, learning_rate = SETTINGS[arg or "llama3-instruct"]
    is_short, is_binarized = arg == "mistral-base", pairs.startswith("HuggingFaceH4/")

    config = jaxalign_config.base()
    config.epochs = 1.0
    config.seed = 42
    config.batch_size = 128
    config.gradient_accumulation_steps = 4 if is_short else 8
    config.max_length = 1024 if is_short else 2048

    config.model.path = model
    config.model.remat = "full"
    config.data.path = pairs
    config.data.split = "train_prefs" if is_binarized else "train"
    config.data.eval.split = "test_prefs" if is_binarized else "test"
    config.data.max_prompt_length = 512 if is_short else 1800

    config.mesh.data = 1
    config.mesh.fsdp = -1

    config.loss.name = "simpo"
    config.loss.beta = beta
    config.loss.gamma_beta_ratio = gamma_beta_ratio
    config.optim.learning_rate = learning_rate
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.1

    config.eval.every = 400
    config.checkpoint.every = 100
    config.checkpoint.every_minutes = 30.0
    config.samples.prompts = 8
    config.samples.max_new_tokens = 256
    return config
