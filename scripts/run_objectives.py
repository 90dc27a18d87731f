"""Every objective on SmolLM2: its held-out metric before and after a run, over three seeds, with standard errors.

    python scripts/run_objectives.py                          # what docs/objectives.json lacks
    python scripts/run_objectives.py --only='^(kto|bco)_' --seeds=0,1
    python scripts/run_objectives.py --write                  # runs nothing, writes README.md and docstrings

A run is that of `python -m jaxalign.train --config=configs/NAME.py --config.seed=SEED` in a process of its own; export
and completions, which change no number, are left out. The file is written after each run: the same command goes on
where another was cut off, and a run whose config has changed since is made again.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "objectives.json"
PATTERN = "*_smollm2.py"
UNSHOWN = {"export.enabled": False, "checkpoint.every": 0, "samples.prompts": 0, "samples.max_new_tokens": 64}
"""Keys of a measured run that change none of its numbers."""

Values = Mapping[str, np.ndarray]


# ---- what is measured


def margins(before: Values, after: Values) -> dict[str, float]:
    """The reward of the chosen response over the rejected one's, a mean over pairs."""
    old, new = (x["rewards/chosen"] - x["rewards/rejected"] for x in (before, after))
    return _ratio(old, new, np.ones(len(old)))


def labelled_margins(before: Values, after: Values) -> dict[str, float]:
    """The mean reward of desirable completions over that of undesirable ones.

    Held-out pairs give all of the one and then, in the same order, all of the other kind: the error is that of their
    differences, as in `margins`. Else it is that of a difference of two means.
    """
    wanted = after["label"] > 0.5
    half = len(wanted) // 2
    if 2 * half == len(wanted) and wanted[:half].all() and not wanted[half:].any():
        old, new = (x["rewards"][:half] - x["rewards"][half:] for x in (before, after))
        return _ratio(old, new, np.ones(half))
    parts = [_ratio(before["rewards"][side], after["rewards"][side], np.ones(side.sum())) for side in (wanted, ~wanted)]
    good, bad = parts
    found = {name: good[name] - bad[name] for name in ("before", "after", "change")}
    return found | {"change_se": math.hypot(good["change_se"], bad["change_se"])}


def nll(before: Values, after: Values) -> dict[str, float]:
    """Nats a scored token, over all rows."""
    return _ratio(before["nll"], after["nll"], after["tokens"])


def row_nll(before: Values, after: Values) -> dict[str, float]:
    """Nats a token of the whole chosen rows, over all pairs."""
    return _ratio(before["nll/rows"], after["nll/rows"], after["rows_tokens"])


def gold_nll(before: Values, after: Values) -> dict[str, float]:
    """Nats a token of the gold responses, over all triples."""
    return _ratio(before["nll/gold"], after["nll/gold"], after["gold_tokens"])


def squared_error(before: Values, after: Values) -> dict[str, float]:
    """The mean over all scores of all rows."""
    return _ratio(before["loss"], after["loss"], after["scores"])


def rewards(before: Values, after: Values) -> dict[str, float]:
    """The mean reward of completions, an error over prompts."""
    return _ratio(before["reward"], after["reward"], np.ones(len(before["reward"])))


