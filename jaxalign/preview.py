"""A config's data as the model will see it: `python -m jaxalign.preview --config=configs/dpo_smollm2.py`.

    --rows=4     how many pairs to show as tokens, with the mask
    --json       one JSON object on stdout instead of colours

Counts, lengths, what a batch holds, how much is padding, and which rows were left out and why. Only the tokenizer is
read, never a weight.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jaxalign import build
from jaxalign import config as config_lib
from jaxalign.data.batching import PairSource
from jaxalign.data.sources import Prepared

PERCENTILES = (5, 50, 95, 100)
DROPPED_SHOWN = 10

# Batches from which the share of padding is estimated: enough for a percent, and quick for a million rows.
_BATCHES_LOOKED_AT = 200
_EXCERPT = 160


def preview(
    prepared: Prepared,
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int = 0,
    buckets: Sequence[int] | None = None,
    max_dropped_share: float = 0.1,
    rows: int = 4,
) -> dict[str, Any]:
    """What there is to know about prepared pairs, as plain values.

    Returns:
        label, format, fingerprint; rows, kept, dropped {reason: count}, dropped_share, refused (a run would not start),
        truncated (pairs), unfinished (sides without an end-of-turn token that were not cut); pairs (here: in this
        selection); lengths {prompt, chosen, rejected: {percentile: tokens}}, responses without their prompt;
        scored_share (of all tokens that are no padding); batches [{length, share of the batches, padding share}] and
        padding_share in all; examples [{row, prompt, chosen, rejected: [[id, text], ...]}]; dropped_rows
        [{row, reason, detail, text}], the first ones.
    """
    meta = prepared.meta
    dropped = sum(meta["dropped"].values())
    prompts = prepared.prompt_lengths
    responses = prepared.lengths - prompts[:, None]
    batches = _batches(PairSource(prepared, batch_size=batch_size, seed=seed, buckets=buckets))
    return {
        "label": meta["label"],
        "format": meta["format"],
        "fingerprint": prepared.fingerprint,
        "rows": meta["rows"],
        "kept": meta["kept"],
        "dropped": dict(meta["dropped"]),
        "dropped_share": round(dropped / meta["rows"], 6),
        "refused": dropped > max_dropped_share * meta["rows"],
        "truncated": meta["truncated"],
        "unfinished": meta["unfinished"],
        "pairs": len(prepared),
        "lengths": {
            "prompt": _percentiles(prompts),
            "chosen": _percentiles(responses[:, 0]),
            "rejected": _percentiles(responses[:, 1]),
        },
        "scored_share": round(float(responses.sum() / prepared.lengths.sum()), 6),
        **batches,
        "examples": [_example(prepared, i, tokenizer) for i in range(min(rows, len(prepared)))],
        "dropped_rows": [
            {**entry, "text": _excerpt(prepared.source_text(entry["row"]))}
            for entry, _ in zip(prepared.dropped(), range(DROPPED_SHOWN), strict=False)
        ],
    }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    return {str(p): int(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _batches(source: PairSource) -> dict[str, Any]:
    """The lengths that the first batches are padded to, and the share of padding in them."""
    lengths = source.prepared.lengths
    counts: dict[int, int] = {}
    tokens: dict[int, int] = {}
    for step in range(min(source.steps(1), _BATCHES_LOOKED_AT)):
        pairs = source.pairs_of(step)
        length = source.length_of(pairs)
        counts[length] = counts.get(length, 0) + 1
        tokens[length] = tokens.get(length, 0) + int(lengths[pairs].sum())
    places = {length: count * length * 2 * source.batch_size for length, count in counts.items()}
    total = sum(counts.values())
    return {
        "batches": [
            {
                "length": length,
                "share": round(counts[length] / total, 6),
                "padding_share": round(1 - tokens[length] / places[length], 6),
            }
            for length in sorted(counts)
        ],
        "padding_share": round(1 - sum(tokens.values()) / sum(places.values()), 6),
    }


def _example(prepared: Prepared, i: int, tokenizer: Any) -> dict[str, Any]:
    chosen, rejected, border = prepared.pair(i)
    parts = {"prompt": chosen[:border], "chosen": chosen[border:], "rejected": rejected[border:]}
    return {"row": prepared.source_row(i), **{name: _tokens(tokenizer, ids) for name, ids in parts.items()}}


def _tokens(tokenizer: Any, ids: np.ndarray) -> list[tuple[int, str]]:
    """(id, text) of each token; a piece of a character is shown by the tokenizer's own name for it."""
    texts = [tokenizer.decode([int(token)]) for token in ids]
    names = tokenizer.convert_ids_to_tokens([int(token) for token in ids])
    return [
        (int(token), name if "\ufffd" in text else text) for token, text, name in zip(ids, texts, names, strict=True)
    ]


