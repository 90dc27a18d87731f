"""A run's checkpoints as Hugging Face folders: every tensor and logit is the trained model's."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import runs
from common import policy
from processes import two_processes
from safetensors.numpy import load_file

from jaxalign import checkpoint, evaluate, export, generate, hf, lora, metrics, models, programs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a mesh of fsdp 4 x tensor 2 that keeps checkpoints 3, 6 and 8; the best by a metric that grows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        mesh = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
        best = {"best_metric": "eval_loss", "best_mode": "max", "keep_best": 1}
        checkpoints = {f"checkpoint__{name}": value for name, value in {"keep": 2, "every": 0, **best}.items()}
        folder = tmp_path_factory.mktemp("export") / "run"
        return runs.run(folder, **mesh, **checkpoints, export__step="best").folder


def by_name(cfg: models.ModelConfig, params: models.Params) -> dict[str, np.ndarray]:
    """Tensors under Hugging Face's names, written out by hand."""
    tensors = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    tensors["lm_head.weight"] = params["lm_head"]["embedding"]
    layers = params["layers"]
    for i in range(cfg.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = layers[name]["scale"][i]
        for block in ("self_attn", "mlp"):
            for name, weight in layers[block].items():
                tensors[f"model.layers.{i}.{block}.{name}.weight"] = weight["kernel"][i].T
    return {name: np.asarray(x) for name, x in tensors.items()}


@pytest.mark.parametrize("step", ["last", "best", 6])
def test_every_tensor_and_logit_of_the_exported_folder_is_the_checkpoints(run, tmp_path, step):
    target = export.export(run, tmp_path / "out", step=step)
    cfg, params, tokenizer = export.load_run(run, step)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
    want, found = by_name(cfg, params), load_file(target / "model.safetensors")
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert tensor.dtype == np.float32 and np.array_equal(found[name], tensor), name

    opened_cfg, opened = hf.load(target)
    tokens = np.random.default_rng(0).integers(4, 260, (2, 16)).astype(np.int32)
    positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))

    def logits(cfg, params):
        return models.unembed(cfg, params, models.apply(cfg, params, tokens, positions)[0])

    np.testing.assert_array_equal(logits(opened_cfg, opened), logits(cfg, params))
    assert hf.load_tokenizer(target)("7 + 0 ?")["input_ids"] == tokenizer("7 + 0 ?")["input_ids"]


def test_the_steps_differ_and_the_run_exported_its_best(run):
    weights = {step: by_name(*export.load_run(run, step)[:2]) for step in ("last", "best", 3, 8)}
    same = lambda a, b: all(np.array_equal(weights[a][name], weights[b][name]) for name in weights[a])  # noqa: E731
    assert same("best", 3) and same("last", 8) and not same("best", "last")
    exported = load_file(run / "export" / "model.safetensors")
    assert all(np.array_equal(exported[name], x) for name, x in weights["best"].items())


def test_an_export_holds_one_weight_at_a_time(run, tmp_path, monkeypatch):
    whole = export.export(run, tmp_path / "whole", step=6)
    reads = []
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda *args: reads.append(sorted(args[2])) or read(*args))
    monkeypatch.setattr(checkpoint, "params_reader", functools.partial(checkpoint.params_reader, together=1))
    target = export.export(run, tmp_path / "out", step=6)
    leaves = jax.tree.leaves_with_path(models.declare(hf.read_config(target)), is_leaf=lambda x: hasattr(x, "axes"))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert reads == [[f"params/{path}"] for path in paths]
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_last_checkpoint_that_is_whole_is_exported(run, tmp_path, caplog):
    copy = Path(shutil.copytree(run, tmp_path / "run"))

    def spoil(step):
        for file in (copy / "checkpoints" / step / "state").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:-100])

    spoil("8")
    target = export.export(copy, tmp_path / "out")
    assert "checkpoint 8 in" in caplog.text and "INVALID" in caplog.text
    want, found = by_name(*export.load_run(run, 6)[:2]), load_file(target / "model.safetensors")
    assert all(np.array_equal(found[name], tensor) for name, tensor in want.items())
    spoil("6"), spoil("3")
    with pytest.raises(checkpoint.InvalidCheckpoint, match="no checkpoint in .* is valid .8: .*; 6: .*; 3: "):
        export.export(copy, tmp_path / "none")
    with pytest.raises(ValueError, match="no checkpoint 5"):
        export.export(copy, tmp_path / "none", step=5)
    assert not (tmp_path / "none").exists()


