"""Whole tiny runs of losses that learn from what the policy samples: a random model learns to write small letters."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from common import GOLDEN, load_tokenizer
from test_multiprocess import processes

from jaxalign import (
    build,
    checkpoint,
    config,
    decoding,
    diagnose,
    generate,
    hf,
    metrics,
    rollout,
    score,
    sharding,
    train,
    workload,
)
from jaxalign.rewards.model import RewardModel
from jaxalign.signals import Stopper

MINE = """
import json


def letters(prompts, completions, **columns):
    assert all(isinstance(text, str) for text in prompts)
    return [sum(letter.islower() for letter in text) / 8 for text in completions]


def own(prompts, completions, answer, *, least, **columns):
    \"\"\"Fails unless a column is that of the prompt's own row.\"\"\"
    assert [text.rstrip("?") for text in prompts] == answer
    return [None if int(right) % 3 == 0 else float(len(text) >= least) for right, text in zip(answer, completions)]


def calculator(generate, rows):
    \"\"\"Two turns: if the first holds a small letter, the calculator tells the sum, and the policy writes on.\"\"\"
    first = generate([row["prompt_ids"] for row in rows], max_new_tokens=3)
    calls = [any(letter.islower() for letter in generate.tokenizer.decode(ids)) for ids in first]
    told = [generate.tokenizer.encode(f"={2 * int(row['answer'])};", add_special_tokens=False) for row in rows]
    asked = [c for c, called in enumerate(calls) if called]
    second = generate([rows[c]["prompt_ids"] + first[c] + told[c] for c in asked], max_new_tokens=3)
    answers = dict(zip(asked, second))
    return [
        (first[c] + told[c] + answers[c], [True] * len(first[c]) + [False] * len(told[c]) + [True] * len(answers[c]))
        if c in answers
        else (first[c], [True] * len(first[c]))
        for c in range(len(rows))
    ]


def answered(completions, answer, **columns):
    \"\"\"What stands behind the calculator's result, in small letters.\"\"\"
    parts = [text.partition(f"={2 * int(right)};") for text, right in zip(completions, answer)]
    return [(bool(told) + sum(letter.islower() for letter in after) / 3) / 2 for _, told, after in parts]


def fails(prompts, completions, answer):
    if any(int(right) % 4 == 0 for right in answer):
        raise KeyError("no such thing")
    return [1.0 for _ in completions]


def asks(completions, solution):
    return [0.0 for _ in completions]
"""


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with prompts and rewards."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(20)]
    for name, part in (("train", rows[:16]), ("eval", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "mine.py").write_text(MINE)
    return folder


def settings(files: Path, *rewards: str, **changes):
    """A quick run of GRPO."""
    return {
        "epochs": None,
        "steps": 6,
        "batch_size": 16,
        "max_length": 16,
        "data__buckets": (16,),
        "data__path": str(files / "train.jsonl"),
        "data__eval__path": str(files / "eval.jsonl"),
        "loss__name": "grpo",
        "rollout__num_generations": 4,
        "rollout__max_completion_length": 8,
        "rollout__show_every": 2,
        "rewards__functions": tuple(f"{files}/mine.py:{name}" for name in rewards or ("letters",)),
        "optim__schedule": "constant",
        "optim__warmup_steps": 0,
        "optim__learning_rate": 1e-2,
        "eval__every": 100,
        "checkpoint__every": 0,
        "samples__prompts": 0,
        "samples__max_new_tokens": None,
        **changes,
    }


def several(files: Path, **changes):
    """Rollouts of two batches, each used twice, against a reference."""
    more = {"rollout__steps_per_generation": 2, "rollout__num_iterations": 2, "loss__beta": 0.05}
    more |= {"rewards__options": {"own": {"least": 8}}, "rewards__weights": (1.0, 0.5)}
    return settings(files, "letters", "own", **more, **changes)


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in runs.lines(folder) if "loss" in line]


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    """Six updates by two rollouts that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(tmp_path_factory.mktemp("whole") / "run", **several(files)).folder


