"""Several real processes compute what one does, each reads only its own rows, and they fail together."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs

from jaxalign import build, metrics, sharding
from jaxalign import config as config_lib

PROGRAM = """
import os, sys
from jaxalign.data import packing

fill, seen = packing.fill, []
def counted(prepared, layout, rows=None, **options):
    seen.append((len(layout.examples), sorted(map(int, rows))))
    return fill(prepared, layout, rows, **options)
packing.fill = counted
from jaxalign import train
try:
    train.main()
finally:
    print("ROWS", seen, flush=True)
"""


def processes(config_file: Path, n: int = 2, *, before: str = "") -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each of n processes, eight devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // n} --xla_backend_optimization_level=0"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", before + PROGRAM, f"--config={config_file}"],
            env={
                **os.environ,
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(n),
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(n)
    ]
    try:
        found = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *streams) for process, streams in zip(started, found, strict=True)]


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one_and_feed_only_their_own_rows(tmp_path, no_picture, n):
    settings = {"epochs": None, "steps": 3, "eval__batch_size": 4, "reference__mode": "cached", "checkpoint__every": 2}
    found = processes(runs.save(tmp_path / "two", **settings, data__cache_dir=str(tmp_path / "cache")), n)
    errors = "".join(text for _, _, text in found)
    assert [code for code, _, _ in found] == [0] * n, errors
    assert f"8 cpu (data 8), {n} host(s)" in found[0][2] and "step 3/3" in found[0][2]
    assert "step" not in "".join(text for _, _, text in found[1:])  # the first process speaks for all
    rows = [json.loads(said.split("ROWS", 1)[1].replace("(", "[").replace(")", "]")) for _, said, _ in found]
    for parts in zip(*rows, strict=True):
        (total,) = {of for of, _ in parts}
        assert {len(own) for _, own in parts} == {total // n}
        assert sorted(row for _, own in parts for row in own) == list(range(total))
    assert len(rows[0]) > 3 + 2 * 3  # training, two evaluations of nine pairs in batches of four, scoring

    one = runs.run(tmp_path / "one", **settings).folder
    runs.assert_close(tmp_path / "two", one)
    assert metrics.read_completions(tmp_path / "two") == metrics.read_completions(one)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "two" / "export" / name).read_bytes() == (one / "export" / name).read_bytes()
    from safetensors.numpy import load_file

    ours, whole = (load_file(folder / "export" / "model.safetensors") for folder in (tmp_path / "two", one))
    assert ours.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(ours[name], whole[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2},
        {"mesh__data": 1, "mesh__tensor": 8, "model__random": {**runs.MODEL, "num_attention_heads": 8}},  # rows twice
        {"mesh__fsdp": 2, "gradient_accumulation_steps": 2, "reference__sync_every": 2},
        {"mesh__fsdp": 2, "data__packing": "shared", "data__buckets": None, "reference__mode": "cached"},
    ],
    ids=["fsdp 4 x tensor 2", "tensor 8", "accumulation and a moving reference", "packed"],
)
def test_two_processes_equal_one_on_other_meshes(tmp_path, no_picture, changes):
    settings = {"epochs": None, "steps": 3, "eval__batch_size": 4, **changes}
    (first, said, errors), (second, _, errors_2) = processes(runs.save(tmp_path / "two", **settings))
    assert (first, second) == (0, 0), errors + errors_2
    runs.assert_close(tmp_path / "two", runs.run(tmp_path / "one", **settings).folder)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, no_picture):
    settings = {"epochs": None, "eval__batch_size": 4, "checkpoint__every": 1, "optim__schedule": "constant"}
    for n, steps in ((4, 2), (2, 4)):
        found = processes(runs.save(tmp_path / "run", steps=steps, **settings), n)
        assert [code for code, _, _ in found] == [0] * n, "".join(text for _, _, text in found)
    runs.run(tmp_path / "run", steps=6, **settings)
    whole = runs.run(tmp_path / "one", steps=6, **settings).folder
    steps = [[line["step"] for line in runs.lines(folder) if "loss" in line] for folder in (tmp_path / "run", whole)]
    assert steps == [list(range(1, 7))] * 2
    for name in ("loss", "grad_norm", "rewards/margins"):
        ours, others = (
            [line[name] for line in runs.lines(folder) if "loss" in line] for folder in (tmp_path / "run", whole)
        )
        np.testing.assert_allclose(ours, others, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_on_both_and_one_process_goes_on(tmp_path, no_picture):
    settings = {"epochs": None, "steps": 6}
    file = runs.save(tmp_path / "two", **settings)
    kill = """