def _ratio(before: np.ndarray, after: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """sum / sum of weights before and after, and the change with its standard error over rows.

    The error is that of a ratio of two means (Cochran 1977, Sampling Techniques, 6.4); of a mean where all weights are
    one.
    """
    old, new, weight = (np.asarray(x, np.float64) for x in (before, after, weight))
    change = (new - old).sum() / weight.sum()
    n, residual = len(old), new - old - change * weight
    error = math.sqrt((residual**2).sum() * n / (n - 1)) / weight.sum()
    return {"before": old.sum() / weight.sum(), "after": new.sum() / weight.sum(), "change": change, "change_se": error}


MEASURES = {
    "pairs": ("reward margin", margins, +1),
    "triples": ("nats a token of the gold response", gold_nll, -1),
    "labelled": ("reward margin", labelled_margins, +1),
    "singles": ("reward margin", labelled_margins, +1),
    "chats": ("nats a token", nll, -1),
    "scored": ("squared error", squared_error, -1),
    "prompts": ("reward", rewards, +1),
    "orpo": ("nats a token of the chosen conversation", row_nll, -1),
}
"""Kind of data, or loss -> what is measured, how, and where it should move."""


# ---- one run


def measure(name: str, seed: int) -> dict[str, Any]:
    """The entry of one run in the results file."""
    from jaxalign import config as config_lib
    from jaxalign import evals, objectives, train

    overrides = {**UNSHOWN, "seed": seed}
    config = config_lib.load(str(config_file(name)), [f"{key}={value}" for key, value in overrides.items()])
    loss = config.loss.name
    what, how, sign = MEASURES[loss if loss in MEASURES else objectives.kind_of(loss)]
    seen: list[Values] = []
    collect, completion_metrics = evals.collect, evals.completion_metrics

    def keep(*args: Any, **options: Any) -> Values:
        seen.append(collect(*args, **options))
        return seen[-1]

    def keep_rewards(names: Any, rewards_PNF: np.ndarray, reward_PN: np.ndarray, tokens_PN: np.ndarray) -> Any:
        if tokens_PN.any():  # else it is called for the names alone
            seen.append({"reward": reward_PN.mean(axis=1)})
        return completion_metrics(names, rewards_PNF, reward_PN, tokens_PN)

    # Evaluation logs means; the error of a change takes the values of each example.
    with (
        mock.patch.object(evals, "collect", keep),
        mock.patch.object(evals, "completion_metrics", keep_rewards),
        tempfile.TemporaryDirectory() as folder,
    ):
        config.workdir = folder
        began = time.perf_counter()
        train.run(config)
        seconds = time.perf_counter() - began
    found = {key: round(value, 4) for key, value in how(seen[0], seen[-1]).items()}
    rows = len(next(iter(seen[-1].values())))
    times = {"seconds": round(seconds), "cpu_seconds": round(time.process_time())}
    return {"metric": what, "sign": sign, **found, "rows": rows, **times}


def config_file(name: str) -> Path:
    return ROOT / "configs" / f"{name}.py"


def settings(name: str) -> dict[str, Any]:
    """The keys that a measured run sets, but for the seed and the folder: a result belongs to these."""
    from jaxalign import config as config_lib

    config = config_lib.load(str(config_file(name)), [f"{key}={value}" for key, value in UNSHOWN.items()])
    changed = config_lib.diff(config_lib.base(), config)
    return json.loads(json.dumps({key: value for key, _, value in changed if key not in ("seed", "workdir")}))


# ---- all of them


def names() -> list[str]:
    """The configs that are measured."""
    return sorted(path.stem for path in (ROOT / "configs").glob(PATTERN))


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over seeds, and the standard error of the change.

    All seeds are evaluated on the same rows, so that the rows' part of the error does not shrink with their number:
    it stands as it is (root mean square), and the seeds' part is added.
    """
    mean = {key: statistics.fmean(run[key] for run in runs) for key in ("before", "after", "change", "cpu_seconds")}
    rows = math.sqrt(statistics.fmean(run["change_se"] ** 2 for run in runs))
    seeds = statistics.stdev(run["change"] for run in runs) / math.sqrt(len(runs)) if len(runs) > 1 else 0.0
    return mean | {"change_se": math.hypot(rows, seeds)}


def render(results: Mapping[str, Any]) -> str:
    """The table of a results file, in Markdown."""
    lines = ["| config | held out | before | after | change | of its standard error | seeds | CPU s |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, entry in sorted(results.items()):
        runs = list(entry["seeds"].values())
        s = summary(runs)
        change = f"{s['change']:+.3f} ± {s['change_se']:.3f}"
        lines.append(
            f"| `{name}` | {runs[0]['metric']} | {s['before']:.3f} | {s['after']:.3f} | {change} | "
            f"{abs(s['change']) / s['change_se']:.1f}x | {', '.join(entry['seeds'])} | {s['cpu_seconds']:.0f} |"
        )
    return "\n".join(lines)


def sentence(entry: Mapping[str, Any]) -> str:
    """What the config's docstring says of its runs."""
    runs = list(entry["seeds"].values())
    s, first = summary(runs), runs[0]
    return (
        f"Expected time: {s['cpu_seconds']:.0f} s of CPU time, shared by two cores. Expected numbers: "
        f"{first['metric']} on {first['rows']} held-out examples {s['before']:.3f} before, {s['after']:.3f} after; "
        f"a change of {s['change']:+.3f} +- {s['change_se']:.3f} (standard error; seeds {', '.join(entry['seeds'])})."
    )


def write(results: Mapping[str, Any], root: Path = ROOT) -> None:
    """Puts the table into README.md and into the configs' docstrings what their runs gave."""
    readme = root / "README.md"
    block = re.compile(r"(<!-- objectives -->\n).*?(\n<!-- end objectives -->)", re.DOTALL)
    readme.write_text(block.sub(lambda match: match[1] + render(results) + match[2], readme.read_text()))
    for name, entry in results.items():
        file = root / "configs" / f"{name}.py"
        said = textwrap.fill(sentence(entry), 120, break_on_hyphens=False)
        before, _, after = re.split(
            r"(Expected time.*?)(?=\n\n|\n\"\"\")", file.read_text(), maxsplit=1, flags=re.DOTALL
        )
        file.write_text(before + said + after)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that a config's name is searched for")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--write", action="store_true", help="write README.md and the docstrings, and stop")
    parser.add_argument("--worker", nargs=3, metavar=("NAME", "SEED", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        name, seed, file = args.worker
        Path(file).write_text(json.dumps(measure(name, int(seed))))
        return
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    wanted = [] if args.write else [name for name in names() if re.search(args.only, name)]
    for name in wanted:
        entry = results.get(name, {})
        if entry.get("settings") != settings(name):
            entry = {"settings": settings(name), "seeds": {}}
        for seed in args.seeds.split(","):
            if seed in entry["seeds"]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "result.json"
                done = subprocess.run([sys.executable, __file__, "--worker", name, seed, file])
                if done.returncode:
                    print(f"{name}, seed {seed}: the run failed", file=sys.stderr)
                    break
                entry["seeds"][seed] = json.loads(file.read_text())
            results[name] = entry
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.write:
        write(results)
    print(render(results))


if __name__ == "__main__":
    main()
