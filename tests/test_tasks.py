"""Tasks: what sampled answers come to, and the command that makes them."""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from common import load_tokenizer, model, policy

from jaxalign import evaluate, evaluate_task, generate, metrics, tasks
from jaxalign.data.sources import prepare
from jaxalign.data.tokenizers import byte_tokenizer

# ---- what answers come to


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for n, k in ((1, 1), (4, 1), (5, 3), (6, 6), (7, 2)):
        right = np.array([[j < c for j in range(n)] for c in range(n + 1)])
        draws = [[row[list(chosen)].any() for chosen in itertools.combinations(range(n), k)] for row in right]
        np.testing.assert_allclose(tasks.pass_at_k(right, k), np.mean(draws, axis=1), atol=1e-12)
    many = np.zeros((1, 2000), bool)
    many[0, :3] = True
    assert tasks.pass_at_k(many, 1000)[0] == pytest.approx(1 - math.prod((1000 - i) / (2000 - i) for i in range(3)))
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"pass@{k} of 4 answers"):
            tasks.pass_at_k(np.zeros((2, 4), bool), k)


def test_one_answer_a_prompt_has_an_accuracy_with_wilsons_interval():
    values = np.array([[1.0], [0.0], [1.0], [0.5], [2.0]])
    found = tasks.summary(values)
    low, high = metrics.wilson(3, 5)
    assert found["accuracy"] == pytest.approx(0.6)
    assert [found["accuracy_low"], found["accuracy_high"]] == pytest.approx([low, high])
    assert found["accuracy_se"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    mean, error = metrics.mean_se([1, 0, 1, 0.5, 2])
    assert [found["reward"], found["reward_se"]] == pytest.approx([mean, error])
    interval = [mean - metrics.Z * error, mean + metrics.Z * error]
    assert [found["reward_low"], found["reward_high"]] == pytest.approx(interval)
    assert (found["prompts"], found["error_rate"]) == (5, 0)
    assert tasks.summary(values, threshold=0.5)["accuracy"] == pytest.approx(0.8)
    assert not any("@" in name for name in found)


def test_several_answers_have_means_and_pass_at_k():
    values = np.array([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1.0]])
    found = tasks.summary(values, name="gsm8k")
    names = ["mean@6", "pass@2", "pass@4", "pass@6", "reward"]
    ends = ("", "_se", "_low", "_high")
    expected = ["gsm8k/prompts", "gsm8k/error_rate", *(f"gsm8k/{name}{end}" for name in names for end in ends)]
    assert list(found) == expected
    assert found["gsm8k/mean@6"] == pytest.approx(8 / 18)
    for k in (2, 4, 6):
        assert found[f"gsm8k/pass@{k}"] == pytest.approx(tasks.pass_at_k(values > 0, k).mean())
    # Of all six answers: a share of prompts.
    assert [found["gsm8k/pass@6_low"], found["gsm8k/pass@6_high"]] == pytest.approx(metrics.wilson(2, 3))
    assert found["gsm8k/mean@6_low"] < found["gsm8k/mean@6"] < found["gsm8k/mean@6_high"]


def test_prompts_without_a_reward_are_left_out_and_failures_are_wrong():
    nan = math.nan
    values = np.array([[1.0, nan], [nan, nan], [nan, nan], [0.0, 1.0]])
    failed = np.array([[False, False], [False, False], [True, True], [False, False]])
    found = tasks.summary(values, failed)
    assert found["prompts"] == 3 and found["error_rate"] == 0.25
    assert found["mean@2"] == pytest.approx((0.5 + 0 + 0.5) / 3) and found["pass@2"] == pytest.approx(2 / 3)
    assert found["reward"] == pytest.approx((1 + 0.5) / 2)
    nothing = tasks.summary(np.full((3, 1), nan))
    assert nothing["prompts"] == 0 and math.isnan(nothing["accuracy"]) and math.isnan(nothing["reward_low"])
    one = tasks.summary(np.ones((1, 1)))
    assert one["accuracy"] == 1 and one["accuracy_low"] == pytest.approx(metrics.wilson(1, 1)[0])


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_intervals_hold_the_truth_as_often_as_they_say(k):
    rng = np.random.default_rng(k)
    hits, runs = 0, 400
    for _ in range(runs):
        share_P = rng.beta(0.4, 0.8, 120)  # prompts are easy or hard
        found = tasks.summary((rng.random((120, 8)) < share_P[:, None]).astype(float))
        name = "mean@8" if k == 1 else f"pass@{k}"
        # The expectation over prompts of 1 - (1 - p)^k.
        truth = 1 - math.exp(math.lgamma(0.8 + k) - math.lgamma(0.8) + math.lgamma(1.2) - math.lgamma(1.2 + k))
        hits += found[f"{name}_low"] <= truth <= found[f"{name}_high"]
    assert 0.915 < hits / runs < 0.985


