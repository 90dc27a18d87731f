"""Whole tiny runs of every kind of examples, packed or not, weighted or not."""

import json

import numpy as np
import pytest
import runs

from jaxalign import config as config_lib
from jaxalign import evaluate, metrics

SHORT = {
    "epochs": None,
    "steps": 4,
    "eval__every": 4,
    "samples__prompts": 0,
    "samples__max_new_tokens": None,
    "optim__schedule": "constant",
    "optim__learning_rate": 3e-3,
    "optim__warmup_steps": 0,
}
PACKED = {"data__buckets": None, "data__packed_length": 96}
LOGGED = {
    "kto": {"kl", "rewards/chosen", "rewards/margins", "logps/rejected", "ref_logps_difference/max"},
    "bco": {"delta", "rewards/margins"},
    "sft": {"mean_token_accuracy", "entropy"},
    "reward": {"accuracy", "margin", "min_reward", "max_reward"},
    "sigmoid": {"rewards/margins"},
}
HEADLINES = {"kto": "eval_rewards/margins", "reward": "eval_margin", "bco": "eval_rewards/margins"}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


def assert_equal(ours, others):
    """Two runs logged the same numbers, but for rounding."""
    for line, other in zip(ours, others, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if "accurac" not in name and name not in ("ref_logps_difference/max", "num_tokens"):
                np.testing.assert_allclose(line[name], other[name], rtol=2e-3, atol=5e-4, err_msg=name)


@pytest.mark.parametrize("loss", ["kto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "reward"))])
def test_a_kind_trains_packed_as_it_does_padded_and_resumes_in_the_same_bits(loss, tmp_path):
    padded = runs.run(tmp_path / "padded", loss__name=loss, **SHORT)
    before, *steps, after = runs.lines(padded.folder)
    assert after["eval_loss"] < before["eval_loss"] and LOGGED[loss] <= steps[0].keys()
    if loss in HEADLINES:
        name = HEADLINES[loss]
        assert after[name] > before[name] + after[f"{name}_se"]

    how = {"data__packing": "on" if loss == "sft" else "shared", "gradient_accumulation_steps": 2, **PACKED}
    packed = {"loss__name": loss, **SHORT, **how}
    runs.run(tmp_path / "packed", **packed)
    assert_equal(runs.lines(tmp_path / "packed"), runs.lines(padded.folder))
    runs.run(tmp_path / "parts", **{**packed, "steps": 2, "eval__every": 2})
    runs.run(tmp_path / "parts", **packed)
    assert runs.leaves(tmp_path / "parts") == runs.leaves(tmp_path / "packed")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bco", "sigmoid", "tpo", "attributes", "dft", "apo_zero_unpaired"])
def test_the_other_kinds_too(loss, tmp_path):
    changes = dict(SHORT)
    if loss in ("tpo", "attributes"):
        rows = [{**row, "reference": f"{i}!"} for i, row in enumerate(runs.rows(24))]
        if loss == "attributes":
            rows = [
                {"prompt": row["prompt"], "completion": row["chosen"], "a": float(i % 3), "b": 2.0 - i % 2}
                for i, row in enumerate(rows)
            ]
            changes |= {"data__score_columns": ("a", "b"), "loss__reward_weights": (1.0, -1.0)}
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes |= {"data__path": str(file), "data__eval__path": None, "data__eval__fraction": 0.3}
    padded = runs.run(tmp_path / "padded", loss__name=loss, **changes)
    before, *steps, after = runs.lines(padded.folder)
    assert np.isfinite([x for line in steps for x in line.values()]).all()
    assert LOGGED.get(loss, set()) <= steps[0].keys()
    if loss != "dft":  # p log p of unlikely tokens grows before it falls
        assert after["eval_loss"] < before["eval_loss"]
    runs.run(tmp_path / "packed", loss__name=loss, **changes, data__packing="on", **PACKED)
    assert_equal(runs.lines(tmp_path / "packed"), runs.lines(padded.folder))


def test_weights_of_a_column_and_of_a_function_that_knows_the_step(tmp_path):
    rows = [{**row, "quality": float(i % 3 > 0) * 2} for i, row in enumerate(runs.rows(24))]
    (tmp_path / "weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def weigh(rows, step):\n    assert step in (0, 1, 2, 3)\n    return [row['quality'] for row in rows]\n"
    )
    data = {**SHORT, "data__path": str(tmp_path / "weighted.jsonl")}
    runs.run(tmp_path / "column", **data, data__weight="quality")
    runs.run(tmp_path / "function", **data, data__weight=f"{tmp_path}/mine.py:weigh")
    assert runs.leaves(tmp_path / "column") == runs.leaves(tmp_path / "function")
    # The weights are training's: other rows need no such column, here nor in `evaluate`.
    config = config_lib.validate(runs.config(tmp_path / "column", **data, data__weight="quality"))
    assert len(evaluate._load_rows(config).train) == 9

    (tmp_path / "mine2.py").write_text("def weigh(rows, step):\n    return [-1.0] * len(rows)\n")
    with pytest.raises(Exception, match="expected as many finite numbers from 0 up"):
        runs.run(tmp_path / "wrong", **data, data__weight=f"{tmp_path}/mine2.py:weigh")


def test_packed_rows_of_a_cached_reference_need_no_batch_that_divides_over_the_devices(tmp_path):
    how = {"data__packing": "on", "reference__mode": "cached", "batch_size": 3, "data__eval__path": None, **PACKED}
    quick = {**SHORT, "steps": 1, "eval__every": None}
    result = runs.run(tmp_path / "run", **quick, **how)
    assert result.metrics["loss"] == pytest.approx(np.log(2), abs=1e-5)