def test_the_reward_rises_in_training_and_on_prompts_held_out(files, tmp_path):
    folder = runs.run(tmp_path / "run", **settings(files, steps=12)).folder
    rewards = column(folder, "reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    before, after = (line for line in runs.lines(folder) if "eval_reward" in line)
    assert after["eval_reward"] > before["eval_reward"] + 0.2


def test_metrics_have_trls_names_and_differ_from_rollout_to_rollout(whole):
    lines = metrics.read_metrics(whole)
    first = lines[1]
    assert list(first)[:4] == ["step", "loss", "reward", "reward_std"]
    assert {
        "frac_reward_zero_std",
        *(f"rewards/{name}/{what}" for name in ("letters", "own") for what in ("mean", "std", "error_rate")),
        *(f"completions/{what}_{kind}" for what in ("mean", "min", "max") for kind in ("length", "terminated_length")),
        "completions/clipped_ratio", "kl", "entropy", "sampling/sampling_logp_difference/max",
        "clip_ratio/region_mean", "time/generate", "time/reward", "time/score", "time/update",
    } <= first.keys()  # fmt: skip
    assert first["rewards/own/error_rate"] == 0  # each column was that of its own row
    rewards = column(whole, "reward")
    assert len(set(rewards[:4])) == 1 and rewards[4] == rewards[5] != rewards[0]
    assert ["time/generate" in line for line in lines[1:7]] == [True, False, False, False, True, False]
    assert max(column(whole, "sampling/sampling_logp_difference/max")[:1]) < 1e-4
    assert first["kl"] == 0 and column(whole, "kl")[3] > 0
    assert first["epoch"] == pytest.approx(1 / 8) and column(whole, "epoch")[-1] == pytest.approx(6 / 8)
    before = lines[0]
    assert {"eval_reward", "eval_reward_se", "eval_rewards/own/mean", "eval_completions/mean_length"} <= before.keys()


def test_a_reward_that_fails_costs_its_rows_and_stops_the_run_where_it_does_too_often(files, tmp_path):
    folder = runs.run(tmp_path / "run", **settings(files, "letters", "fails", steps=4, rollout__show_every=1)).folder
    rates = column(folder, "rewards/fails/error_rate")
    assert set(rates) <= {0, 0.25, 0.5} and sum(rates) == 1  # four of the sixteen prompts, and no others of theirs
    assert np.isfinite(column(folder, "loss")).all() and column(folder, "rewards/letters/error_rate") == [0] * 4
    for row in metrics.read_completions(folder):
        assert row["fails"] == (None if int(row["prompt"].rstrip("?")) % 4 == 0 else 1)
    changes = {"rewards__max_error_rate": 0.01, "eval__at_start": False}
    with pytest.raises(RuntimeError, match=r"(?s)reward fails failed on .*max_error_rate.*KeyError: 'no such thing'"):
        runs.run(tmp_path / "stopped", **settings(files, "letters", "fails", steps=4, **changes))


def test_a_reward_model_rewards_what_a_run_samples(files, tmp_path, monkeypatch):
    cfg, params = hf.load(GOLDEN / "models" / "llama" / "reward", head="score")
    judge = hf.save(tmp_path / "judge", cfg, params, tokenizer_from=load_tokenizer("llama"))
    asked, call = [], RewardModel.__call__
    monkeypatch.setattr(RewardModel, "__call__", lambda self, *texts: asked.append(texts) or call(self, *texts))
    name = f"model:{judge}"
    given = {"rewards__functions": (name,), "steps": 2, "rollout__show_every": 1}
    folder = runs.run(tmp_path / "run", **settings(files, **given)).folder
    prompts, completions, _ = [texts for texts in asked if len(texts[0]) == 16][-1]  # of the last rollout
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, completions, strict=True)]
    loaded = generate.load(str(judge), head="score")
    scores = [row["score"] for row in score.score(loaded.cfg, loaded.params, loaded.tokenizer, rows)]
    assert len(scores) == 16 and np.std(scores) > 1e-2
    assert column(folder, f"rewards/{name}/mean")[-1] == pytest.approx(np.mean(scores), abs=1e-5)
    shown = [row for row in metrics.read_completions(folder) if row["step"] == 2]
    at = [row["prompt"] for row in rows].index(shown[0]["prompt"])
    np.testing.assert_allclose([row[name] for row in shown], scores[at : at + 4], rtol=0, atol=1e-5)


def test_a_group_of_each_rollout_is_written_with_its_rewards_and_advantages(whole):
    rows = metrics.read_completions(whole)
    assert [row["step"] for row in rows] == [1] * 4 + [5] * 4
    for group in (rows[:4], rows[4:]):
        assert len({row["prompt"] for row in group}) == 1
        assert list(group[0]) == ["step", "prompt", "completion", "letters", "own", "advantage"]
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
        for row in group:
            assert row["letters"] == pytest.approx(sum(letter.islower() for letter in row["completion"]) / 8)
            assert (row["own"] is None) == (int(row["prompt"].rstrip("?")) % 3 == 0)


