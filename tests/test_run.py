"""`jaxalign.run` from Python does what the command does, as often as one likes."""

import re
import types
from pathlib import Path

import numpy as np
import pytest
import runs

import jaxalign
from jaxalign import config, generate, hf, metrics


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")


@pytest.mark.slow
def test_it_runs_twice_in_one_process_once_from_a_list_of_dicts(tmp_path):
    from_file = runs.run(tmp_path / "file", steps=4, epochs=None)
    values = runs.config(tmp_path / "list", steps=4, epochs=None, data__path=None, data__eval__path=None)
    from_list = jaxalign.run(
        config.validate(values, has_dataset=True, has_eval_dataset=True), runs.rows(24), runs.rows(9, 100)
    )
    runs.assert_same(from_list.folder, from_file.folder)
    assert from_list.folder == tmp_path / "list" and from_list.export == tmp_path / "list" / "export"
    assert from_list.metrics == from_file.metrics
    assert {"loss", "eval_loss", "before_eval_loss", "eval_rewards/accuracies"} <= from_list.metrics.keys()

    # What was trained can be asked, also where the rows left no path behind.
    cfg, params = hf.load(from_list.export)
    tokenizer = hf.load_tokenizer(from_list.export)
    for prompt in ("7 + 0 ?", [{"role": "user", "content": "7 + 0 ?"}]):
        said = from_list.generate(prompt, max_new_tokens=6)
        assert [said] == generate.complete(cfg, params, tokenizer, [prompt], max_new_tokens=6)
    assert len({from_list.generate("7 + 0 ?", max_new_tokens=6, temperature=5.0, seed=seed) for seed in range(3)}) > 1

    # A second call with the same arguments finds the run finished.
    again = jaxalign.run(values, runs.rows(24), runs.rows(9, 100))
    assert again.metrics == from_list.metrics


def test_the_module_of_the_command_keeps_its_name():
    import jaxalign.train

    assert isinstance(jaxalign.train, types.ModuleType) and jaxalign.run is jaxalign.train.run
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        jaxalign.trian  # noqa: B018


def test_a_dataset_beside_a_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.path is .* but a dataset is given as well"):
        jaxalign.run(runs.config(tmp_path / "run"), runs.rows(24))
    assert not (tmp_path / "run").exists()


def test_without_held_out_rows_it_samples_from_the_training_rows_and_exports_nothing(tmp_path):
    changes = {"data__eval__path": None, "eval__every": None, "export__enabled": False, "samples__prompts": ("Hello",)}
    result = runs.run(tmp_path / "run", steps=2, epochs=None, **changes)
    assert result.export is None and not (tmp_path / "run" / "export").exists()
    assert [(row["step"], row["prompt"]) for row in metrics.read_completions(result.folder)] == [
        (0, "Hello"),
        (2, "Hello"),
    ]
    assert not any(name.startswith("eval_") for line in runs.lines(result.folder) for name in line)
    np.testing.assert_allclose(runs.lines(result.folder)[0]["loss"], np.log(2), atol=1e-5)
    assert Path(result.folder, "dropped.jsonl").read_text() == ""


def test_the_readmes_python_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # our own text, from this repository
    assert (tmp_path / "runs" / "mine" / "export" / "model.safetensors").is_file()
    assert float(capsys.readouterr().out.split()[0]) > 0
