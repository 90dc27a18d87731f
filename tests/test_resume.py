"""A run that was stopped, killed or damaged, and started again, ends in the bits of one that was left alone."""

import contextlib
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import runs

from jaxalign import checkpoint, config, metrics, train
from jaxalign.signals import Stopper
from jaxalign.train import Preempted


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(tmp_path_factory.mktemp("whole") / "run").folder


@pytest.fixture(scope="module")
def command():
    with runs.commands() as one:
        yield one


def stop_after(monkeypatch, step: int) -> None:
    """The next run is told to stop after `step`."""
    monkeypatch.setattr(Stopper, "should_stop", lambda self, n: n == step)


def stopped(monkeypatch, folder: Path, step: int, **changes) -> None:
    """Trains up to `step`, saves there and stops."""
    stop_after(monkeypatch, step)
    with pytest.raises(Preempted, match=f"stopped and saved after step {step} of"):
        runs.run(folder, **changes)
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


def test_the_whole_run_has_every_line_once(whole):
    lines = runs.lines(whole)
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, runs.STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6, 8]
    assert [row["step"] for row in metrics.read_completions(whole)] == [n for n in (0, 3, 6, 8) for _ in range(2)]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    np.testing.assert_allclose(rates, [0, 5e-3, *(1e-2 * (1 - i / 6) for i in range(6))], rtol=1e-6)
    assert lines[-2]["epoch"] == pytest.approx(8 / 3) and lines[-2]["num_tokens"] > 0


@pytest.mark.slow
def test_stopped_three_times_at_an_epochs_edge_and_before_the_last_step(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for step in (1, 3, 7):  # an epoch is 3 steps
        stopped(monkeypatch, folder, step)
    runs.run(folder)
    runs.assert_same(folder, whole)


def test_stopped_before_the_first_step_it_begins_anew(whole, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0)
    with pytest.raises(Preempted):
        runs.run(tmp_path / "run")
    assert not checkpoint.list_steps(tmp_path / "run" / "checkpoints")
    assert [line["step"] for line in runs.lines(tmp_path / "run")] == [0]


def test_crashed_twice_it_takes_up_the_last_checkpoint_and_loses_or_doubles_no_line(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    real = train.Training.step
    for step in (6, 8):

        def crash(self, n, batch, step=step):
            if n == step:
                raise KeyboardInterrupt
            real(self, n, batch)

        monkeypatch.setattr(train.Training, "step", crash)
        with pytest.raises(KeyboardInterrupt):
            runs.run(folder)
    assert runs.lines(folder)[-1]["step"] == 6  # the metrics of step 7 were not fetched yet
    monkeypatch.setattr(train.Training, "step", real)
    runs.run(folder)
    runs.assert_same(folder, whole)


def test_killed_9_at_any_moment_and_during_a_save(whole, tmp_path, command):
    folder = tmp_path / "run"
    config_file = runs.save(folder)
    killed_in_save = "checkpoint.Checkpoints._finish = lambda *_: kill(signal.SIGKILL)"
    command.start(f"--config={config_file}", before=killed_in_save)
    assert command.wait()[0] == -signal.SIGKILL
    assert not checkpoint.list_steps(folder / "checkpoints") and any((folder / "checkpoints").iterdir())

    pid = command.start(f"--config={config_file}")
    kill_at_line(pid, folder, random.randrange(5, 9))
    code, said = command.wait()
    assert code == -signal.SIGKILL and "removing" in said
    command.start(f"--config={config_file}")
    code, said = command.wait()
    assert code == 0, said
    runs.assert_same(folder, whole)


def kill_at_line(pid: int, folder: Path, n_lines: int) -> None:
    """Kills a command as soon as its metrics.jsonl has so many lines."""
    file = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= n_lines:
            break
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_9_ten_times(whole, tmp_path, command):
    """From the first seconds on, so that the moments spread over all phases."""
    folder = tmp_path / "run"
    config_file = runs.save(folder)
    for _ in range(10):
        pid = command.start(f"--config={config_file}")
        time.sleep(random.uniform(0.5, 6))
        with contextlib.suppress(ProcessLookupError):  # it was quick
            os.kill(pid, signal.SIGKILL)
        command.wait()
    runs.run(folder)
    runs.assert_same(folder, whole)


STOPS = {
    "compilation": """
train.Training.look = lambda self, n: {}
real_compile = train.Training.compile
def compile(*a):
    threading.Timer(0.3, kill).start()
    real_compile(*a)
train.Training.compile = compile
""",
    "training": """
real_step = train.Training.step
def step(self, n, batch):
    real_step(self, n, batch)
    if n == 2: kill()
train.Training.step = step
""",
    "evaluation": """
real_evaluate = evals.evaluate
def evaluate(run, state, **known):
    if int(state.step) == 3: kill(), time.sleep(1)
    return real_evaluate(run, state, **known)
evals.evaluate = evaluate
""",
    "generation": """
def completions(run, params):
    kill()
    time.sleep(60)
evals.completions = completions
""",
    "save": """
real_save = checkpoint.Checkpoints.save
def save(self, step, *a, **k):
    held = real_save(self, step, *a, **k)
    if step == 4: kill(), time.sleep(0.3)
    return held
checkpoint.Checkpoints.save = save
""",
}


def test_sigterm_in_every_phase_exits_75_and_goes_on_where_it_was(whole, tmp_path, command):
    folder = tmp_path / "run"
    config_file = runs.save(folder)
    for phase, saved in (("compilation", []), ("training", [2]), ("evaluation", [2, 3]), ("generation", [2, 3])):
        cache = ["--config.compilation_cache=none"] if phase == "compilation" else []
        command.start(f"--config={config_file}", *cache, before=STOPS[phase])
        code, said = command.wait()
        assert code == 75, said
        assert "SIGTERM: saving" in said if phase == "training" else f"SIGTERM during {phase}" in said
        assert checkpoint.list_steps(folder / "checkpoints") == saved
    command.start(f"--config={config_file}", before=STOPS["save"])
    code, said = command.wait()
    assert code == 75 and "stopped and saved after step 4" in said, said
    runs.run(folder)
    runs.assert_same(folder, whole)


def test_a_second_ctrl_c_aborts_with_130_and_the_last_checkpoint_stays(tmp_path, command):
    twice = """
def completions(run, params):
    kill(signal.SIGINT), time.sleep(0.5), kill(signal.SIGINT), time.sleep(60)
evals.completions = completions
train.Training.save_now = lambda self: time.sleep(60)
"""
    folder = tmp_path / "run"
    config_file = runs.save(folder, data__eval__path=None, eval__every=None, samples__every=3, steps=4, epochs=None)
    first = "real = evals.completions\nevals.completions = lambda run, params: []\n"
    command.start(f"--config={config_file}", before=first + STOPS["save"].replace("step == 4", "step == 2"))
    assert command.wait()[0] == 75
    command.start(f"--config={config_file}", before=twice)
    code, said = command.wait()
    assert code == 130 and "SIGINT during generation" in said and "aborting now" in said, said
    assert checkpoint.list_steps(folder / "checkpoints") == [2]


def test_sigterm_before_there_is_anything_to_save_exits_75(tmp_path, command):
    command.start(
        f"--config={runs.save(tmp_path / 'run')}", before="train.build.load_data = lambda *_: (kill(), time.sleep(60))"
    )
    code, said = command.wait()
    assert code == 75 and "SIGTERM during start-up: exit 75" in said, said


def copy_of(whole: Path, target: Path) -> Path:
    return Path(shutil.copytree(whole, target))


def data_files(step: Path) -> list[Path]:
    """The files of a checkpoint's arrays: all of them, as some hold bytes that OCDBT wrote twice and nobody reads."""
    return [p for p in (step / "state").rglob("d/*") if p.is_file()]


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bit, truncate])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_leads_to_the_same_end(
    whole, tmp_path, damage, caplog, capsys
):
    folder = copy_of(whole, tmp_path / "run")
    assert checkpoint.list_steps(folder / "checkpoints") == [6, 8]
    for file in data_files(folder / "checkpoints" / "8"):
        damage(file)
    with caplog.at_level(logging.WARNING):
        runs.run(folder)
    assert "checkpoint 8" in caplog.text and "INVALID" in caplog.text
    assert "falling back to checkpoint 6" in caplog.text and "continuing after step 6 of 8" in capsys.readouterr().err
    runs.assert_same(folder, whole)