# ---- answers


class Actor:
    """Answers a prompt with its number, as often as it has been asked; rewards are what the row says."""

    slots = 2

    def __init__(self):
        self.asked = []

    def sample(self, params, prepared, places, seed, *, n, temperature):
        self.asked.append((list(places), seed, n, temperature))
        tokens = [np.full(1 + j, place, np.int32) for place in places for j in range(n)]
        texts = [f"{place}.{j}" for place in places for j in range(n)]
        return SimpleNamespace(tokens=tokens, texts=texts, ended=np.array([len(ids) < 3 for ids in tokens]))

    def reward(self, prepared, places, sampled):
        size = len(sampled.texts)
        values = np.array([[prepared.text(int(text.split(".")[0]))["answer"], np.nan] for text in sampled.texts])
        return values.astype(np.float32), np.zeros((size, 2), bool)


def test_answers_keep_their_prompts_and_are_told_of_on_the_way(tmp_path):
    rows = [{"prompt": f"a {i}", "answer": i} for i in range(7)]
    prepared = prepare(rows, tokenizer=byte_tokenizer(), max_length=32, kind="prompts", cache_dir=tmp_path)
    actor, told = Actor(), []
    found = tasks.answer(actor, None, prepared, n=3, temperature=0.5, seed=4, tell=told.append)
    assert [part.places.tolist() for part in told] == [[0, 1], [2, 3], [4, 5], [6]]
    assert all(given[2:] == (3, 0.5) for given in actor.asked) and len({seed for _, seed, *_ in actor.asked}) == 4
    assert found.places.tolist() == list(range(7)) and found.rewards.shape == found.failed.shape == (7, 3, 2)
    assert found.tokens.tolist() == [[1, 2, 3]] * 7 and found.finished.tolist() == [[True, True, False]] * 7
    assert (found.rewards[:, :, 0] == np.arange(7)[:, None]).all()
    lines = list(tasks.records(found, prepared, ("right", "other")))
    assert len(lines) == 21 and lines[16] == {
        "answer": 5,
        "prompt": "a 5",
        "completion": "5.1",
        "sample": 1,
        "right": 5.0,
        "other": None,
        "tokens": 2,
        "finished": True,
    }
    assert [line for part in told for line in tasks.records(part, prepared, ("right", "other"))] == lines
    json.dumps(lines)
    again = Actor()
    tasks.answer(again, None, prepared, n=3, temperature=0.5, seed=4)
    assert again.asked == actor.asked
    tasks.answer(again, None, prepared, n=3, temperature=0.5, seed=5)
    assert not {seed for _, seed, *_ in again.asked[4:]} & {seed for _, seed, *_ in actor.asked}


# ---- the command

