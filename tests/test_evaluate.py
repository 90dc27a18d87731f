"""`python -m jaxalign.evaluate` says of a model what training said of the same weights."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from common import GOLDEN, policy

from jaxalign import config as config_lib
from jaxalign import evals, evaluate, hf, metrics, models, sampling, score
from jaxalign.data import chat

LLAMA, REWARD = policy("llama"), GOLDEN / "models" / "llama" / "reward"
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: 8 steps, evaluations of 9 pairs at 0, 3, 6 and 8, checkpoints of 6 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(tmp_path_factory.mktemp("evaluate") / "run", **MESH).folder


def logged(folder, step):
    """What training logged of its evaluation after a step."""
    (line,) = [line for line in runs.lines(folder) if line["step"] == step and "eval_loss" in line]
    return {name: value for name, value in line.items() if name.startswith("eval_")}


@pytest.mark.parametrize("step", [6, "last"])
def test_a_run_folder_has_the_numbers_that_training_logged(run, step):
    config = config_lib.load(str(run / "config.json"))
    found = evaluate.evaluate(str(run), config, step=step)
    want = logged(run, 8 if step == "last" else step)
    assert len(want) > 10 and {name: found[name] for name in want} == want


def test_an_exported_folder_has_them_too_on_another_mesh_without_a_cached_reference(run, tmp_path):
    config = config_lib.load(str(run / "config.json"), ["mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1"])
    config.data.cache_dir = str(tmp_path)
    want = logged(run, 8)
    with pytest.raises(ValueError, match="random weights, which are no reference for another model"):
        evaluate.evaluate(str(run / "export"), config)
    found = evaluate.evaluate(str(run / "export"), config, reference=str(run / "export"))
    for name in ("eval_logps/chosen", "eval_logps/rejected", "eval_logps/accuracies"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)
    assert abs(found["eval_rewards/margins"]) < 1e-5 and abs(found["eval_loss"] - math.log(2)) < 1e-5
    assert found["eval_perplexity/chosen"] > 1


def test_the_command_takes_other_pairs_and_cuts_them_to_eval_max_rows(run, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in runs.rows(9, start=100)))
    out = tmp_path / "found.json"
    command(f"--model={run}", f"--data={file}", "--step=6", f"--out={out}", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(out.read_text()) and record["model"] == str(run) and record["eval_examples"] == 9
    for name, value in logged(run, 6).items():
        np.testing.assert_allclose(record[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    command(f"--model={run}", f"--data={file}", "--config.eval.max_rows=4")
    said = capsys.readouterr().out
    assert said.startswith("4 examples, loss") and "perplexity/rejected" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model=/nowhere", "--config={run}/config.json"), "random weights, which are no reference"),
        (("--model=/nowhere", "--config={run}/config.json", "--reference={run}/export"), "'/nowhere' does not exist"),
        (("--model={run}", "--step=5"), "no checkpoint '5'"),
        (("--config={run}/config.json",), "--model is missing"),
        (("--model={run}", "--config.data.eval.path=none", "--config.eval.every=100"), "no evaluation rows"),
    ],
)
def test_what_is_not_there_is_said(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(*(argument.format(run=run) for argument in arguments))
    assert stopped.value.code in (1, 2) and message in capsys.readouterr().err


def test_perplexity_is_the_exponential_of_the_mean_nll_and_its_interval_that_of_a_ratio():
    def perplexity(nlls, tokens):
        return tuple(evals.perplexity("p", *evals.token_mean(nlls, tokens)).values())

    value, low, high = perplexity(np.array([2.0, 6.0, 1.0]), np.array([2.0, 3.0, 1.0]))
    assert value == pytest.approx(math.exp(9 / 6))
    # residuals of the NLLs 2, 6, 1 from 1.5 a token: -1, 1.5, -0.5
    error = math.sqrt((1 + 2.25 + 0.25) * 3 / 2) / 6
    assert (low, high) == pytest.approx((math.exp(1.5 - 1.959964 * error), math.exp(1.5 + 1.959964 * error)))
    # Over many draws the interval holds the truth about as often as it says.
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        lengths = random.integers(5, 50, 100)
        nlls = lengths * random.normal(2.0, 0.3, 100)
        _, low, high = perplexity(nlls, lengths)
        hits += low < math.exp(2.0) < high
    assert 0.92 < hits / 400 < 0.98


def test_auc_counts_all_pairs_and_its_error_is_that_of_many_draws():
    random = np.random.default_rng(0)
    larger, smaller = random.integers(0, 6, 30), random.integers(0, 5, 20)  # with ties
    wins = (larger[:, None] > smaller) + 0.5 * (larger[:, None] == smaller)
    assert evaluate.auc(larger, smaller)[0] == pytest.approx(wins.mean())
    found = [evaluate.auc(random.normal(1, 1, 40), random.normal(0, 1, 60)) for _ in range(400)]
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.760, abs=0.01)  # Phi(1 / sqrt 2)
    assert errors.mean() == pytest.approx(values.std(), rel=0.1)
    assert math.isnan(evaluate.auc(larger, smaller[:0])[0]) and math.isnan(evaluate.auc(larger, smaller[:1])[1])


def test_the_correlations_interval_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        x, y = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 50).T
        found = evaluate.correlation("r", x, y)
        assert found["r"] == pytest.approx(np.corrcoef(x, y)[0, 1]) and found["r_low"] < found["r"] < found["r_high"]
        hits += found["r_low"] < 0.6 < found["r_high"]
    assert 0.92 < hits / 400 < 0.98
    assert all(map(math.isnan, evaluate.correlation("r", x, np.ones(50)).values()))
    assert evaluate.correlation("r", x, 2 * x)["r"] == pytest.approx(1)


def test_means_get_intervals_and_shares_standard_errors():
    given = {"eval_examples": 25.0, "eval_a": 1.0, "eval_a_se": 0.5, "eval_accuracy": 0.2, "eval_accuracy_low": 0.1}
    found = evaluate.with_intervals(given)
    assert (found["eval_a_low"], found["eval_a_high"]) == pytest.approx((1 - 0.979982, 1 + 0.979982))
    assert found["eval_accuracy_se"] == pytest.approx(0.08)
    assert "+- 0.0800 [0.1000" in evaluate.show({"eval_loss": 1.0, "eval_accuracy_high": 0.3, **found})


# Other objectives than preferences, none of them trained


def of_kind(tmp_path, loss, rows, **changes):
    """The config of an evaluation of rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data__eval__path": str(file), "loss__name": loss, "model__random": None, "model__path": str(LLAMA)}
    keys |= {"tokenizer__path": None, "data__buckets": None, "max_length": 64, "mesh__data": 2, "mesh__fsdp": 4}
    keys |= {"samples__prompts": None, "samples__max_new_tokens": None}
    return config_lib.validate(runs.config(tmp_path / "run", **{**keys, **changes}))


