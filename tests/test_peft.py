"""PEFT's folders: ours open there, theirs open here, and what would change the numbers is refused by name."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
from common import FAMILIES, GOLDEN, LOGPS, model, positions
from test_lora import trained

from jaxalign import hf, lora, models, peft_files, safetensors_file, sharding

# A Python with torch, transformers and peft.
OTHER_PYTHON = os.environ.get("JAXALIGN_PEFT_PYTHON")

THEIRS = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
tokens = torch.arange(3, 43).reshape(2, 20)
with torch.no_grad():
    np.save(out, model(tokens).logits.numpy())
"""

SPECS = {
    "alike": lora.Spec(rank=4, alpha=8, targets=("q_proj", "down_proj"), rslora=True),
    "patterns": lora.Spec(rank=2, alpha=3, targets=("q_proj", "up_proj"), layers=(1,),
                          rank_pattern=(("up_proj", 5),), alpha_pattern=(("up_proj", 7.0),)),
    "saved": lora.Spec(rank=2, alpha=4, modules_to_save=("embed_tokens", "norm", "input_layernorm"), dropout=0.1),
}  # fmt: skip


def an_adapter(family, spec):
    """Adapters that change every number."""
    cfg, base = model(family)
    adapters = trained(cfg, spec, base)
    if "embed_tokens" in adapters:
        adapters["embed_tokens"]["embedding"] *= 1.1
    return cfg, base, adapters


@functools.cache
def logits_of(cfg):
    tokens = np.arange(3, 43, dtype=np.int32).reshape(2, 20)
    return jax.jit(lambda params: models.unembed(cfg, params, models.apply(cfg, params, tokens, positions(tokens))[0]))


def golden_folder(tmp_path, family="llama", **changes):
    """A copy of a golden adapter, its config changed."""
    folder = shutil.copytree(GOLDEN / "models" / family / "lora", tmp_path / "adapter")
    file = folder / peft_files.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def rename(folder, change):
    """Rewrites the header of an adapter's weights: names as `change` gives them."""
    file = folder / peft_files.WEIGHTS
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = {change(name): entry for name, entry in json.loads(raw[8 : 8 + size]).items()}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", SPECS)
def test_a_folder_reads_back_as_it_was_written(tmp_path, family, name):
    cfg, base, adapters = an_adapter(family, SPECS[name])
    options = dict(base_model_name_or_path="org/base", base_hash="ab12")
    folder = peft_files.save(tmp_path / "adapter", cfg, SPECS[name], adapters, **options)
    found = peft_files.read_config(folder, cfg)
    assert (found.base_model_name_or_path, found.base_hash) == ("org/base", "ab12")
    spec, back = peft_files.load(folder, cfg)
    # Said in other words, perhaps, but the same of every layer, and the same weights bit for bit.
    assert lora.targets(base, spec) == lora.targets(base, SPECS[name]) and spec.dropout == SPECS[name].dropout
    assert sorted(spec.modules_to_save) == sorted(SPECS[name].modules_to_save)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    again = peft_files.save(folder, cfg, spec, back, **options)  # over the first
    assert sorted(file.name for file in again.iterdir()) == [peft_files.CONFIG, peft_files.WEIGHTS]


def test_a_fingerprint_is_that_of_config_and_weights(tmp_path):
    own, copy = GOLDEN / "models" / "llama" / "lora", golden_folder(tmp_path)
    other = golden_folder(tmp_path / "other", lora_alpha=9)
    rename(third := golden_folder(tmp_path / "third"), lambda name: name.replace("lora_A", "lora_X"))
    assert len({peft_files.fingerprint(folder) for folder in (copy, other, third)}) == 3
    assert peft_files.fingerprint(own) == peft_files.fingerprint(shutil.copytree(own, tmp_path / "same"))


def test_a_folder_is_placed_on_a_mesh():
    cfg, _ = model("llama")
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    spec, adapters = peft_files.load(GOLDEN / "models" / "llama" / "lora", cfg, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, adapters) == lora.shardings(cfg, spec, mesh)
    _, whole = peft_files.load(GOLDEN / "models" / "llama" / "lora", cfg)
    jax.tree.map(np.testing.assert_array_equal, adapters, whole)


