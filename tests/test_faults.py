"""What goes wrong is found before it does harm, is said with its way out, and never ends with status 0."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs

from jaxalign import build, checkpoint, config, diagnose, metrics, reference, sharding
from jaxalign.data import batching

CACHED = {
    "reference__mode": "cached",
    "samples__prompts": None,
    "samples__max_new_tokens": None,
    "checkpoint__every": 0,
}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run with a cached reference, in a cache folder of its own: (run folder, cache folder)."""
    folder = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
        runs.run(folder / "run", data__cache_dir=str(folder / "cache"), **CACHED)
    return folder / "run", folder / "cache"


def training_cache(cache: Path) -> Path:
    """The file with the training rows' reference log-probs (the larger of the two)."""
    files = list(cache.glob("reference-*.npz"))
    assert len(files) == 2
    return max(files, key=lambda file: file.stat().st_size)


def copy_of(cache: Path, target: Path) -> Path:
    return Path(shutil.copytree(cache, target))


@pytest.fixture
def poisoned(cached, tmp_path):
    """A cache in which one pair of batch 3 has NaN among its reference log-probs: (cache folder, the pair's row)."""
    cache = copy_of(cached[1], tmp_path / "poisoned")
    file = training_cache(cache)
    logps = np.load(file)["logps"]
    values = config.validate(runs.config(tmp_path, data__cache_dir=str(cache), **CACHED))
    prepared = build.load_data(values, tmp_path / "dropped.jsonl").train
    pair = int(batching.ExampleSource(prepared, batch_size=8, seed=0, buckets=(48,)).examples_of(2)[5])
    logps[reference.Cached(prepared, logps).span(pair, 1)] = np.nan
    np.savez(file, logps=logps)
    return cache, prepared.source_row(pair)


def test_a_cached_reference_gives_the_live_ones_run_and_is_used_again(cached, tmp_path, capsys, caplog):
    folder, cache = cached
    live = runs.run(tmp_path / "live", **{**CACHED, "reference__mode": "live"}).folder
    runs.assert_close(folder, live)
    capsys.readouterr()
    with caplog.at_level("INFO"):
        runs.run(tmp_path / "again", data__cache_dir=str(cache), **CACHED)
    assert "no cached reference" not in capsys.readouterr().err
    assert f"from the cache {training_cache(cache)}" in caplog.text
    runs.assert_same(tmp_path / "again", folder)


def as_chat(rows: list[dict[str, str]]) -> list[dict[str, list[dict[str, str]]]]:
    def turns(row, side):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]

    return [{side: turns(row, side) for side in ("chosen", "rejected")} for row in rows]


def cache_file(folder: Path, **changes) -> Path:
    """Where a run with these changes would look for its reference's log-probs."""
    settings = {"data__path": None, "data__eval__path": None, "eval__every": None, **changes}
    values = config.validate(runs.config(folder, **settings), has_dataset=True)
    data = build.load_data(values, folder / "dropped.jsonl", as_chat(runs.rows(24)))
    mesh = sharding.make_mesh(**values.mesh.to_dict())
    with sharding.use_mesh(mesh):
        return build.Run(values, mesh, data).reference_file(data.train)


TEMPLATE = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"


def test_what_changes_the_references_numbers_misses_the_cache_and_nothing_else_does(cached, tmp_path):
    ours = cache_file(tmp_path)
    same = {
        "optim__learning_rate": 1.0,
        "loss__beta": 0.5,
        "mesh__fsdp": 2,
        "batch_size": 4,
        "reference__mode": "cached",
    }
    assert cache_file(tmp_path / "elsewhere", **same) == ours
    for changes in (
        {"seed": 1},
        {"model__random": {**runs.MODEL, "rope_theta": 500.0}},
        {"reference__path": str(cached[0] / "export")},
        {"data__max_rows": 20},
        {"tokenizer__chat_template": TEMPLATE},
        {"max_length": 40},
        {"model__compute_dtype": "bfloat16"},
    ):
        assert cache_file(tmp_path, **changes) != ours, changes