def test_the_command_writes_another_dtype_on_one_device(run, tmp_path):
    done = command(run, tmp_path / "out", "--step=6", "--dtype=bfloat16")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out"), done.stderr
    assert "PyTorch" not in done.stderr
    cfg, params, _ = export.load_run(run, 6)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in by_name(cfg, params).items():
        assert np.array_equal(found[name], tensor.astype(ml_dtypes.bfloat16)), name
    assert hf.read_config(tmp_path / "out").dtype == "bfloat16"


@pytest.mark.slow
def test_two_processes_export_the_step_that_is_wanted_from_their_mesh(run, tmp_path):
    program = """
mesh = sharding.make_mesh(fsdp=4, tensor=2)
with sharding.use_mesh(mesh):
    for step in ("last", "best"):
        export.export(sys.argv[1], f"{sys.argv[2]}/{step}", step=step, dtype="bfloat16", mesh=mesh)
"""
    two_processes(program, tmp_path, run, tmp_path / "two")
    for step in ("last", "best"):
        one = export.export(run, tmp_path / "one" / step, step=step, dtype="bfloat16")
        files = {file.name: file.read_bytes() for file in one.iterdir()}
        assert {file.name: file.read_bytes() for file in (tmp_path / "two" / step).iterdir()} == files


def test_what_is_not_there_is_an_error_with_what_is(run, tmp_path):
    done = command(run, tmp_path / "out", "--step=5")
    assert done.returncode == 1 and "no checkpoint '5'" in done.stderr and "3, 6, 8" in done.stderr, done.stderr
    with pytest.raises(ValueError, match="is not the folder of a run: config.json and checkpoints/ are expected"):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Adapters beside a base in 4 bits, with tokens added to it, whose rows are trained whole."""
    changes = {
        "model__random": None, "model__path": str(policy("llama")), "model__quantize": "nf4", "tokenizer__path": None,
        "tokenizer__add_tokens": ("? ",), "lora__rank": 2, "lora__targets": ("q_proj", "down_proj"),
        "lora__modules_to_save": ("embed_tokens", "lm_head"), "epochs": None, "steps": 3,
        "mesh__data": 4, "mesh__fsdp": 2,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(tmp_path_factory.mktemp("lora") / "run", **changes).folder


@pytest.mark.slow
def test_a_merged_export_adds_the_adapters_to_the_weights_that_the_base_has_on_disk(lora_run, tmp_path):
    target = export.export(lora_run, tmp_path / "out")
    config = export.read_config(lora_run / "config.json")
    cfg = programs.model_config(config, path=config.model.path)
    spec = programs.adapters_of(config, cfg)
    declared = lora.declare(cfg, spec)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), declared, is_leaf=lambda x: hasattr(x, "axes")
    )
    _, adapters, _ = checkpoint.restore_params(lora_run / "checkpoints", abstract)
    base = load_file(policy("llama") / "model.safetensors")
    found = load_file(target / "model.safetensors")
    trained = lora.flat(adapters)
    for name, tensor in found.items():
        path = tuple(name.split("."))
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert np.array_equal(tensor, trained[path[-2], "embedding"]) and len(tensor) == cfg.vocab_size > 384
        elif path[-2] in ("q_proj", "down_proj"):
            a, b = (trained["layers", *path[3:5], f"lora_{one}"][int(path[2])] for one in "ab")
            product = np.asarray(a, np.float64) @ np.asarray(b, np.float64) * 2  # alpha is 2 x rank
            np.testing.assert_allclose(tensor, base[name] + product.T, atol=1e-6)
            assert np.abs(product).max() > 1e-5
        else:
            assert np.array_equal(tensor, base[name]), name
    assert found.keys() == base.keys()
    for name, want in by_name(*export.load_run(lora_run)[:2]).items():
        np.testing.assert_allclose(found[name], want, atol=1e-7)
    exported = load_file(lora_run / "export" / "model.safetensors")  # made on the run's mesh
    for name, want in found.items():
        np.testing.assert_allclose(exported[name], want, atol=1e-6)


@pytest.mark.slow
def test_an_adapter_export_beside_its_base_answers_as_the_merged_one(lora_run, tmp_path, capsys):
    target = export.export(lora_run, tmp_path / "adapter", adapter=True)
    assert (target / "adapter_config.json").exists() and not (target / "model.safetensors").exists()
    merged = generate.load(str(lora_run))
    beside = generate.load(str(policy("llama")), adapter=str(target))
    assert beside.cfg.vocab_size == merged.cfg.vocab_size > 384
    for ours, theirs in zip(jax.tree.leaves(beside.params), jax.tree.leaves(merged.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert beside.tokenizer.get_vocab() == merged.tokenizer.get_vocab() and "? " in beside.tokenizer.get_vocab()
    flags = ("--prompt=1 + 1 ?", "--raw", "--max_new_tokens=4")
    generate.main(["generate", f"--model={policy('llama')}", f"--adapter={target}", *flags])
    generate.main(["generate", f"--model={lora_run / 'export'}", *flags])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first == second
    again = export.export(lora_run, target, adapter=True)  # in place of the earlier one
    assert again == target
    with pytest.raises(ValueError, match="was trained beside another base"):
        generate.load(str(policy("llama").parent / "ref"), adapter=str(target))
    with pytest.raises(ValueError, match="goes with the model that it was trained beside, and .* is a run"):
        generate.load(str(lora_run), adapter=str(target))


@pytest.mark.slow
def test_two_processes_write_merged_weights_and_adapters_together(lora_run, tmp_path):
    program = """
