"""The GPU benchmark without a GPU: its whole path on a tiny model, its arithmetic, and that documents show no figure of
a GPU but those that are in a file of benchmarks/."""

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "benchmark_gpu.py"
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- what the documents may say
#
# A table of a results file stands between `<!-- gpu: benchmarks/FILE.json -->` and `<!-- end gpu -->`, just as
# `python scripts/benchmark_gpu.py --render benchmarks/FILE.json` prints it.

BLOCK = re.compile(r"<!-- gpu: (\S+) -->\n(.*?)<!-- end gpu -->\n?", re.S)
NOT_RUN = "GPU: not run"
CARD = re.compile(r"\b(GPUs?|CUDA|NVIDIA|cuDNN|[ABHV][1-3]00|GB[23]00|GH200|L40S?|L4|A10G?|RTX)\b")
FIGURE = re.compile(
    r"\d\s*(x|×|%|ms|GB|GiB|[kM]?\s*tok(ens)?/s|tok(ens)? per second|s/step|s / step|[TP]FLOP)(?!\w)|\bMFU\b\D*\d", re.I
)


def complaints(text: str, root: Path, render) -> list[str]:
    """What is wrong with the GPU figures of a document."""
    found = []
    for file, shown in BLOCK.findall(text):
        if not (root / file).is_file():
            found.append(f"{file} is not there")
        elif shown != render(root / file):
            found.append(f"the table is not that of {file}: python scripts/benchmark_gpu.py --render {file}")
    for paragraph in re.split(r"\n\s*\n", BLOCK.sub("\n\n", text).replace(NOT_RUN, "")):
        if CARD.search(paragraph) and (figure := FIGURE.search(paragraph)):
            found.append(f"a GPU's figure {figure.group()!r} outside of a table from a file: {paragraph.strip()[:200]}")
    return found


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_documents_show_no_gpu_figure_but_those_of_a_results_file(document, bench):
    assert complaints((ROOT / document).read_text(encoding="utf-8"), ROOT, bench.render) == []


def test_the_readme_says_that_no_gpu_was_used_as_long_as_there_is_no_results_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if list((ROOT / "benchmarks").glob("*.json")):
        assert BLOCK.search(text) and NOT_RUN not in text, "a GPU was measured: show benchmarks/*.json in README.md"
    else:
        assert NOT_RUN in text and not BLOCK.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "On an H100 it reaches 52% MFU.",
        "| model | tokens/s |\n| --- | --- |\n| 1.5B on one GPU | 21,000 tokens/s |",
        "GPU: not run. But an A100 is 1.4x as fast.",
        "The MFU on NVIDIA's cards is 0.5.",
        "<!-- gpu: benchmarks/none.json -->\n| 1 |\n<!-- end gpu -->\n",
    ],
)
def test_a_gpu_figure_without_its_file_is_found(text):
    assert complaints(text, ROOT, lambda file: "") != []