def test_a_cache_with_other_numbers_is_caught_at_the_first_step(cached, tmp_path):
    cache = copy_of(cached[1], tmp_path / "cache")
    file = training_cache(cache)
    np.savez(file, logps=np.load(file)["logps"] * 1.01)
    with pytest.raises(ValueError, match="policy begins as its reference, but a token's log-prob differs by .*delete"):
        runs.run(tmp_path / "run", data__cache_dir=str(cache), **CACHED)
    assert not checkpoint.list_steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "other"])
def test_a_damaged_cache_file_is_an_error_that_says_to_delete_it(cached, tmp_path, damage):
    cache = copy_of(cached[1], tmp_path / "cache")
    file = training_cache(cache)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "other":
        np.savez(file, logps=np.zeros(3, np.float32))
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file}.*delete it"):
        runs.run(tmp_path / "run", data__cache_dir=str(cache), **CACHED)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_batch_that_is_not_finite_stops_the_run_with_a_report_and_the_last_good_state(
    cached, poisoned, tmp_path, splits
):
    cache, row = poisoned
    settings = {**CACHED, "data__cache_dir": str(cache), "gradient_accumulation_steps": splits}
    folder = tmp_path / "run"
    with pytest.raises(diagnose.NonFinite, match=r"step 3: loss nan, gradient norm nan.*step 2 is saved") as stopped:
        runs.run(folder, **settings)
    assert f"rows with a bad loss: [{row}]" in str(stopped.value) and "optim.nonfinite=skip" in str(stopped.value)
    assert [line["step"] for line in runs.lines(folder)] == [0, 1, 2]
    assert checkpoint.list_steps(folder / "checkpoints") == [2]
    saved = json.loads((folder / "nonfinite" / "step_3.json").read_text())
    assert len(saved["rows"]) == 8 and saved["loss"] == "nan"
    for entry in saved["rows"]:
        assert entry["text"] == runs.rows(24)[entry["row"]]
        assert (entry["loss"] == "nan") == (entry["row"] == row)
    norms = saved["gradient_norms"]
    assert len(norms["layers/mlp/up_proj/kernel"]) == 2 and len(norms["norm/scale"]) == 1
    if splits == 1:
        clean = runs.run(tmp_path / "clean", **{**settings, "data__cache_dir": str(cached[1])}, steps=2, epochs=None)
        good, ours = runs.leaves(clean.folder, 2), runs.leaves(folder, 2)
        assert {path for path in good if good[path] != ours[path]} == set()
        with pytest.raises(diagnose.NonFinite, match="step 3"):  # started again, it stops again
            runs.run(folder, **settings)


def test_under_skip_it_is_counted_and_passed_over(poisoned, tmp_path):
    settings = {**CACHED, "data__cache_dir": str(poisoned[0]), "optim__nonfinite": "skip"}
    folder = runs.run(tmp_path / "run", **settings).folder
    lines = [line for line in runs.lines(folder) if "loss" in line]
    bad = [line["step"] for line in lines if np.isnan(line["loss"])]
    assert bad[0] == 3 and len(bad) in (2, 3)  # once an epoch, of which there are 2.5
    assert [line["skipped_steps"] for line in lines] == [sum(n <= line["step"] for n in bad) for line in lines]
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[4] == pytest.approx(1e-2) and rates[2] == pytest.approx(5e-3)  # the skipped step took no rate
    assert np.isfinite(runs.lines(folder)[-1]["eval_loss"])


def test_a_checkpoint_that_cannot_be_written_fails_the_run(tmp_path):
    small = {"samples__prompts": None, "samples__max_new_tokens": None, "data__eval__path": None, "eval__every": None}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(RuntimeError, match="checkpoint 2 could not be written.*see to the space and the rights"):
            runs.run(tmp_path / "run", **small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not checkpoint.list_steps(tmp_path / "run" / "checkpoints")
