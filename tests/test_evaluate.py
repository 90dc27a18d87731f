"""`python -m jaxalign.evaluate` says of a model what training said of the same weights."""

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import runs

from jaxalign import config as config_lib
from jaxalign import evaluate, metrics

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
    assert record == json.loads(out.read_text()) and record["model"] == str(run) and record["eval_pairs"] == 9
    for name, value in logged(run, 6).items():
        np.testing.assert_allclose(record[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    command(f"--model={run}", f"--data={file}", "--config.eval.max_rows=4")
    said = capsys.readouterr().out
    assert said.startswith("4 pairs, loss") and "perplexity of rejected" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model=/nowhere", "--config={run}/config.json"), "random weights, which are no reference"),
        (("--model=/nowhere", "--config={run}/config.json", "--reference={run}/export"), "'/nowhere' does not exist"),
        (("--model={run}", "--step=5"), "no checkpoint '5'"),
        (("--config={run}/config.json",), "--model is missing"),
        (("--model={run}", "--config.data.eval.path=none", "--config.eval.every=100"), "no evaluation pairs"),
    ],
)
def test_what_is_not_there_is_said(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(*(argument.format(run=run) for argument in arguments))
    assert stopped.value.code in (1, 2) and message in capsys.readouterr().err


def test_perplexity_is_the_exponential_of_the_mean_nll_and_its_interval_that_of_a_ratio():
    logps, tokens = np.array([-2.0, -6.0, -1.0]), np.array([2.0, 3.0, 1.0])
    value, low, high = evaluate.perplexity(logps, tokens)
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
        _, low, high = evaluate.perplexity(-nlls, lengths)
        hits += low < math.exp(2.0) < high
    assert 0.92 < hits / 400 < 0.98


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


def command(*arguments):
    evaluate.main(["evaluate", *arguments])