mesh = sharding.make_mesh(fsdp=4, tensor=2)
with sharding.use_mesh(mesh):
    export.export(sys.argv[1], f"{sys.argv[2]}/merged", mesh=mesh)
    export.export(sys.argv[1], f"{sys.argv[2]}/adapter", adapter=True, mesh=mesh)
"""
    two_processes(program, tmp_path, lora_run, tmp_path / "two")
    for name, adapter in (("merged", False), ("adapter", True)):
        one = export.export(lora_run, tmp_path / "one" / name, adapter=adapter)
        two = tmp_path / "two" / name
        assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
        weights = "adapter_model.safetensors" if adapter else "model.safetensors"
        found = load_file(two / weights)
        for key, want in load_file(one / weights).items():
            np.testing.assert_allclose(found[key], want, atol=1e-6, err_msg=key)


def test_a_run_of_adapters_is_evaluated_beside_its_base(lora_run):
    found = evaluate.evaluate(str(lora_run), export.read_config(lora_run / "config.json"))
    (line,) = [line for line in runs.lines(lora_run) if line["step"] == 3 and "eval_loss" in line]
    assert {name: found[name] for name in line if name.startswith("eval_")} == {
        name: value for name, value in line.items() if name.startswith("eval_")
    }


def test_a_base_that_changed_since_is_refused_and_a_run_without_adapters_says_so(lora_run, run, tmp_path):
    copy = Path(shutil.copytree(lora_run, tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    config["model"]["path"] = str(policy("llama").parent / "ref")
    (copy / "config.json").write_text(json.dumps(config))
    for adapter in (False, True):
        with pytest.raises(ValueError, match="was trained beside another base"):
            export.export(copy, tmp_path / "out", adapter=adapter)
    with pytest.raises(ValueError, match="trained all weights and has no adapter"):
        export.export(run, tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = [sys.executable, "-m", "jaxalign.export", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