OWN = """
def ask(cfg, **kwargs):
    def row_function(row):
        if row["n"] == 3:
            return None
        return {"prompt": [{"role": "user", "content": f"cloud {row['n']} teach"}]}
    return row_function, {"remove_columns": ["level"]}

def has_letter(prompts, completions, letter, **columns):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts) and "level" not in columns
    said = [completion[0]["content"] for completion in completions]
    return [None if one is None else float(one in text) for one, text in zip(letter, said)]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A folder, here, with 9 rows, one of which is left out, and functions of the user's."""
    rows = [{"n": n, "letter": None if n == 5 else "aeiou"[n % 5], "level": 1} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return ["evaluate", f"--model={policy('qwen3')}", "--task=rows.jsonl", "--reward=own.has_letter"]


def test_the_command_answers_a_task_and_judges_it(task, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    options = ["--format=own.ask", "--n=3", "--max_new_tokens=12", "--slots=8", "--completions=out.jsonl", "--json"]
    evaluate.main([*task, *options, "--reward=own.has_letter,length", '--reward_options={"length": {"target": 12}}'])
    found = json.loads(capsys.readouterr().out)
    assert "1 greedy answers a prompt: 8 of 8 prompts" in caplog.text and "3 sampled answers" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 8 * (1 + 3) and [line["n"] for line in lines[:8]] == [0, 1, 2, 4, 5, 6, 7, 8]
    greedy, sampled = lines[:8], [lines[8 + 3 * p : 11 + 3 * p] for p in range(8)]
    assert {line["temperature"] for line in greedy} == {0.0}
    cfg, params = model("qwen3")
    prompts = [line["prompt"] for line in greedy]
    said = generate.complete(cfg, params, load_tokenizer("qwen3"), prompts, max_new_tokens=12)
    assert [line["completion"] for line in greedy] == said
    for line in lines:
        right = None if line["letter"] is None else float(line["letter"] in line["completion"])
        assert line["has_letter"] == right and line["length"] == pytest.approx(line["tokens"] / 12)
        assert line["finished"] or line["tokens"] == 12
        assert line["prompt"][-1]["content"] == f"cloud {line['n']} teach"

    asked = [p for p in range(8) if greedy[p]["letter"] is not None]
    assert found["dropped"] == 1 and found["has_letter/prompts"] == len(asked) == 7 and found["length/prompts"] == 8
    assert found["has_letter/accuracy"] == pytest.approx(np.mean([greedy[p]["has_letter"] for p in asked]))
    rewards = np.array([[line["has_letter"] for line in sampled[p]] for p in asked])
    assert found["has_letter/mean@3"] == found["has_letter/reward"] == pytest.approx(rewards.mean())
    assert found["has_letter/pass@3"] == pytest.approx(rewards.any(axis=1).mean())
    lengths = [line["tokens"] for line in lines[8:]]
    assert found["completions/mean_length"] == pytest.approx(np.mean(lengths))
    assert len({line["completion"] for line in lines[8:]}) > 8  # they were drawn


def test_flags_reach_what_they_are_for_and_one_answer_is_greedy(task, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(evaluate_task, "evaluate_task", lambda *args, **options: given.update(options) or {"a": 0.0})
    flags = (
        "--adapter=a --step=7 --format=f --max_rows=3 --n=4 --temperature=0.5 --max_new_tokens=9 --stop=x --stop=y "
        "--threshold=0.5 --seed=2 --slots=6 --tensor=2 --top_k=5 --top_p=0.9 --split=test --name=main"
    )
    evaluate.main([*task, *flags.split()])
    del given["say"]
    assert given == {
        "adapter": "a", "step": "7", "format": "f", "max_rows": 3, "n": 4, "temperature": 0.5, "max_new_tokens": 9,
        "stop": ["x", "y"], "threshold": 0.5, "seed": 2, "slots": 6, "tensor": 2, "completions": None,
        "limits": {"top_k": 5, "top_p": 0.9}, "reward_options": None, "split": "test", "name": "main",
    }  # fmt: skip
    evaluate.main([*task, "--step=last"])
    assert given["step"] is None and given["temperature"] is None and given["n"] == 1
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--config=simpo"], 2, "--config has no place beside --task, which takes adapter, completions, format"),
        (["--config.max_length=9"], 2, "--config.max_length=9 has no place beside --task"),
        (["--reference=a"], 2, "--reference has no place"),
        (["--reward="], 1, "--task goes with --model=PATH and --reward"),
        (["--n=4", "--temperature=0"], 1, "n=4 greedy answers to a prompt are all equal"),
        (["--completions=no/where.jsonl"], 1, "its folder does not exist"),
        (["--reward_options={"], 1, "--reward_options={ is not JSON"),
        (["--task="], 2, "goes with --task"),
    ],
)
def test_what_does_not_go_together_is_said(task, capsys, arguments, status, message):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*task, *arguments])
    assert stop.value.code == status and message in capsys.readouterr().err


def test_a_reward_without_its_column_is_refused_before_anything_is_sampled(task, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*task, "--reward=gsm8k", "--format=own.ask"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "gsm8k" in said and "answer" in said and "answers a prompt" not in said


@pytest.mark.slow
def test_two_processes_say_what_one_does(task, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def flags(devices):
        return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"

    options = ["--format=own.ask", "--n=2", "--max_new_tokens=8", "--slots=4", "--json"]
    words = [sys.executable, "-m", "jaxalign.evaluate", *task[1:], *options]
    one = subprocess.run(
        [*words, "--completions=one.jsonl"], env={**os.environ, "XLA_FLAGS": flags(4)}, capture_output=True, text=True
    )
    shared = {**os.environ, "XLA_FLAGS": flags(2), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [*words, "--completions=two.jsonl"],
            env={**shared, "JAX_PROCESS_ID": n},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in "01"
    ]
    try:
        (first, errors), (second, _) = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert json.loads(first.splitlines()[-1]) == json.loads(one.stdout) and "accuracy" not in second
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