import os, signal
from jaxalign import train
real = train.Training.step
def step(self, n, batch):
    real(self, n, batch)
    if n == 2 and os.environ["JAX_PROCESS_ID"] == "1": os.kill(os.getpid(), signal.SIGTERM)
train.Training.step = step
"""
    (first, _, errors), (second, _, errors_2) = processes(file, before=kill)
    assert (first, second) == (75, 75), errors + errors_2
    stopped = runs.lines(tmp_path / "two")[-1]["step"]
    assert 2 <= stopped < 6
    runs.run(tmp_path / "two", **settings)
    runs.assert_close(tmp_path / "two", runs.run(tmp_path / "one", **settings).folder)


FAILURES = {
    "before the first step": """
import os, time
from jaxalign import evals
def completions(*_):
    if os.environ["JAX_PROCESS_ID"] == "1":
        open(os.environ["FAILED_AT"], "w").write(str(time.time()))
        1 / 0
    time.sleep(120)
evals.first_completions = completions
""",
    "between checkpoints": """
import os, time
from jaxalign import train
real = train.Training.step
def step(self, n, batch):
    if n == 5 and os.environ["JAX_PROCESS_ID"] == "1":
        open(os.environ["FAILED_AT"], "w").write(str(time.time()))
        1 / 0
    real(self, n, batch)
train.Training.step = step
""",
}


@pytest.mark.parametrize("when", ["before the first step", pytest.param("between checkpoints", marks=pytest.mark.slow)])
def test_an_error_in_one_process_ends_both_within_a_minute_and_is_read_on_both_consoles(tmp_path, when):
    mark = tmp_path / "failed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAILED_AT", str(mark))
        (first, _, errors), (second, _, errors_2) = processes(runs.save(tmp_path / "two"), before=FAILURES[when])
    assert time.time() - float(mark.read_text()) < 60
    assert (first, second) == (1, 1), errors + errors_2
    assert "ZeroDivisionError" in errors_2
    assert "process 1 of 2 failed" in errors and "ZeroDivisionError" in errors


@pytest.mark.slow
def test_where_no_step_is_finished_every_process_prints_its_stacks_and_exits_76(tmp_path):
    hang = """
import os, time
from jaxalign import train
real = train.Training.step
def step(self, n, batch):
    if n == 4 and os.environ["JAX_PROCESS_ID"] == "1": lie_down()
    real(self, n, batch)
def lie_down(): time.sleep(300)
train.Training.step = step
"""
    file = runs.save(tmp_path / "two", eval__every=0, watchdog_minutes=0.25)
    (first, _, errors), (second, _, errors_2) = processes(file, before=hang)
    assert (first, second) == (76, 76), errors + errors_2
    assert "process 0 of 2: nothing was finished in 0.25 minutes (watchdog_minutes); the last was step " in errors
    assert "process 1 of 2: nothing was finished" in errors_2
    assert "lie_down" in errors_2 and "lie_down" not in errors and "in loop" in errors


def test_no_step_on_cpus_has_a_reduce_scatter_which_gloo_gets_wrong(tmp_path):
    config = config_lib.validate(runs.config(tmp_path, mesh__data=2, mesh__fsdp=4), n_devices=8)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with sharding.use_mesh(mesh):
        run = build.Run(config, mesh, build.load_data(config, tmp_path / "dropped.jsonl"))
        batch = run.place(run.source(0))
        batch["ref_logps"] = np.zeros(batch["tokens"].shape, np.float32)
        program = run.train_step.lower(run.state, None, batch).compile().as_text()
    assert " all-reduce(" in program and " reduce-scatter(" not in program
