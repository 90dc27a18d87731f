"""Whole tiny LoRA runs: what is trained, what it is measured against, resume, and PEFT folders at both ends."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import runs

from jaxalign import build, export, hf, metrics, models, programs
from jaxalign import config as config_lib

LORA = {
    "model__random": None,
    "lora__rank": 4,
    "lora__dropout": 0.1,
    "epochs": None,
    "steps": 4,
    "eval__every": 2,
    "samples__prompts": 0,
    "samples__max_new_tokens": None,
    "optim__schedule": "constant",
    "optim__warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model's folder, and that of another one."""
    folder = tmp_path_factory.mktemp("base")
    config = config_lib.validate(runs.config(folder / "none"))
    cfg = dataclasses.replace(programs.model_config(config, path=None), attention="xla")
    tokenizer, _ = programs.load_tokenizer(config)
    for seed in (0, 1):
        hf.save(folder / str(seed), cfg, models.init(cfg, jax.random.key(seed)), tokenizer_from=tokenizer)
    return folder


def test_a_run_trains_adapters_alone_and_goes_on_beside_its_own_base_only(base, tmp_path, monkeypatch):
    lora = {**LORA, "model__path": str(base / "0"), "gradient_accumulation_steps": 2}
    whole = runs.run(tmp_path / "whole", **lora)
    assert whole.metrics["before_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert whole.metrics["eval_loss"] < math.log(2) - 1e-3
    names = runs.leaves(tmp_path / "whole")
    assert names and all("lora_" in name for name in names if "layers" in name)
    assert not any("embed_tokens" in name or "kernel" in name for name in names)
    # Stopped after two steps and continued, dropout and all, it ends in the same bits.
    runs.run(tmp_path / "parts", **{**lora, "steps": 2})
    runs.run(tmp_path / "parts", **lora)
    runs.assert_same(tmp_path / "parts", tmp_path / "whole")
    # The base's files are exchanged under the run.
    monkeypatch.setattr(build.Run, "_base_identity", hf.fingerprint(str(base / "1")))
    with pytest.raises(ValueError, match="trained beside another base"):
        runs.run(tmp_path / "parts", **{**lora, "steps": 6})


@pytest.mark.slow
def test_a_run_that_begins_with_an_adapter_is_measured_against_it(base, tmp_path):
    lora = {**LORA, "model__path": str(base / "0"), "lora__dropout": None}
    first = runs.run(tmp_path / "first", **{**lora, "steps": 2})
    adapter = export.export(first.folder, tmp_path / "adapter", adapter=True)
    again = {**lora, "lora__rank": None, "lora__path": str(adapter)}
    second = runs.run(tmp_path / "second", **again)
    assert second.metrics["before_eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second.metrics["before_eval_logps/chosen"] == pytest.approx(first.metrics["eval_logps/chosen"], rel=1e-6)
    assert second.metrics["eval_loss"] < math.log(2) - 1e-3
    # A reference of another path is read in its place: then it does not begin at ln 2.
    other = runs.run(tmp_path / "other", **{**again, "steps": 1, "reference__path": str(base / "0")})
    assert abs(other.metrics["before_eval_loss"] - math.log(2)) > 1e-3
    with pytest.raises(ValueError, match="trained beside another base"):
        runs.run(tmp_path / "wrong", **{**again, "model__path": str(base / "1")})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__quantize": "nf4"},
        {"model__quantize": "int8", "data__packing": "on", "data__buckets": None},
        {"loss__name": "reward", "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
        {"loss__name": "kto", "data__packing": "shared", "data__buckets": None, "mesh__data": 4, "mesh__tensor": 2},
        {"loss__name": "sft", "lora__modules_to_save": ("embed_tokens", "lm_head"), "mesh__data": 2, "mesh__fsdp": -1},
    ],
)
def test_adapters_learn_with_every_objective_on_any_mesh(changes, base, tmp_path):
    result = runs.run(tmp_path / "run", **{**LORA, "model__path": str(base / "0"), "batch_size": 16, **changes})
    assert result.metrics["eval_loss"] < result.metrics["before_eval_loss"]
    assert np.isfinite([x for line in runs.lines(result.folder) for x in line.values()]).all()
    assert (result.export / "config.json").exists()
