"""A pair's shared prompt, computed once: which lengths a batch gets, and that a run's numbers stay."""

import numpy as np
import pytest
import runs

from jaxalign import metrics
from jaxalign.data import batching


def test_a_batch_takes_the_longest_prefix_that_all_its_prompts_reach():
    prompts = np.array([40, 33, 70])
    assert batching.prefix_of(prompts, (16, 32, 64)) == 32
    assert batching.prefix_of(prompts, (64,)) == 0
    assert batching.prefix_of(prompts, ()) == 0


def test_a_run_with_shared_prompts_has_the_numbers_of_one_without(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder)
    taken = []
    make_batch = batching.make_batch
    monkeypatch.setattr(batching, "make_batch", lambda *a, **k: taken.append(k.get("prefix", 0)) or make_batch(*a, **k))
    short = {"epochs": None, "steps": 3, "eval__every": 0, "samples__prompts": 0, "checkpoint__every": 0}
    short |= {"samples__max_new_tokens": None, "export__enabled": False, "optim__learning_rate": 1e-4}
    runs.run(tmp_path / "whole", **short)
    assert not any(taken)
    runs.run(tmp_path / "shared", data__prefixes=(8,), gradient_accumulation_steps=2, **short)
    assert 8 in taken
    for got, want in zip(runs.lines(tmp_path / "shared"), runs.lines(tmp_path / "whole"), strict=True):
        for name in set(want) - {"ref_logps_difference/max"}:
            if "accuracies" not in name:  # of margins that are 0 but for rounding
                assert got[name] == pytest.approx(want[name], rel=2e-4, abs=2e-5), name


def test_a_model_with_sliding_windows_refuses_them_before_it_is_read(tmp_path):
    windows = {**runs.MODEL, "model_type": "mistral", "sliding_window": 16}
    with pytest.raises(ValueError, match="data.prefixes.*sliding windows"):
        runs.run(tmp_path / "run", model__random=windows, data__prefixes=(8,))