def test_perplexity_of_responses(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in runs.rows(11)]
    found = evaluate.evaluate(str(LLAMA), of_kind(tmp_path, "sft", rows))
    cfg, params = hf.load(LLAMA)
    tokenizer = hf.load_tokenizer(LLAMA)
    nll, tokens = 0.0, 0
    logits = jax.jit(lambda ids: models.unembed(cfg, params, models.apply(cfg, params, ids, jnp.arange(64)[None])[0]))
    for row in rows:
        prompt = chat.encode_prompt(tokenizer, row["prompt"])
        ids = chat.encode_prompt(tokenizer, row["prompt"] + row["completion"] + tokenizer.eos_token)
        border = next((n for n, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(prompt))
        padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
        logps = jax.nn.log_softmax(logits(padded)[0])[np.arange(len(ids) - 1), np.array(ids[1:])]
        nll, tokens = nll - float(logps[border - 1 :].sum()), tokens + len(ids) - border
    assert found["eval_tokens"] == tokens and found["eval_examples"] == 11
    assert found["eval_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert found["eval_perplexity_low"] < found["eval_perplexity"] < found["eval_perplexity_high"]
    assert 0 <= found["eval_mean_token_accuracy"] < 1 and found["eval_mean_token_accuracy_se"] >= 0


def test_answers_of_the_data_are_compared_with_the_models_own(tmp_path):
    """Against log-probs of a forward pass over the same samples; the shift is theirs less the data's."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in runs.rows(6)]
    config = of_kind(tmp_path, "sft", rows)
    found = evaluate.evaluate(str(LLAMA), config, own=4)
    assert found["eval_logps/data_per_token"] == pytest.approx(-found["eval_loss"], rel=1e-5)
    cfg, params = hf.load(LLAMA)
    tokenizer = hf.load_tokenizer(LLAMA)
    prompts = [chat.encode_prompt(tokenizer, row["prompt"]) for row in rows[:4]]
    samples = sampling.sample(
        cfg,
        params,
        prompts,
        sampling.request_keys(config.seed, np.arange(4)),
        sampling.make_limits(4, max_new=[64 - len(ids) for ids in prompts], stop_ids=hf.stop_ids(cfg, tokenizer)),
        max_new_tokens=64,
    )
    total = 0.0
    logits = jax.jit(lambda ids: models.unembed(cfg, params, models.apply(cfg, params, ids, jnp.arange(64)[None])[0]))
    for ids, new, mask in zip(prompts, samples.tokens, samples.mask, strict=True):
        whole = [*ids, *new[mask]]
        logps = jax.nn.log_softmax(logits(jnp.zeros((1, 64), jnp.int32).at[0, : len(whole)].set(jnp.array(whole)))[0])
        total += float(logps[np.arange(len(ids) - 1, len(whole) - 1), new[mask]].sum())
    want = total / samples.mask.sum()
    assert found["eval_logps/own_per_token"] == pytest.approx(want, rel=1e-4)
    assert found["eval_shift"] == pytest.approx(want + found["eval_loss"], rel=1e-4)
    assert found["eval_shift_low"] < found["eval_shift"] < found["eval_shift_high"]
    with pytest.raises(ValueError, match="--own=4: the rows of the loss 'reward' hold no answers"):
        evaluate.evaluate(str(REWARD), of_kind(tmp_path, "reward", runs.rows(3)), own=4)


def test_accuracy_of_a_reward_model(tmp_path):
    cfg, params = hf.load(REWARD, head="score")
    model = hf.save(tmp_path / "model", cfg, params, tokenizer_from=LLAMA)
    rows = runs.rows(9)
    found = evaluate.evaluate(str(model), of_kind(tmp_path, "reward", rows))
    scored = list(score.score(cfg, params, hf.load_tokenizer(LLAMA), rows))
    margins = np.array([row["score_chosen"] - row["score_rejected"] for row in scored])
    assert found["eval_accuracy"] == pytest.approx((margins > 0).mean())
    assert found["eval_accuracy_low"] < found["eval_accuracy"] < found["eval_accuracy_high"]
    assert found["eval_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert found["eval_margin_low"] == pytest.approx(margins.mean() - 1.959964 * found["eval_margin_se"], abs=1e-5)
    assert found["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)


def test_error_and_correlation_of_attributes_one_by_one(tmp_path):
    random = np.random.default_rng(0)
    names = ("help", "harm")
    cfg = dataclasses.replace(hf.read_config(LLAMA), num_labels=2, labels=names)
    cfg, params = hf.load(LLAMA, cfg, head="score")
    model = hf.save(tmp_path / "model", cfg, params, tokenizer_from=LLAMA)
    given = random.normal(size=(10, 2)).round(2)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], **dict(zip(names, values, strict=True))}
        for row, values in zip(runs.rows(10), given.tolist(), strict=True)
    ]
    changes = {"data__score_columns": names, "loss__reward_weights": (1.0, -1.0)}
    found = evaluate.evaluate(str(model), of_kind(tmp_path, "attributes", rows, **changes))
    scored = [list(row["scores"].values()) for row in score.score(cfg, params, hf.load_tokenizer(LLAMA), rows)]
    for k, name in enumerate(names):
        values = np.array(scored)[:, k]
        assert found[f"eval_mse/{name}"] == pytest.approx(np.square(values - given[:, k]).mean(), rel=1e-4)
        assert found[f"eval_correlation/{name}"] == pytest.approx(np.corrcoef(values, given[:, k])[0, 1], abs=1e-3)
        assert found[f"eval_mse/{name}_low"] < found[f"eval_mse/{name}"] < found[f"eval_mse/{name}_high"]
    assert found["eval_rewards"] == pytest.approx((np.array(scored) @ [1, -1]).mean(), abs=1e-4)


@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_labelled_responses(tmp_path, loss):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in runs.rows(4)
        for side in ("chosen", "rejected")
    ]
    other = LLAMA.parent / "ref"
    config = of_kind(tmp_path, loss, rows)
    found = evaluate.evaluate(str(LLAMA), config, reference=str(other))
    same = evaluate.evaluate(str(LLAMA), config, reference=str(LLAMA))
    assert found["eval_examples"] == 8 and 0 <= found["eval_rewards/auc"] <= 1
    assert abs(same["eval_rewards/margins"]) < 1e-5 < abs(found["eval_rewards/margins"])
    for side in ("chosen", "rejected"):
        assert found[f"eval_perplexity/{side}"] == pytest.approx(same[f"eval_perplexity/{side}"], rel=1e-5)
        assert found[f"eval_perplexity/{side}_low"] < found[f"eval_perplexity/{side}"]
    assert found["eval_rewards/margins_low"] < found["eval_rewards/margins"] < found["eval_rewards/margins_high"]


@pytest.mark.slow
def test_two_processes_say_what_one_does(run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    shared = {**os.environ, "XLA_FLAGS": flags, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    words = [sys.executable, "-m", "jaxalign.evaluate", f"--model={run}", "--step=6", "--json"]
    processes = [
        subprocess.Popen(
            words, env={**shared, "JAX_PROCESS_ID": n}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in "01"
    ]
    try:
        (first, errors), (second, _) = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert "eval_loss" not in second  # the first speaks for both
    found = json.loads(first.splitlines()[-1])  # Gloo prints too
    for name, value in logged(run, 6).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_run_that_samples_is_measured_by_its_rewards(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def letters(completions, answer, **columns):\n"
        "    lower = [sum(map(str.islower, text)) / 8 for text in completions]\n"
        "    return [None if one == '3' else share for share, one in zip(lower, answer)]\n"
    )
    changes = {"data__path": tmp_path / "rows.jsonl", "data__eval__path": tmp_path / "rows.jsonl"}
    folder = runs.run(
        tmp_path / "run",
        **{key: str(value) for key, value in changes.items()},
        epochs=None,
        steps=2,
        batch_size=8,
        max_length=16,
        data__buckets=(16,),
        loss__name="grpo",
        rollout__num_generations=4,
        rollout__max_completion_length=8,
        rewards__functions=(f"{tmp_path}/own.py:letters",),
        samples__prompts=0,
        samples__max_new_tokens=None,
    ).folder
    logged = [line for line in runs.lines(folder) if "eval_reward" in line][-1]
    found = evaluate.evaluate(str(folder), config_lib.load(str(folder / "config.json")))
    assert found.items() >= {name: value for name, value in logged.items() if name.startswith("eval_")}.items()
    assert found["eval_reward_low"] < found["eval_reward"] == found["eval_rewards/letters/mean"]
    assert "reward " in evaluate.show(found)


def command(*arguments):
    evaluate.main(["evaluate", *arguments])
