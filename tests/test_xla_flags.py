"""The options that overlap communication with computation: where they are given, and where not."""

import jax
import pytest
import runs

from jaxalign import config, models, programs, sharding, xla_flags

NAME = "xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def of_gpus(monkeypatch):
    """Meshes look as if their devices were GPUs."""
    jax.devices()  # the tests' own XLA_FLAGS are read now
    monkeypatch.setattr(sharding, "platform", lambda mesh=None: "gpu")


def test_several_gpus_get_the_latency_hiding_scheduler_and_a_line_says_so(of_gpus, caplog, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    with caplog.at_level("INFO"):
        assert xla_flags.options(sharding.make_mesh(fsdp=8)) == {NAME: True}
        assert xla_flags.options(sharding.make_mesh(devices=jax.devices()[:1])) is None  # nothing to overlap
    assert [record.message for record in caplog.records] == [f"XLA options: {NAME}=True"]


def test_what_the_user_has_set_is_left_to_the_user(of_gpus, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_autotune_level=0 --{NAME}=false")
    assert xla_flags.options(sharding.make_mesh(fsdp=8)) is None


def test_a_cpu_gets_none():
    assert xla_flags.options(sharding.make_mesh(fsdp=8)) is None


@pytest.mark.parametrize("program", ["train_step", "score", "score_once", "examples"])
def test_a_runs_programs_are_compiled_with_them(program, monkeypatch, tmp_path):
    monkeypatch.setattr(xla_flags, "OPTIONS", {"cpu": {"xla_no_such_option": True}})
    values = config.validate(runs.config(tmp_path / "run"))
    cfg = models.config_from_hf(runs.MODEL)
    mesh = sharding.make_mesh(data=8)
    with sharding.use_mesh(mesh):
        run = programs.Programs(values, mesh, cfg, cfg, steps=4)
        shape = (run.rows, 48)
        leaves = {"tokens": "int32", "positions": "int32", "mask": "bool", "ref_logps": "float32"}
        batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in leaves.items()}
        batch["lengths"] = jax.ShapeDtypeStruct(shape[:1], "int32")
        arguments = {
            "train_step": (run.state, None, batch),
            "examples": (run.state.params, None, batch),
        }.get(program, (run.reference, batch))
        lowered = getattr(run, program).lower(*arguments)
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
            lowered.compile()