def test_when_every_checkpoint_is_damaged_nothing_is_thrown_away(whole, tmp_path):
    folder = copy_of(whole, tmp_path / "run")
    for step in (6, 8):
        for file in data_files(folder / "checkpoints" / str(step)):
            truncate(file)
    with pytest.raises(checkpoint.InvalidCheckpoint, match="no checkpoint in .* is valid"):
        runs.run(folder)
    assert runs.lines(folder) == runs.lines(whole)


def test_a_finished_run_says_so_and_how_to_extend_it_and_changes_nothing(whole, tmp_path, capsys):
    folder = copy_of(whole, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    result = runs.run(folder)
    said = capsys.readouterr().err
    assert f"{folder} is finished: 8 steps are done" in said and "--config.epochs=5" in said
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before
    assert result.metrics["eval_loss"] == runs.lines(whole)[-1]["eval_loss"]
    assert result.metrics["before_eval_loss"] == pytest.approx(np.log(2), abs=1e-5) and result.metrics["loss"] < 0.1
    runs.assert_same(folder, whole)


def test_a_finished_run_is_extended_and_how_it_is_run_may_change(whole, tmp_path, caplog):
    folder = copy_of(whole, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        result = runs.run(folder, epochs=3.3, eval__every=0, log__every=2, checkpoint__every=0, samples__prompts=1)
    assert "resuming with epochs changed: 2.5 -> 3.3" in caplog.text
    assert [line["step"] for line in runs.lines(folder) if "loss" in line][-3:] == [7, 8, 10]
    assert [row["step"] for row in metrics.read_completions(folder)][-3:] == [8, 8, 10]
    assert checkpoint.list_steps(folder / "checkpoints") == [8, 10]
    assert result.metrics["epoch"] == pytest.approx(10 / 3)


def test_a_run_that_now_ends_where_it_was_stopped_is_finished_there(tmp_path, monkeypatch, whole):
    folder = tmp_path / "run"
    stopped(monkeypatch, folder, 3)  # where it was evaluated already
    result = runs.run(folder, epochs=1)
    assert result.metrics["eval_loss"] == runs.lines(whole)[4]["eval_loss"] and result.export
    assert runs.lines(folder) == runs.lines(whole)[:5]
    assert checkpoint.read_meta(folder / "checkpoints", 3)["progress"]["finished"]


def test_a_run_that_is_past_its_end_is_left_as_it_is(whole, tmp_path, capsys):
    folder = copy_of(whole, tmp_path / "run")
    runs.run(folder, epochs=1)
    assert "8 steps are done" in capsys.readouterr().err
    assert checkpoint.list_steps(folder / "checkpoints") == [6, 8] and runs.lines(folder) == runs.lines(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__random": {**runs.MODEL, "hidden_size": 64}},
        {"data__max_rows": 16},
        {"loss__beta": 0.2},
        {"optim__learning_rate": 1.0},
        {"batch_size": 4},
        {"seed": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_change_of_what_is_computed_is_refused_with_old_and_new(whole, changes):
    name = next(iter(changes)).replace("__", ".")
    old, new = (config.validate(values) for values in (runs.config(whole), runs.config(whole, **changes)))
    ((key, before, after),) = config.diff(old, new)
    assert key == name
    with pytest.raises(ValueError) as refused:
        runs.run(whole, **changes)
    assert f"{name}: {before!r} -> {after!r}" in str(refused.value) and "--resume=force" in str(refused.value)


def test_other_rows_under_the_same_path_are_refused_unless_forced(whole, tmp_path, monkeypatch):
    folder, file = copy_of(whole, tmp_path / "run"), runs.shared() / "train.jsonl"
    rows = file.read_text()
    try:
        file.write_text(rows.replace("Who knows", "Who cares"))
        with pytest.raises(ValueError, match="the training rows .* changed: fingerprint .* -> .*--resume=force"):
            runs.run(folder)
        runs.run(folder, resume="force")
    finally:
        file.write_text(rows)


def test_force_goes_on_with_another_learning_rate(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stopped(monkeypatch, folder, 3)
    runs.run(folder, optim__learning_rate=1e-3, resume="force", epochs=None, steps=4)
    lines = [line for line in runs.lines(folder) if "loss" in line]
    assert lines[:3] == [line for line in runs.lines(whole) if "loss" in line][:3]
    assert lines[3]["learning_rate"] == pytest.approx(5e-4)
    with pytest.raises(ValueError, match="0.001 -> 0.01"):
        runs.run(folder)


def test_never_refuses_a_folder_that_holds_a_run(whole):
    with pytest.raises(ValueError, match="holds a run already and resume is never"):
        runs.run(whole, resume="never")


def test_on_another_mesh_it_goes_on_within_rounding(tmp_path, monkeypatch, whole):
    folder = tmp_path / "run"
    stopped(monkeypatch, folder, 4)
    runs.run(folder, mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    runs.assert_close(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_another_optimizers_state_and_a_moved_reference_come_back(tmp_path, monkeypatch, name):
    settings = {"optim__name": name, "reference__sync_every": 2, "epochs": None, "steps": 5}
    settings |= {"samples__prompts": None, "samples__max_new_tokens": None}
    whole = runs.run(tmp_path / "whole", **settings).folder
    stopped(monkeypatch, tmp_path / "run", 3, **settings)
    runs.run(tmp_path / "run", **settings)
    runs.assert_same(tmp_path / "run", whole)
    saved = runs.leaves(whole, 5)
    assert len([path for path in saved if path.startswith("opt_state/")]) > 10
    moved = [path for path in saved if path.startswith("aux/reference/") and "layers" in path]
    assert moved and all(saved[path] != saved[path.replace("aux/reference", "params")] for path in moved)


def test_the_same_step_looked_at_twice_writes_its_lines_once(whole, tmp_path, monkeypatch):
    """Stopped between step 3 and its evaluation, then crashed right after the evaluation was written."""
    folder = tmp_path / "run"

    def stop(self, n):
        if n == 3:
            self.save_now()
            raise Preempted
        return look(self, n)

    look = train.Training.look
    monkeypatch.setattr(train.Training, "look", stop)
    with pytest.raises(Preempted):
        runs.run(folder)

    def crash(self, n):
        look(self, n)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Training, "look", crash)
    with pytest.raises(KeyboardInterrupt):
        runs.run(folder)
    assert [line["step"] for line in runs.lines(folder) if "eval_loss" in line] == [0, 3]
    monkeypatch.setattr(train.Training, "look", look)
    runs.run(folder)
    runs.assert_same(folder, whole)