def _excerpt(row: Any) -> str:
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


def show(report: dict[str, Any], console: Any) -> None:
    """Prints a report of `preview` to a rich console: scored tokens in colour, those of the prompt dim."""
    from rich.table import Table
    from rich.text import Text

    for example in report["examples"]:
        console.rule(f"row {example['row']}", style="dim")
        for part, styles in (
            ("prompt", ("dim", "dim underline")),
            ("chosen", ("black on green", "black on bright_green")),
            ("rejected", ("black on yellow", "black on bright_yellow")),
        ):
            scored = "not scored" if part == "prompt" else "scored"
            console.print(Text(f"{part}: {len(example[part])} tokens, {scored}", style="bold"))
            console.print(_coloured(example[part], styles, marked=not console.is_terminal))
    console.rule(style="dim")
    table = Table(title=Text(f"{report['label']} ({report['format']})"), show_header=False)
    for name, value in _facts(report):
        table.add_row(Text(name), Text(value))
    console.print(table)
    lengths = Table("tokens", *(f"{p}%" for p in report["lengths"]["prompt"]), title="lengths by percentile")
    for part, values in report["lengths"].items():
        lengths.add_row(part, *(f"{value:,}" for value in values.values()))
    console.print(lengths)
    batches = Table("padded to", "share of batches", "of that padding")
    for batch in report["batches"]:
        batches.add_row(f"{batch['length']:,}", f"{batch['share']:.1%}", f"{batch['padding_share']:.1%}")
    console.print(batches)
    if report["dropped"]:
        table = Table("row", "left out because", "its text", title=f"the first of {sum(report['dropped'].values()):,}")
        for entry in report["dropped_rows"]:
            why = f"{entry['reason']} ({entry['detail']})" if entry["detail"] else entry["reason"]
            table.add_row(str(entry["row"]), Text(why), Text(entry["text"]))
        console.print(table)


def _coloured(tokens: Sequence[tuple[int, str]], styles: tuple[str, str], *, marked: bool) -> Any:
    """Tokens in two styles by turns; `marked` puts a bar between them too, for output without colours."""
    from rich.text import Text

    line = Text()
    for i, (_, text) in enumerate(tokens):
        if marked and i:
            line.append("|")
        line.append(text.replace("\n", "⏎"), style=styles[i % 2])
        if text.endswith("\n"):
            line.append("\n")
    return line


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("rows", f"{report['rows']:,}"),
        ("kept", f"{report['kept']:,}" + (f", {report['pairs']:,} of them here" * (report["pairs"] != report["kept"]))),
    ]
    facts += [(f"left out: {reason}", f"{count:,}") for reason, count in report["dropped"].items()]
    facts += [
        ("left out in all", f"{report['dropped_share']:.2%}" + ", too many: a run would refuse" * report["refused"]),
        ("pairs with a side cut to max_length", f"{report['truncated']:,}"),
        ("responses that never end (no eos)", f"{report['unfinished']:,}"),
        ("tokens scored", f"{report['scored_share']:.1%} of those that are no padding"),
        ("padding", f"{report['padding_share']:.1%}"),
    ]
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 and a message where the data cannot be read."""
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    flags.DEFINE_integer("rows", 4, "Pairs to show as tokens.", lower_bound=0, flag_values=values)
    config = config_lib.parse(argv, values)
    allowed = config.data.max_dropped_share
    config.data.max_dropped_share = 1.0  # what is wrong with the rows is what one wants to see here
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("jaxalign").setLevel(logging.ERROR if values.json else logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            data = build.load_data(config, Path(scratch) / "dropped.jsonl")
    except ValueError as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    reports = {
        name: preview(
            part,
            data.tokenizer,
            batch_size=config.batch_size,
            seed=config.seed,
            buckets=config.data.buckets or None,
            max_dropped_share=allowed,
            rows=values.rows,
        )
        for name, part in (("train", data.train), ("eval", data.held_out))
        if part is not None
    }
    if values.json:
        json.dump(reports, sys.stdout, ensure_ascii=False)
        print()
        return
    from rich.console import Console

    console = Console()
    for name, report in reports.items():
        console.rule(f"{name} data", style="bold")
        show(report, console)


if __name__ == "__main__":
    main()
