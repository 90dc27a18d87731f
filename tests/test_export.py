"""A run's checkpoints as Hugging Face folders: every tensor and logit is the trained model's."""

import functools
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
from processes import two_processes
from safetensors.numpy import load_file

from jaxalign import checkpoint, export, hf, metrics, models


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


def command(*arguments: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = [sys.executable, "-m", "jaxalign.export", *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