def test_stopped_within_and_between_rollouts_it_ends_in_the_same_bits(whole, files, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    for step in (3, 4, 5):
        monkeypatch.setattr(Stopper, "should_stop", lambda self, n, step=step: n == step)
        with pytest.raises(train.Preempted, match=f"stopped and saved after step {step} of"):
            runs.run(folder, **several(files))
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
    runs.run(folder, **several(files))
    runs.assert_same(folder, whole)


def test_force_goes_on_in_the_middle_of_a_rollout_of_another_shape(files, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(Stopper, "should_stop", lambda self, n: n == 3)
    with pytest.raises(train.Preempted):
        runs.run(folder, **several(files))
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
    fewer = {**several(files), "rewards__functions": (f"{files}/mine.py:letters",), "rewards__weights": ()}
    del fewer["rewards__options"]
    with pytest.raises(ValueError, match="go on with the new values by --resume=force"):
        runs.run(folder, **fewer)
    runs.run(folder, **fewer, resume="force")
    lines = [line for line in metrics.read_metrics(folder) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert "rewards/own/mean" in lines[2] and "rewards/own/mean" not in lines[3]
    assert "time/generate" in lines[3]  # a rollout of its own


@pytest.mark.slow
def test_a_users_function_of_two_turns_and_a_tool_trains(files, tmp_path, monkeypatch):
    masked = []
    batch = rollout.Rollouts.batch
    monkeypatch.setattr(rollout.Rollouts, "batch", lambda self, step: masked.append(self.rollout) or batch(self, step))
    changes = {"rollout__function": f"{files}/mine.py:calculator", "max_length": 24, "data__buckets": (24,)}
    folder = runs.run(tmp_path / "run", **settings(files, "answered", steps=16, **changes)).folder
    rewards = column(folder, "reward")
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    assert "sampling/sampling_logp_difference/max" not in runs.lines(folder)[1]
    told = 0
    for one in masked:
        for c in range(len(one)):
            ids, mask = one.sequence(c, 0)
            written, sampled = ids[one.prompt_lengths[c] :], mask[one.prompt_lengths[c] :]
            if len(written) > 3:
                number = f"={2 * int(one.prompts[c])};"
                end = 3 + len(number)
                assert "".join(chr(i - 4) for i in written[3:end]) == number  # the byte tokenizer's ids
                assert sampled.tolist() == [True] * 3 + [False] * len(number) + [True] * (len(written) - end)
                told += 1
    assert told > 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards__functions": ("nowhere.reward",)}, "nowhere.reward"),
        ({"rewards__functions": ("FILES/mine.py:asks",)}, "solution"),
        ({"rollout__function": "FILES/mine.py:nothing"}, "has no function 'nothing'"),
        ({"rollout__num_generations": 3}, "no whole groups of rollout.num_generations = 3"),
        ({"rollout__max_completion_length": 16}, "has no room for 1 prompt tokens"),
        ({"rewards__functions": ()}, "rewards.functions is missing"),
        ({"rewards__weights": (1.0, 2.0)}, "rewards.weights has 2 numbers for the 1"),
        ({"rewards__clip_range": (1.0, 0.0)}, "rewards.clip_range: got .1.0, 0.0., expected .lowest, highest."),
        ({"rewards__normalize_advantages": True}, "divides by a standard deviation of its own"),
    ],
)
def test_what_can_be_wrong_is_found_before_anything_is_compiled(files, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train.Training, "__enter__", lambda self: 1 / 0)
    here = {
        name: value.replace("FILES", str(files)) if isinstance(value, str) else
        tuple(x.replace("FILES", str(files)) for x in value) if value and isinstance(value, tuple) and
        isinstance(value[0], str) else value
        for name, value in changes.items()
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        runs.run(tmp_path / "run", **settings(files, **here))


STOP = """
from jaxalign import sampling
real, calls = sampling.sample, []
def sample(*args, **options):
    calls.append(1)
    if len(calls) == NUMBER: kill(), time.sleep(60)
    return real(*args, **options)
sampling.sample = sample
"""


@pytest.mark.slow
def test_sigterm_during_a_generation_saves_exits_75_and_goes_on_where_it_was(whole, files, tmp_path):
    folder = tmp_path / "run"
    config_file = runs.save(folder, **several(files))
    with runs.commands() as command:
        for number, saved in ((2, []), (3, [4])):  # the first is the evaluation's
            command.start(f"--config={config_file}", before=STOP.replace("NUMBER", str(number)))
            code, said = command.wait()
            assert code == 75 and "SIGTERM during generation" in said, said
            assert checkpoint.list_steps(folder / "checkpoints") == saved
        command.start(f"--config={config_file}")
        assert command.wait()[0] == 0
    runs.assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": "on", "data__buckets": None, "data__packed_length": 32},
        {"gradient_accumulation_steps": 2, "mesh__data": 4, "mesh__tensor": 2},
        {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "mesh__sequence": 2},
    ],
    ids=["packed", "accumulation and tensor", "fsdp, tensor and sequence"],
)
def test_layouts_learn_the_same(whole, files, tmp_path, changes):
    folder = runs.run(tmp_path / "run", **several(files, steps=5, **changes)).folder
    for name in ("reward", "loss", "kl", "entropy", "grad_norm"):
        np.testing.assert_allclose(column(folder, name), column(whole, name)[:5], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "gspo", "rloo", "reinforce_pp"])