def test_a_layer_that_was_left_out_has_zeros(tmp_path):
    cfg, _ = model("llama")
    folder = golden_folder(tmp_path, layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"Unexpected \(6\): base_model.model.model.layers.0"):
        peft_files.load(folder, cfg)
    spec = peft_files.read_config(folder, cfg).spec
    adapters = trained(cfg, spec)
    peft_files.save(tmp_path / "second", cfg, spec, adapters, base_model_name_or_path=None)
    _, back = peft_files.load(tmp_path / "second", cfg)
    assert all(not np.any(x[0]) and np.any(x[1]) for x in jax.tree.leaves(back))
    assert len(safetensors_file.read_header(tmp_path / "second" / peft_files.WEIGHTS)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora = True.*not implemented"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'.*base's weights"),
        ({"some_key_of_the_future": 1}, "some_key_of_the_future = 1"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"target_modules": None}, "target_modules None"),
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"layers_pattern": "blocks"}, "layers_pattern"),
        ({"modules_to_save": ["layers.0.input_layernorm"]}, "no module 'layers.0.input_layernorm'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_would_change_the_numbers_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        peft_files.read_config(golden_folder(tmp_path, **changes), model("llama")[0])


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"target_modules": "all-linear"}, {"targets": ("all-linear",)}),
        ({"target_modules": r".*\.(q|v)_proj"}, {"targets": (r".*\.(q|v)_proj",)}),
        ({"use_rslora": True, "lora_dropout": 0.1}, {"rslora": True, "dropout": 0.1}),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, {"modules_to_save": ()}),
        ({"layers_to_transform": 1}, {"layers": (1,)}),
        ({"modules_to_save": ["norm"]}, {"modules_to_save": ("input_layernorm", "post_attention_layernorm", "norm")}),
        ({"modules_to_save": ["model.norm", "lm_head"]}, {"modules_to_save": ("norm", "lm_head")}),
        ({"init_lora_weights": "gaussian", "peft_version": "9"}, {}),
    ],
    ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "",
)
def test_what_is_honoured(tmp_path, changes, spec):
    found = peft_files.read_config(golden_folder(tmp_path, **changes), model("llama")[0]).spec
    usual = lora.Spec(rank=4, alpha=8, targets=("down_proj", "q_proj", "v_proj"))
    assert found == dataclasses.replace(usual, **spec)


def test_a_tensor_too_few_too_many_or_misspelt_is_named(tmp_path):
    folder = golden_folder(tmp_path)
    rename(folder, lambda name: name.replace("layers.1.mlp.down_proj.lora_A", "layers.1.mlp.down_prj.lora_A"))
    with pytest.raises(ValueError, match=r"Missing \(1\): .*down_proj.lora_A.*Unexpected \(1\): .*down_prj.lora_A"):
        peft_files.load(folder, model("llama")[0])
    with pytest.raises(ValueError, match=r"Misshapen \(12\)"):
        peft_files.load(golden_folder(tmp_path / "r", r=5), model("llama")[0])


def test_an_embedding_that_is_tied_and_was_trained_for_one_use_is_refused(tmp_path):
    tied, untied = model("qwen2")[0], model("llama")[0]
    for named in (["embed_tokens"], ["lm_head"]):
        with pytest.raises(ValueError, match="are one table"):
            peft_files.read_config(golden_folder(tmp_path / named[0], "qwen2", modules_to_save=named), tied)
    folder = golden_folder(tmp_path, modules_to_save=["lm_head"])
    assert peft_files.read_config(folder, untied).spec.modules_to_save == ("lm_head",)
    cfg, _, adapters = an_adapter("qwen2", SPECS["saved"])
    folder = peft_files.save(tmp_path / "own", cfg, SPECS["saved"], adapters, base_model_name_or_path=None)
    names = safetensors_file.read_header(folder / peft_files.WEIGHTS)
    head, table = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    assert {head, table} <= names.keys()
    rename(folder, lambda name: {head: table, table: head}.get(name, name))  # the same values: fine
    peft_files.load(folder, cfg)
    file = folder / peft_files.WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[safetensors_file.read_header(file)[head].offset] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="lm_head.weight differs from embed_tokens"):
        peft_files.load(folder, cfg)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    cfg, _, adapters = an_adapter("llama", SPECS["alike"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no adapter's folder"):
        peft_files.save(tmp_path, cfg, SPECS["alike"], adapters, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="expected a folder with adapter_config.json"):
        peft_files.load(tmp_path / "nowhere", cfg)


def test_merging_into_what_is_read_leaf_by_leaf_is_merging_the_tree(tmp_path):
    cfg, base, adapters = an_adapter("qwen2", SPECS["saved"])
    path = GOLDEN / "models" / "qwen2" / "policy"
    _, leaf = hf.reader(path)
    declared = models.declare(cfg)
    folder = hf.save(
        tmp_path / "merged", cfg, lambda at: lora.merge_leaf(at, leaf(at), adapters, declared, SPECS["saved"])
    )
    _, back = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, back, lora.merge(base, adapters, SPECS["saved"]))


@pytest.mark.slow
@pytest.mark.skipif(OTHER_PYTHON is None, reason="needs torch and peft: JAXALIGN_PEFT_PYTHON names their Python")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPECS)
def test_peft_opens_ours_and_computes_the_same(tmp_path, family, name):
    cfg, base, adapters = an_adapter(family, SPECS[name])
    folder = peft_files.save(tmp_path / "adapter", cfg, SPECS[name], adapters, base_model_name_or_path=None)
    out = tmp_path / "logits.npy"
    policy = GOLDEN / "models" / family / "policy"
    subprocess.run(
        [OTHER_PYTHON, "-c", THEIRS, policy, folder, out], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    ours = logits_of(cfg)(lora.attach(lora.Frozen(base, SPECS[name]), adapters))
    np.testing.assert_allclose(ours, np.load(out), **LOGPS)
    assert np.abs(ours - logits_of(cfg)(base)).max() > 1e-2
