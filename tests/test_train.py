"""The loop: what it says and writes, when it looks, saves and stops, and how the command ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

import jaxalign
from jaxalign import checkpoint, config, evals, logprobs, metrics, train

ROOT = Path(__file__).parent.parent
PLAIN = {"samples__prompts": None, "samples__max_new_tokens": None}


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def command():
    with runs.commands() as one:
        yield one


# ---- what is written


def test_a_line_begins_with_what_one_looks_for_and_has_trls_names(tmp_path, no_picture):
    folder = runs.run(tmp_path / "run", **PLAIN, steps=2, epochs=None).folder
    line = [line for line in metrics.read_metrics(folder) if "loss" in line][-1]
    assert list(line)[:8] == ["step", "loss", "grad_norm", "learning_rate", "rewards/accuracies", "rewards/chosen",
                              "rewards/margins", "rewards/rejected"]  # fmt: skip
    assert {
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "mean_token_accuracy",
        "epoch",
        "num_tokens",
    } <= line.keys()
    assert {"time/step", "time/tokens_per_second", "time/model_flops_per_second"} <= line.keys()
    before = runs.lines(folder)[0]
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    pairs = SimpleNamespace(kind="pairs", head="lm")
    assert set(before) == {"step", *evals.names(pairs)} and before["eval_examples"] == 9


def test_compiling_evaluating_sampling_and_saving_do_not_count_as_a_steps_time(tmp_path, monkeypatch, no_picture):
    offset = 0.0

    def slow(function):
        def wrapped(*args, **kwargs):
            nonlocal offset
            offset += 1000.0
            return function(*args, **kwargs)

        return wrapped

    class Clock:
        monotonic = staticmethod(time.monotonic)
        perf_counter = staticmethod(lambda: time.perf_counter() + offset)

    monkeypatch.setattr(train, "time", Clock)
    monkeypatch.setattr(evals, "evaluate", slow(evals.evaluate))
    monkeypatch.setattr(evals, "completions", slow(evals.completions))
    monkeypatch.setattr(evals, "first_completions", slow(evals.first_completions))
    monkeypatch.setattr(checkpoint.Checkpoints, "save", slow(checkpoint.Checkpoints.save))
    monkeypatch.setattr(jax.stages.Lowered, "compile", slow(jax.stages.Lowered.compile))
    folder = runs.run(tmp_path / "run", steps=5, epochs=None).folder
    assert offset >= 3000 + 3000 + 3000 + 2000
    steps = [line["time/step"] for line in metrics.read_metrics(folder) if "loss" in line]
    assert len(steps) == 5 and max(steps) < 500
    assert [line["time/eval"] > 500 for line in metrics.read_metrics(folder) if "eval_loss" in line] == [True] * 3


def test_no_step_after_the_first_of_its_length_compiles_anything(tmp_path, monkeypatch, no_picture):
    compiled, began = [], {}
    real = train.Training.step

    def step(self, n, batch):
        began[n] = len(compiled)
        real(self, n, batch)

    monkeypatch.setattr(train.Training, "step", step)
    listener = lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        runs.run(tmp_path / "run", **PLAIN, data__buckets=(40, 48), data__eval__path=None, eval__every=None)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    lengths = [2, 4, 6, 8]  # before these steps nothing is saved or flushed at an edge
    assert len(compiled) > 3
    assert all(began[n] == began[n - 1] for n in lengths[1:])


# ---- stopping early, keeping the best


def test_it_stops_when_the_metric_has_not_improved_and_stays_stopped(tmp_path, no_picture, capsys):
    stopping = {"metric": "eval_rewards/margins", "mode": "min", "patience": 2}  # the margin grows: 0 is the best
    changes = {f"early_stopping__{name}": value for name, value in stopping.items()} | {"eval__every": 2}
    folder = runs.run(tmp_path / "run", **changes).folder
    assert runs.lines(folder)[-1]["step"] == 4 and checkpoint.list_steps(folder / "checkpoints")[-1] == 4
    assert "step 4: eval_rewards/margins has not improved in 2 evaluations: stopping" in capsys.readouterr().err
    assert [row["step"] for row in metrics.read_completions(folder)] == [0, 0, 2, 2, 4, 4]
    assert (folder / "export" / "config.json").exists()

    runs.run(folder, **changes)
    said = capsys.readouterr().err
    assert "is finished: 4 steps" in said and "--config.early_stopping.patience=4" in said
    assert runs.lines(folder)[-1]["step"] == 4
    runs.run(folder, **{**changes, "early_stopping__patience": 3})
    assert runs.lines(folder)[-1]["step"] == 6


@pytest.mark.parametrize("key", ["early_stopping__metric", "checkpoint__best_metric"])
def test_a_metric_that_the_evaluation_has_not_is_named_before_the_first_step(tmp_path, key):
    section = key.split("__")[0]
    mode = {"early_stopping": "early_stopping__mode", "checkpoint": "checkpoint__best_mode"}[section]
    changes = {key: "eval_rewards/margin", mode: "max"} | (
        {"checkpoint__keep_best": 1} if section == "checkpoint" else {}
    )
    with pytest.raises(ValueError, match="is 'eval_rewards/margin', expected one of .*eval_rewards/margins"):
        runs.run(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- how it begins


class Compiled(Exception):
    """Something was compiled."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "no multiple of mesh.data x mesh.fsdp"),
        ({"data__path": "nowhere.jsonl"}, "no data file 'nowhere.jsonl'"),
        ({"data__max_prompt_length": 7}, "24 of 24 rows .* cannot be used"),
        ({"max_length": 256, "data__buckets": ()}, "max_length = 256 is more than the model's 128 positions"),
        ({"model__random": {**runs.MODEL, "vocab_size": 64}}, "the tokenizer has 260 tokens and the model only 64"),
        ({"model__random": None, "model__path": "someone/gated-model"}, "someone/gated-model.*HF_TOKEN"),
        ({"model__random": {**runs.MODEL, "hidden_act": "relu"}}, "relu"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_can_be_wrong_is_found_before_anything_is_compiled(tmp_path, monkeypatch, changes, message):
    def compiled(name, seconds, **_):
        if "backend_compile" in name:
            raise Compiled

    folder = tmp_path / "run"
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            runs.run(folder, **changes)
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    # Put right, the same folder is taken: nothing was begun in it.
    assert not (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists()


def test_the_first_line_says_what_a_step_holds(tmp_path, no_picture, capsys):
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "gradient_accumulation_steps": 2}
    runs.run(tmp_path / "run", **PLAIN, **mesh, data__eval__path=None, eval__every=None, steps=2, epochs=None)
    said = capsys.readouterr().err
    assert "a step: 8 pairs = 8 rows x 2 accumulation on 8 cpu (data 2 x fsdp 2 x tensor 2), 1 host(s)" in said


def test_dropped_rows_are_counted_and_listed(tmp_path, no_picture):
    rows = [*runs.rows(24), {"prompt": "x", "chosen": "same", "rejected": "same"}]
    values = runs.config(tmp_path / "run", **PLAIN, data__path=None, data__eval__path=None, eval__every=None, steps=2,
                         epochs=None)  # fmt: skip
    jaxalign.run(values, rows)
    (dropped,) = map(json.loads, (tmp_path / "run" / "dropped.jsonl").read_text().splitlines())
    assert dropped["row"] == 24 and "equal" in dropped["reason"]


@pytest.mark.slow
def test_a_profiler_trace_is_written_and_closed(tmp_path, no_picture):
    changes = {**PLAIN, "data__eval__path": None, "eval__every": None, "steps": 3, "epochs": None}
    runs.run(tmp_path / "run", **changes, log__profile_steps=(2, 3))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    jax.profiler.start_trace(str(tmp_path / "other"))  # which fails while another trace is open
    jax.profiler.stop_trace()


# ---- the command


def test_the_command_trains_tiny_and_leaves_what_it_names(tmp_path):
    canary = "hf_CanaryCanaryCanaryCanary00"
    environment = {**os.environ, "HF_TOKEN": canary, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxalign.train", "--config=configs/tiny.py", f"--config.workdir={tmp_path / 'run'}",
         "--config.steps=4", "--config.optim.warmup_steps=1", f"--config.data.cache_dir={tmp_path / 'cache'}",
         f"--config.compilation_cache={runs.COMPILED}"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said, folder = done.stderr, tmp_path / "run"
    assert done.returncode == 0, said
    assert done.stdout == "" and "PyTorch" not in said and "Traceback" not in said
    assert "step 4/4" in said and "tokens/s" in said and "log-prob accuracy" in said and "held out" in said
    assert f"curves {folder / 'curves.png'}" in said and f"model  {folder / 'export'}" in said
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "export" / "model.safetensors").stat().st_size > 1000
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert (
        len(written) > 20 and not any(canary.encode() in file.read_bytes() for file in written) and canary not in said
    )


def test_exit_codes_tell_mistakes_from_ends(tmp_path, command):
    changes = {**PLAIN, "data__eval__path": None, "eval__every": None, "steps": 2, "epochs": None}
    file = runs.save(tmp_path / "run", **changes)

    def ends(*arguments: str, before: str = "") -> tuple[int, str]:
        command.start(f"--config={file}", *arguments, before=before)
        return command.wait()

    code, said = ends("--config.optim.learning_rte=1")
    assert code == 2 and "did you mean 'optim.learning_rate'" in said
    code, said = ends("--config.data.path=nowhere.jsonl")
    assert code == 1 and "jaxalign: no data file 'nowhere.jsonl'" in said and "Traceback" not in said
    code, said = ends(before="build_run = train.build.Run\ntrain.build.Run = lambda *_: 1 / 0")
    assert code == 1 and "ZeroDivisionError" in said
    code, said = ends()
    assert code == 0 and "step 2/2" in said
    code, said = ends()
    assert code == 0 and "is finished: 2 steps are done" in said

    # What --print_config prints is a --config, and so is the run's own file: nothing changed.
    code, printed = ends("--print_config")
    assert code == 0
    (tmp_path / "printed.json").write_text(printed)
    for again in (tmp_path / "printed.json", tmp_path / "run" / "config.json"):
        assert config.diff(config.load(str(again)), config.load(str(file))) == []
        command.start(f"--config={again}")
        code, said = command.wait()
        assert code == 0 and "is finished" in said and "changed" not in said


@pytest.mark.slow
def test_the_second_start_reaches_its_first_step_in_a_third_of_the_time(tmp_path):
    def seconds(name: str) -> float:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxalign.train", "--config=configs/tiny.py", f"--config.workdir={tmp_path / name}",
             f"--config.data.cache_dir={tmp_path / 'data'}", f"--config.compilation_cache={tmp_path / 'compiled'}"],
            cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step 1/"):
                found = time.perf_counter() - began
        assert process.wait() == 0
        return found

    first, second = seconds("first"), seconds("second")
    assert second <= first / 3, (first, second)