def test_other_losses_and_adapters_resume_in_the_same_bits(files, tmp_path, loss):
    more = {"steps": 4, "loss__name": loss, "lora__rank": 4, "rollout__resample": 2 if loss == "dapo" else 0}
    changes = {**several(files), **more, "eval__every": 0}
    one = runs.run(tmp_path / "one", **changes).folder
    runs.run(tmp_path / "two", **{**changes, "steps": 3})
    runs.run(tmp_path / "two", **changes)
    assert runs.leaves(tmp_path / "two") == runs.leaves(one)
    assert np.isfinite(column(one, "loss")).all() and len(set(column(one, "loss"))) > 1


@pytest.mark.slow
def test_a_step_that_is_not_finite_names_its_prompts(files, tmp_path, monkeypatch):
    combine = rollout.advantages.combine

    def broken(*arguments, **options):
        found, sums = combine(*arguments, **options)
        return found * np.nan, sums

    monkeypatch.setattr(rollout.advantages, "combine", broken)
    with pytest.raises(diagnose.NonFinite, match="step_1.json has each row's loss and text"):
        runs.run(tmp_path / "run", **settings(files))
    report = json.loads((tmp_path / "run" / "nonfinite" / "step_1.json").read_text())
    assert len(report["rows"]) == 16 and len({row["text"]["answer"] for row in report["rows"]}) == 4


@pytest.mark.slow
def test_two_processes_reward_their_own_rows_and_learn_what_one_does(whole, files, tmp_path, monkeypatch):
    seen = """
import builtins, json, os
from jaxalign.rewards import scores
call = scores.Rewards.__call__
def counted(self, prompts, *args, **options):
    with open(os.environ["TOLD"] + os.environ["JAX_PROCESS_ID"], "a") as file:
        file.write(json.dumps(prompts) + "\\n")
    return call(self, prompts, *args, **options)
scores.Rewards.__call__ = counted
"""
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    for steps in (3, 6):  # the second start takes up the rollout in use
        found = processes(runs.save(tmp_path / "two", **several(files, steps=steps)), before=seen)
        assert [code for code, _, _ in found] == [0, 0], "".join(errors for _, _, errors in found)
    ours = [[json.loads(line) for line in open(f"{tmp_path}/told{process}")] for process in range(2)]
    for first, second in zip(*ours, strict=True):
        assert len(first) == len(second) and not set(first) & set(second)
    for name in ("reward", "loss", "kl", "rewards/own/mean"):
        np.testing.assert_allclose(column(tmp_path / "two", name), column(whole, name), rtol=2e-3, atol=2e-4)
    rows = [{**row, "advantage": round(row["advantage"], 3)} for row in metrics.read_completions(tmp_path / "two")]
    assert rows == [{**row, "advantage": round(row["advantage"], 3)} for row in metrics.read_completions(whole)]


def test_preflight_compiles_what_a_run_calls(files, tmp_path, monkeypatch):
    values = config.validate(runs.config(tmp_path / "run", **several(files)))
    mesh = sharding.make_mesh(data=8)
    described = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    with sharding.use_mesh(mesh), contextlib.closing(build.Run(values, mesh, build.load_data(values, None))) as run:
        jobs = {job.name: job for job in workload.jobs(run)}
        assert list(jobs) == ["score", "score policy", "train step", "prefill", "decode"]
        one = rollout.Rollout.empty(32, 16, 2)
        run.rollouts.rollout = dataclasses.replace(one, number=np.int32(0), lengths=one.lengths + 16)
        assert described(jobs["train step"].arguments[2]) == described(run.place(run.rollouts.batch(0)))
        asked, read = {}, decoding.prefill
        monkeypatch.setattr(decoding, "prefill", lambda *a: asked.update(prefill=a[1:]) or read(*a))
        monkeypatch.setattr(decoding, "segment", lambda *a, **k: asked.update(decode=a[1:]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.rollouts(4, run.whole(run.new_state().params))
    for name, arguments in asked.items():  # prompts are as long as the data's, not as they may be
        assert jax.tree.structure(arguments) == jax.tree.structure(jobs[name].arguments)
        assert len(arguments[1 if name == "prefill" else 2]) == jobs[name].rows[0]
