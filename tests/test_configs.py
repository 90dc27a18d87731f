"""The shipped configs: each loads and says what it is for, and shows no number but those that were measured."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxalign import config, objectives
from jaxalign.models import config_from_hf

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
SMALL = [name for name in NAMES if name.endswith("_smollm2")]
NOT_RUN = "Expected time: not run. Expected numbers: not run."
SAMPLES = ROOT / "jaxalign" / "data" / "samples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script("run_objectives")
RESULTS = json.loads(script.RESULTS.read_text()) if script.RESULTS.exists() else {}


def document(name):
    """The config's docstring as one line."""
    text = (ROOT / "configs" / f"{name}.py").read_text()
    return " ".join(re.match(r'"""(.*?)"""', text, re.DOTALL)[1].split())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_and_its_docstring_says_how_to_run_it_and_what_to_expect(name):
    loaded = config.load(str(ROOT / "configs" / f"{name}.py"))
    assert loaded.workdir == f"runs/{name}"
    said = document(name)
    assert f"python -m jaxalign.train --config=configs/{name}.py" in said
    expected = re.search(r"Expected time: (.+?)\. Expected numbers: (.+)\.", said)
    assert expected and all(part == "not run" or re.search(r"\d", part) for part in expected.groups())
    for path in (loaded.data.path, loaded.data.eval.path):
        if path and path.startswith("package:jaxalign/data/samples/"):
            file = path.rpartition("/")[2]
            assert (SAMPLES / file).is_file() and f"`{file}`" in (SAMPLES / "README.md").read_text()


def test_every_setting_of_a_config_with_settings_loads():
    text = (ROOT / "configs" / "simpo.py").read_text()
    settings = dict(re.findall(r"^    ([a-z0-9.-]+) +(\d+\.\d) +\(SFT", text, re.MULTILINE))
    assert len(settings) == 5
    seen = [config.load(str(ROOT / "configs" / "simpo.py"), arg=setting) for setting in settings]
    assert len({(c.model.path, c.data.path, c.optim.learning_rate) for c in seen}) == 5
    with pytest.raises(ValueError, match="no setting of SimPO is named 'gemma'"):
        config.load(str(ROOT / "configs" / "simpo.py"), arg="gemma")


# ---- recipes that were not run


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(SMALL) - {"tiny"}))
def test_a_published_recipe_says_that_it_was_not_run_and_where_it_fits(name):
    said = document(name)
    assert NOT_RUN in said
    given = {flag: re.search(rf"--{flag}=([^ `)]+)", said) for flag in ("topology", "model_config")}
    topology, shape = (match[1] for match in given.values())
    assert f"python -m jaxalign.preflight --config=configs/{name}.py" in said
    assert re.search(rf"[\d.]+ of [\d.]+ GB of each chip of {re.escape(topology)}", said) or re.search(
        rf"of [\d.]+ GB of each chip of {re.escape(topology)}: .*[\d.]+ GB", said
    )
    assert "SHAPE" in shape or (ROOT / shape).is_file()


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "shapes").glob("*.json")), ids=lambda path: path.stem)
def test_a_shape_is_a_model(file):
    cfg = config_from_hf(json.loads(file.read_text()))
    size = float(re.search(r"_([\dp]+)b", file.stem)[1].replace("p", "."))
    layer = cfg.hidden_size * (2 * cfg.head_dim * (cfg.num_attention_heads + cfg.num_key_value_heads))
    layer += 3 * cfg.hidden_size * cfg.intermediate_size
    tables = 1 if cfg.tie_word_embeddings else 2
    parameters = cfg.num_hidden_layers * layer + tables * cfg.vocab_size * cfg.hidden_size
    assert parameters / 1e9 == pytest.approx(size, rel=0.05)


# ---- what was run: the numbers of a docstring and of the README are those of the results file


@pytest.mark.parametrize("name", SMALL)
def test_the_numbers_of_a_docstring_are_those_of_its_runs(name):
    said = document(name)
    if name not in RESULTS:
        assert NOT_RUN in said or "README.md" in said
        return
    entry = RESULTS[name]
    assert entry["settings"] == script.settings(name), (
        f"the config has changed: python scripts/run_objectives.py --only={name}"
    )
    assert script.sentence(entry) in said, script.sentence(entry)


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_run_moved_its_held_out_metric_the_right_way(name):
    assert name in SMALL
    runs = list(RESULTS[name]["seeds"].values())
    found = script.summary(runs)
    assert len(runs) >= 3 and runs[0]["sign"] * found["change"] > 2 * found["change_se"]