@pytest.mark.slow
def test_what_the_untrained_policy_says_is_computed_once(tmp_path, monkeypatch):
    """Its log-probs are the reference's; its completions are kept beside them."""
    calls = []
    generate = evals.completions
    monkeypatch.setattr(evals, "completions", lambda run, params: calls.append("completions") or generate(run, params))
    settings = {"steps": 2, "epochs": None, "eval__every": 0, "checkpoint__every": 0, "data__cache_dir": str(tmp_path)}
    folders = [runs.run(tmp_path / name, **settings).folder for name in ("first", "second")]
    assert calls == ["completions"] * 3  # before and after, then only after
    runs.assert_same(*folders)
    runs.run(tmp_path / "shorter", **settings | {"samples__max_new_tokens": 3})
    assert len(calls) == 5
    monkeypatch.setattr(logprobs, "score", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the first step, not the evaluation before it, scores
        runs.run(tmp_path / "third", **settings)
    assert [row["step"] for row in metrics.read_completions(tmp_path / "third")] == [0, 0]


def test_out_of_memory_is_explained_with_preflights_table_and_a_setting(tmp_path, monkeypatch):
    def step(self, n, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory trying to allocate 17179869184 bytes.")

    monkeypatch.setattr(train.Training, "step", step)
    with pytest.raises(train.OutOfMemory) as caught:
        runs.run(tmp_path / "run", gradient_accumulation_steps=2)
    text = str(caught.value)
    for name in ("17.18 GB were asked for", "score", "train step", "arguments", "temporaries", "try --config."):
        assert name in text, text


def test_an_evaluation_that_says_nothing_is_never_the_best():
    stopping = SimpleNamespace(metric="eval_reward", mode="max")
    one = SimpleNamespace(progress=train.Progress(), config=SimpleNamespace(early_stopping=stopping))
    seen = []
    for value in (float("nan"), 1.0, float("nan"), 0.5, 2.0):
        one.progress.best, one.progress.evals_since_best = train.Training.patience(one, {"eval_reward": value})
        seen.append((one.progress.best, one.progress.evals_since_best))
    assert seen == [(None, 1), (1.0, 0), (1.0, 1), (1.0, 2), (2.0, 0)]
