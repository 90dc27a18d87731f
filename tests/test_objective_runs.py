"""Whole tiny runs: of every family of losses, without a reference, and of losses that look at the whole batch."""

import json

import numpy as np
import pytest
import runs

from jaxalign import build, evaluate, metrics, preflight, programs, sharding
from jaxalign import config as config_lib

SHORT = {
    "epochs": None,
    "steps": 4,
    "eval__every": 4,
    "samples__prompts": 0,
    "samples__max_new_tokens": None,
    "checkpoint__every": 2,
    "optim__schedule": "constant",
    "optim__learning_rate": 3e-3,
    "optim__warmup_steps": 0,
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture
def no_reference(monkeypatch):
    """A run that asks for a reference's weights or log-probs fails."""

    def refuse(*args):
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(build.reference, "make_score", lambda *args, **options: refuse)
    monkeypatch.setattr(build.Run, "reference_params", property(refuse))


@pytest.mark.parametrize(
    ("name", "options", "extra"),
    [
        ("orpo", {}, {"nll_loss", "log_odds_ratio", "log_odds_chosen"}),
        pytest.param("simpo", {"loss__gamma_beta_ratio": 0.3}, set(), marks=pytest.mark.slow),
    ],
)
def test_without_a_reference_none_is_held_or_scored(name, options, extra, tmp_path, no_reference):
    result = runs.run(tmp_path / "run", loss__name=name, gradient_accumulation_steps=2, **options, **SHORT)
    before, *steps, after = runs.lines(result.folder)
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert np.isfinite([x for line in steps for x in line.values()]).all()
    names = {"loss", "rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected", "logits/chosen"}
    assert names | extra <= steps[0].keys()
    assert not any("ref_logps" in key or key == "nll_loss" and key not in extra for key in steps[0])
    assert ("eval_log_odds_ratio" in after) == (name == "orpo")
    # The model that the run leaves, evaluated by itself, needs no reference either.
    config = config_lib.load(str(result.folder / "config.json"))
    found = evaluate.evaluate(str(result.export), config)
    assert found["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-5)
    with pytest.raises(ValueError, match=f"rewards of the loss '{name}' need no reference"):
        evaluate.evaluate(str(result.export), config, reference=str(result.export))


def test_preflight_has_no_program_for_a_reference_that_is_not_there(tmp_path):
    for name, scores in (("simpo", False), ("sigmoid", True)):
        config = config_lib.validate(runs.config(tmp_path / "run", loss__name=name))
        mesh = sharding.make_mesh(**config.mesh.to_dict())
        with sharding.use_mesh(mesh):
            cfg = programs.model_config(config, path=None)
            jobs = {job.name: job for job in preflight.jobs(programs.Programs(config, mesh, cfg, cfg, steps=2))}
            assert ("score" in jobs) == scores
            assert ("ref_logps" in jobs["train step"].arguments[2]) == scores
            assert (jobs["train step"].besides is None) != scores


def test_a_prompt_that_is_scored_does_not_stand_once(tmp_path):
    config = config_lib.validate(
        runs.config(tmp_path / "run", loss__name="orpo", data__packing="shared", data__buckets=None)
    )
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    cfg = programs.model_config(config, path=None)
    with sharding.use_mesh(mesh), pytest.raises(ValueError, match="'orpo' scores the prompt too.*set it to on"):
        programs.Programs(config, mesh, cfg, cfg, steps=2)


@pytest.mark.slow
def test_a_loss_of_the_whole_batch_is_the_same_split_or_not_and_resumes(tmp_path):
    aot = {"loss__name": "aot+sft", "loss__weights": (1.0, 0.1), "loss__beta": 0.5, **SHORT}
    whole = runs.run(tmp_path / "whole", **aot)
    assert whole.metrics["eval_loss"] < whole.metrics["before_eval_loss"]
    split = {**aot, "gradient_accumulation_steps": 2}
    runs.run(tmp_path / "split", **split)
    ours, others = (runs.lines(tmp_path / name) for name in ("split", "whole"))
    for line, other in zip(ours, others, strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if "accuracies" not in name:  # of margins that are 0 but for rounding at first
                np.testing.assert_allclose(line[name], other[name], rtol=2e-3, atol=2e-4, err_msg=name)
    # Killed after two steps and continued, it ends in the same bits.
    runs.run(tmp_path / "parts", **{**split, "steps": 2})
    runs.run(tmp_path / "parts", **split)
    assert runs.leaves(tmp_path / "parts") == runs.leaves(tmp_path / "split")


def weighted_rows(folder):
    """The rows of a quick run with a third response and weights."""
    for name, n, start in (("train", 24, 0), ("eval", 9, 100)):
        rows = [
            {**row, "reference": row["chosen"] + " Sure.", "weight": 0.5 + i % 3}
            for i, row in enumerate(runs.rows(n, start))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data__path": str(folder / "train.jsonl"), "data__eval__path": str(folder / "eval.jsonl")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sft", {}),
        *(
            pytest.param(name, {"loss__beta": beta}, marks=pytest.mark.slow)
            for name, beta in (("tpo", 0.1), ("kto", 0.5), ("bco", 0.5), ("aot_unpaired", 0.5), ("orpo", 0.1))
        ),
        pytest.param("dft", {"data__train_on": "all"}, marks=pytest.mark.slow),
        pytest.param("reward", {"samples__prompts": 0}, marks=pytest.mark.slow),
    ],
)
def test_a_run_of_weighted_examples_learns_and_is_the_same_packed(name, options, tmp_path):
    settings = {"loss__name": name, "data__weight": "weight", **SHORT, **options, **weighted_rows(tmp_path)}
    whole = runs.run(tmp_path / "whole", **settings)
    learnt = "nll" if name == "dft" else "loss"  # dft's is p log p, which is low for what is unlikely, too
    assert whole.metrics[f"eval_{learnt}"] < whole.metrics[f"before_eval_{learnt}"]
    runs.run(tmp_path / "packed", **settings, data__packing="on", data__buckets=())
    ours, others = (runs.lines(tmp_path / folder) for folder in ("packed", "whole"))
    assert len(ours) == len(others) == 6
    for line, other in zip(ours, others, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert (key in line) == (key in other)
            np.testing.assert_allclose(line.get(key, 0), other.get(key, 0), rtol=1e-3, err_msg=key)