def test_the_table_of_the_readme_is_that_of_the_results_file():
    block = re.search(
        r"<!-- objectives -->\n(.*?)\n<!-- end objectives -->", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert (block is None) == (not RESULTS)
    assert block is None or block[1] == script.render(RESULTS)


# ---- the script


def test_every_kind_of_data_has_a_measure():
    # What is sampled has rewards as its measure, in recipes of its own.
    assert {loss.kind for loss in objectives.LOSSES.values()} <= set(script.MEASURES)


def test_a_change_has_the_error_of_a_paired_mean_or_ratio():
    before = {"rewards/chosen": np.array([1.0, 2.0, 3.0]), "rewards/rejected": np.array([1.0, 1.0, 1.0])}
    after = {"rewards/chosen": np.array([2.0, 4.0, 3.0]), "rewards/rejected": np.array([1.0, 1.0, 1.0])}
    # Margins 0, 1, 2 and 1, 3, 2: changes 1, 2, 0, whose deviation is 1.
    assert script.margins(before, after) == pytest.approx(
        {"before": 1.0, "after": 2.0, "change": 1.0, "change_se": 1 / np.sqrt(3)}
    )
    tokens = np.array([1.0, 3.0])
    found = script.nll({"nll": np.array([2.0, 6.0])}, {"nll": np.array([1.0, 5.0]), "tokens": tokens})
    # 8 and 6 nats on 4 tokens; -1 on either row is 0.5 off from -0.5 a token: sqrt((0.5^2 + 0.5^2) * 2 / 1) / 4.
    assert found == pytest.approx({"before": 2.0, "after": 1.5, "change": -0.5, "change_se": 0.25})


def test_the_margin_of_single_responses_is_a_difference_of_two_means_and_of_pairs_a_mean_of_differences():
    def margins(label, rewards):
        zeros = {"rewards": np.zeros(4)}
        return script.labelled_margins(zeros, {"rewards": np.array(rewards), "label": np.array(label)})

    found = margins([1.0, 0.0, 0.0, 1.0], [1.0, 0.0, -2.0, 3.0])
    assert found == pytest.approx({"before": 0.0, "after": 3.0, "change": 3.0, "change_se": np.sqrt(2)})
    # All desirable ones first: pairs, whose differences are 1 and 5.
    found = margins([1.0, 1.0, 0.0, 0.0], [1.0, 3.0, 0.0, -2.0])
    assert found == pytest.approx({"before": 0.0, "after": 3.0, "change": 3.0, "change_se": 2.0})


def test_the_error_over_seeds_does_not_hide_that_the_rows_are_the_same():
    run = {"before": 0.0, "after": 1.0, "change": 1.0, "change_se": 0.3, "cpu_seconds": 10}
    assert script.summary([run] * 3)["change_se"] == pytest.approx(0.3)
    other = {**run, "change": 2.0, "after": 2.0}
    # Two seeds 1 apart: their mean has the error 0.5.
    assert script.summary([run, other])["change_se"] == pytest.approx(np.hypot(0.3, 0.5))


def test_written_documents_show_the_results(tmp_path):
    run = {"metric": "reward margin", "sign": 1, "before": 0.0, "after": 1.0, "change": 1.0, "change_se": 0.1,
           "rows": 9, "cpu_seconds": 7}  # fmt: skip
    results = {"dpo_smollm2": {"settings": {}, "seeds": {"0": run, "1": run, "2": run}}}
    (tmp_path / "configs").mkdir()
    (tmp_path / "README.md").write_text("Text.\n\n<!-- objectives -->\nold\n<!-- end objectives -->\n\nMore.\n")
    file = tmp_path / "configs" / "dpo_smollm2.py"
    file.write_text(f'"""DPO.\n\n{NOT_RUN}\n\nMore.\n"""\n\nx = 1\n')
    for _ in range(2):
        script.write(results, tmp_path)
        table = script.render(results)
        assert "| `dpo_smollm2` | reward margin | 0.000 | 1.000 | +1.000 ± 0.100 | 10.0x | 0, 1, 2 | 7 |" in table
        readme = (tmp_path / "README.md").read_text()
        assert readme == f"Text.\n\n<!-- objectives -->\n{table}\n<!-- end objectives -->\n\nMore.\n"
        before, said, after = file.read_text().split("\n\n", 2)
        assert " ".join(said.split()) == script.sentence(results["dpo_smollm2"])
        assert before == '"""DPO.' and after == 'More.\n"""\n\nx = 1\n'


def test_runs_are_kept_one_by_one_and_made_again_only_where_the_config_changed(monkeypatch, tmp_path, capsys):
    file, calls = tmp_path / "results.json", []

    def start(command):
        name, seed, target = command[-3:]
        calls.append((name, seed))
        if len(calls) == 3:
            return SimpleNamespace(returncode=1)
        run = {"metric": "reward margin", "sign": 1, "before": 0, "after": 1, "change": 1, "change_se": 0.1, "rows": 9,
               "seconds": 5, "cpu_seconds": 7}  # fmt: skip
        Path(target).write_text(json.dumps(run))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", start)
    main = ["--only=^dpo_smollm2", f"--json={file}"]
    script.main(main)
    assert calls == [("dpo_smollm2", "0"), ("dpo_smollm2", "1"), ("dpo_smollm2", "2")]
    assert "seed 2: the run failed" in capsys.readouterr().err
    script.main(main)
    assert calls[3:] == [("dpo_smollm2", "2")] and "| 0, 1, 2 | 7 |" in capsys.readouterr().out
    script.main(main)
    assert len(calls) == 4
    monkeypatch.setattr(script, "settings", lambda name: {"steps": 1})
    script.main([*main, "--seeds=0"])
    assert len(calls) == 5 and list(json.loads(file.read_text())["dpo_smollm2"]["seeds"]) == ["0"]