def test_a_table_that_was_changed_by_hand_is_found(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    block = "Text.\n\n<!-- gpu: a.json -->\nH100: 52% MFU\n<!-- end gpu -->\n"
    assert complaints(block, tmp_path, lambda file: "H100: 52% MFU\n") == []
    assert "is not that of a.json" in complaints(block, tmp_path, lambda file: "H100: 51% MFU\n")[0]


def test_every_results_file_says_when_and_how_it_was_measured(bench):
    for file in (ROOT / "benchmarks").glob("*.json"):
        data = json.loads(file.read_text())
        assert file.stem == bench.slug(data["card"]) and bench.render(file).startswith(data["card"])
        rounds = [r for row in data["rows"].values() for entry in row.values() for r in entry.get("rounds", ())]
        for record in (*rounds, *data["packing"].values(), *data["profile"].values()):
            assert {"versions", "date", "command"} <= record.keys() and record["device"] == data["card"]


# ---- the arithmetic


def record(seconds, **changes):
    return {"seconds": [9.0, *seconds], "losses": [math.log(2)], "warmup": 1, "peak_bytes": 10**10, "device": H100,
            "n_params": 5, "versions": {"jax": "1"}, "date": "2026-01-02T03", "command": "c", **changes}  # fmt: skip


def test_a_rows_figures_are_those_of_its_fastest_setting(bench):
    slow = {"rounds": [record([3.0, 3.0])]}
    fast = {"rounds": [record([1.0, 2.0, 1.5]), record([2.5, 2.5], peak_bytes=3 * 10**10)]}
    row = {"none/1": {"out_of_memory": "x"}, "full/1": slow, "full/2": fast}
    found = bench.figures("1.5b/sft/2048/jaxalign", row)
    assert found["setting"] == "full/2" and found["seconds"] == 2.0 and found["peak_bytes"] == 3 * 10**10
    assert found["tokens_per_second"] == 16384 / 2
    # By hand: 2 FLOPs for each weight of a layer and token, 4 for each visible pair and query channel; the head where
    # a token is scored; 3 passes.
    layer = 1536 * (2 * 1536 + 2 * 256 + 3 * 8960)
    forward = 2 * 28 * layer * 16384 + 8 * 28 * 4 * 1536 * 2048 * 2049 / 2 + 2 * 1536 * 151936 * 8 * 2047
    assert found["mfu"] == pytest.approx(3 * forward / 2.0 / 989e12)


def test_a_row_that_fits_in_no_setting_says_so(bench, tmp_path):
    file = tmp_path / "a.json"
    row = {"full/1": {"out_of_memory": "RESOURCE_EXHAUSTED: 90 GiB"}}
    rows = {"8b/dpo/2048/jaxalign": row, "0.5b/dpo/2048/trl": {"none/1": {"rounds": [record([1.0])]}}}
    file.write_text(json.dumps({"card": H100, "rows": rows, "packing": {}, "profile": {}}))
    lines = bench.render(file).splitlines()
    assert lines[0] == f"{H100}, 2026-01-02; jax 1."
    assert lines[4] == "| Llama-3-8B | dpo | 2,048 | jaxalign | does not fit | | | |"
    assert re.fullmatch(r"\| Qwen2.5-0.5B \| dpo \| 2,048 \| trl \| none/1 \| 16,384 \| \d.*% \| 10.0 \|", lines[5])


def test_idle_time_is_told_apart_within_and_between_programs(bench):
    # Two streams that overlap; 1 s of nothing inside of `step`, 2 s between `step` and `score`.
    events = [(0.0, 4.0, "step"), (1.0, 3.0, "copies"), (5.0, 6.0, "step"), (8.0, 10.0, "score")]
    found = bench.idle(events)
    want = {"seconds": 10.0, "idle_share": 0.3, "between_programs_share": 0.2, "longest_gap_ms": 2000.0}
    assert found == pytest.approx(want)


def test_the_step_in_which_the_trace_began_does_not_count(bench):
    names = ["step", "score", "step", "copies", "step", "score"] * 2
    events = [(float(i), i + 0.9, name) for i, name in enumerate(names)]
    assert bench.whole_steps(events)[0] == events[2]
    with pytest.raises(ValueError, match="three steps or more"):
        bench.whole_steps(events[:3])


def test_settings_that_would_split_a_pair_are_left_out(bench):
    assert bench.Case("1.5b", "dpo", 8192, "trl").settings() == ["none/1", "full/1"]
    assert bench.Case("1.5b", "sft", 8192, "trl").settings() == ["none/1", "full/1", "full/2"]


# ---- what is measured when


@pytest.fixture
def measured(bench, monkeypatch, tmp_path):
    """Calls the parent with jobs that take no time; `full/1` is the first setting that fits."""
    calls = []

    def start(job, python, *, platform):
        calls.append((job["case"]["system"], job["setting"]))
        if job["setting"].startswith(("none", "dots")):
            return {"out_of_memory": "too much"}
        case = bench.Case(**job["case"])
        return record([1.0] * 4, losses=[case.first_loss])

    monkeypatch.setattr(bench, "start", start)

    def run(only="^1.5b/dpo/2048", rounds=2, tune=False):
        calls.clear()
        args = argparse.Namespace(
            only=only, rounds=rounds, tune=tune, settings={}, warmup=1, steps=4, platform="gpu", shapes="all",
            trl_python="python",
        )  # fmt: skip
        results = bench.Results(tmp_path / "card.json")
        for job in bench.jobs(results, args):
            while job():
                pass
        return list(calls)

    return run


def test_rounds_alternate_between_the_systems_and_nothing_is_measured_twice(measured):
    first = [("jaxalign", "dots_no_batch/1"), ("jaxalign", "full/1"), ("trl", "none/1"), ("trl", "full/1")]
    assert measured(rounds=2) == [*first, ("jaxalign", "full/1"), ("trl", "full/1")]
    assert measured(rounds=2) == []
    assert measured(rounds=3) == [("jaxalign", "full/1"), ("trl", "full/1")]
    assert measured(rounds=1, tune=True) == [
        ("jaxalign", "full/2"), ("jaxalign", "full/4"), ("trl", "full/2"), ("trl", "full/4"), ("trl", "none/1/compile"),
        ("trl", "full/1/compile"), ("trl", "full/2/compile"), ("trl", "full/4/compile"),
    ]  # fmt: skip


def test_what_fails_is_said_and_not_tried_again_in_the_same_call(measured, bench, monkeypatch, capsys):
    def start(job, python, *, platform):
        raise RuntimeError(f"a worker of {job['setting']} ended")

    monkeypatch.setattr(bench, "start", start)
    assert measured(only="^1.5b/dpo/8192/trl") == []
    assert [line.split(" failed: ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "1.5b/dpo/8192/trl none/1", "1.5b/dpo/8192/trl full/1",
    ]  # fmt: skip


def test_a_system_that_computes_something_else_is_refused(bench, tmp_path):
    results = bench.Results(tmp_path / "card.json")
    case = bench.Case("1.5b", "dpo", 2048, "trl")
    with pytest.raises(RuntimeError, match=r"the first loss is 0.9, expected about 0.6931"):
        bench.check(case, {"losses": [0.9], "n_params": 5}, results)
    results.data["rows"]["1.5b/dpo/2048/jaxalign"] = {"full/1": {"rounds": [record([1.0])]}}
    with pytest.raises(RuntimeError, match="7 weights, and jaxalign has another number"):
        bench.check(case, {"losses": [0.69], "n_params": 7}, results)


def test_results_of_another_card_are_not_mixed_in(bench, tmp_path):
    results = bench.Results(tmp_path / "card.json")
    results.add({"device": H100})
    with pytest.raises(ValueError, match="H200"):
        results.add({"device": "NVIDIA H200"})


# ---- the workers


@pytest.mark.slow
def test_accumulation_and_checkpointing_compute_the_same(bench):
    case = bench.Case("tiny", "sft", 32, "jaxalign")
    whole, split = (bench.jaxalign_worker(case, setting, 2) for setting in ("none/1", "full/2"))
    assert whole["losses"] == pytest.approx(split["losses"], abs=2e-3)
    assert abs(whole["losses"][0] - case.first_loss) < 0.1 and len(whole["seconds"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("tiny/dpo/32", r"\| tiny \| dpo \| 32 \| jaxalign \| none/1 \| \d"),
        ("packing/32", r"\| xla, packed \| 32 \| \d"),
        ("profile", r"During 4 steps .* the device was idle for \d"),
    ],
)
def test_the_whole_path_on_a_cpu_without_torch(only, said, tmp_path):
    file = tmp_path / "cpu.json"
    command = [sys.executable, SCRIPT, "--platform=cpu", "--shapes=tiny", "--trl-python=", "--quick", f"--json={file}",
               f"--only={only}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 processes; nothing is left" in done.stdout and re.search(said, done.stdout)
    before = file.read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert "0 processes; nothing is left" in again.stdout and file.read_bytes() == before
