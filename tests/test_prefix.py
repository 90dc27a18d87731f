"""Runs whose rows share a prompt or are packed: their numbers are those of the same run without, and they resume."""

import re

import numpy as np
import pytest
import runs

from jaxalign import metrics
from jaxalign.data import batching
from jaxalign.signals import Stopper
from jaxalign.train import Preempted


def test_a_batch_takes_the_longest_prefix_that_all_its_prompts_reach():
    prompts = np.array([40, 33, 70])
    assert batching.prefix_of(prompts, (16, 32, 64)) == 32
    assert batching.prefix_of(prompts, (64,)) == 0
    assert batching.prefix_of(prompts, ()) == 0


SHORT = {"epochs": None, "steps": 3, "eval__every": 0, "samples__prompts": 0, "checkpoint__every": 0}
SHORT |= {"samples__max_new_tokens": None, "export__enabled": False, "optim__learning_rate": 1e-4}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with one sequence a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        return runs.run(tmp_path_factory.mktemp("whole") / "run", **SHORT).folder


def check(folder, whole, leave_out=("ref_logps_difference/max",)):
    """All metrics are equal but for rounding."""
    for got, want in zip(runs.lines(folder), runs.lines(whole), strict=True):
        assert set(got) == set(want)
        for name in set(want) - set(leave_out):
            if "accuracies" not in name:  # of margins that are 0 but for rounding
                assert got[name] == pytest.approx(want[name], rel=2e-4, abs=2e-5), name


def test_a_run_with_shared_prompts_has_the_numbers_of_one_without(whole, tmp_path, monkeypatch):
    taken = []
    make_batch = batching.make_batch
    monkeypatch.setattr(batching, "make_batch", lambda *a, **k: taken.append(k.get("prefix", 0)) or make_batch(*a, **k))
    runs.run(tmp_path / "shared", data__prefixes=(8,), gradient_accumulation_steps=2, **SHORT)
    assert 8 in taken
    check(tmp_path / "shared", whole)


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "mode"), [("on", "live"), ("shared", "cached")])
def test_a_packed_run_has_the_numbers_of_one_that_is_not_and_resumes_in_its_bits(
    whole, tmp_path, monkeypatch, capsys, packing, mode
):
    packed = {
        "data__packing": packing,
        "data__buckets": None,
        "reference__mode": mode,
        "mesh__data": 2,
        "mesh__fsdp": 4,
    }
    packed |= {"gradient_accumulation_steps": 1 if packing == "on" else 2, **SHORT}
    runs.run(tmp_path / "run", **packed)
    said = capsys.readouterr().err
    assert re.search(r"compiled for \d+ packed rows of \d+ tokens", said)
    # A prompt that stands once is counted once.
    check(tmp_path / "run", whole, ("ref_logps_difference/max", *(["num_tokens"] if packing == "shared" else [])))
    with monkeypatch.context() as patch:
        patch.setattr(Stopper, "should_stop", lambda self, n: n == 1)
        with pytest.raises(Preempted):
            runs.run(tmp_path / "stopped", **packed)
    runs.run(tmp_path / "stopped", **packed)
    assert runs.lines(tmp_path / "stopped") == runs.lines(tmp_path / "run")
    assert runs.leaves(tmp_path / "stopped") == runs.leaves(tmp_path / "run")


def test_a_model_with_sliding_windows_refuses_them_before_it_is_read(tmp_path):
    windows = {**runs.MODEL, "model_type": "mistral", "sliding_window": 16}
    with pytest.raises(ValueError, match="data.prefixes.*sliding windows"):
        runs.run(tmp_path / "run", model__random=windows, data__prefixes=(8,))
