"""A config's data as the model will see it: `python -m jaxalign.preview --config=configs/dpo_smollm2.py`.

    --rows=4     how many examples to show as tokens, with the mask
    --json       one JSON object on stdout instead of colours, with the fields of the first batch

Counts, lengths, what a batch holds, how much is padding, and which rows were left out and why. Only the tokenizer is
read, never a weight.
"""

import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jaxalign import build, objectives
from jaxalign import config as config_lib
from jaxalign.data.batching import ExampleSource
from jaxalign.data.sources import Prepared

PERCENTILES = (5, 50, 95, 100)
DROPPED_SHOWN = 10

# What follows the prompt in each sequence of an example.
RESPONSES = {
    "pairs": ("chosen", "rejected"),
    "labelled": ("completion", "mismatched"),
    "singles": ("completion",),
    "chats": ("answer",),
    "triples": ("chosen", "rejected", "reference"),
    "scored": ("completion",),
    "prompts": (),
}

# Two styles of each, by turns.
STYLES = {
    "chosen": ("black on green", "black on bright_green"),
    "rejected": ("black on yellow", "black on bright_yellow"),
    "mismatched": ("black on yellow", "black on bright_yellow"),
    "reference": ("black on cyan", "black on bright_cyan"),
}
UNSCORED = ("dim", "dim underline")

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
    packing: str = "off",
    packed_length: int | None = None,
    weigh: Callable[[np.ndarray, int], np.ndarray] | None = None,
    max_dropped_share: float = 0.1,
    rows: int = 4,
    rewards_known: bool = True,
) -> dict[str, Any]:
    """What there is to know about prepared examples, as plain values.

    Args:
        batch_size, seed, buckets, packing, packed_length, weigh: of the batches, as `ExampleSource` takes them.
        rewards_known: False where the rewards are what is learnt (see `batch_fields`).

    Returns:
        label, kind, format, transform, fingerprint; rows, kept, dropped {reason: count}, dropped_share, refused (a run
        would not start), truncated (examples), unfinished (sequences without an end-of-turn token that were not cut);
        size (examples, here: in this selection); lengths {prompt, then each response by its name: {percentile:
        tokens}}, responses without their prompt; values {name: {percentile: value}}; scored_share (of all tokens that
        are no padding); batches [{length, share of the batches, padding share}] and padding_share in all, but for
        prompts, of which a batch is made only in a run; examples [{row, prompt and responses: [[id, text, scored],
        ...], values: {name: value}, columns: {name: value} of prompts, as rewards get them}]; dropped_rows [{row,
        reason, detail, text}], the first ones; batch, the first one (see `batch_fields`).
    """
    meta = prepared.meta
    dropped = sum(meta["dropped"].values())
    prompts = prepared.prompt_lengths
    responses = prepared.lengths - prompts[:, None]
    source = ExampleSource(
        prepared, batch_size=batch_size, seed=seed, buckets=buckets, packing=packing, packed_length=packed_length
    )
    first = source.examples_of(0)
    weights = None if weigh is None else weigh(first, 0)
    return {
        "label": meta["label"],
        "kind": prepared.kind,
        "format": meta["format"],
        "transform": meta["transform"],
        "fingerprint": prepared.fingerprint,
        "rows": meta["rows"],
        "kept": meta["kept"],
        "dropped": dict(meta["dropped"]),
        "dropped_share": round(dropped / meta["rows"], 6),
        "refused": prepared.unusable > max_dropped_share * meta["rows"],
        "truncated": meta["truncated"],
        "unfinished": meta["unfinished"],
        "size": len(prepared),
        "lengths": {
            "prompt": _percentiles(prompts, int),
            **{name: _percentiles(responses[:, j], int) for j, name in enumerate(RESPONSES[prepared.kind])},
        },
        "values": {name: _percentiles(values) for name, values in _columns(prepared).items()},
        "scored_share": round(_scored(prepared) / int(prepared.lengths.sum()), 6),
        **(_batches(source) if RESPONSES[prepared.kind] else {}),
        "examples": [_example(prepared, i, tokenizer) for i in range(min(rows, len(prepared)))],
        "dropped_rows": [
            {**entry, "text": _excerpt(prepared.source_text(entry["row"]))}
            for entry, _ in zip(prepared.dropped(), range(DROPPED_SHOWN), strict=False)
        ],
        "batch": batch_fields(prepared, tokenizer, first, weights=weights, rewards_known=rewards_known),
    }


def batch_fields(
    prepared: Prepared,
    tokenizer: Any,
    examples: Sequence[int] | np.ndarray,
    *,
    weights: np.ndarray | None = None,
    rewards_known: bool = True,
) -> dict[str, list[Any]]:
    """Examples under the names of a batch of HALOs-like frameworks, one entry an example in each list.

    Returns:
        prompt (text), prompt_token_ids, prompt_attention_mask; and for N from 1, a response: generationN (text of
        prompt + response), generationN_response_only, generationN_token_ids and generationN_attention_mask (of
        prompt + response), generationN_reward, generationN_weight; of prompts there is none before a run. Ids are
        padded on the right to the longest of their list, where their mask is 0. Rewards are 1.0 for what is chosen or
        desirable and 0.0 for what is not; None for chats, scored examples, a third response, and where they are what is
        learnt (not `rewards_known`). Weights are `weights`, else those of a column, else 1.0.
    """
    examples = [int(i) for i in examples]
    prompts = [prepared.prompt(i) for i in examples]
    texts = tokenizer.batch_decode([ids.tolist() for ids in prompts])
    fields: dict[str, list[Any]] = {"prompt": texts, **_padded("prompt", prompts, prepared.pad_id)}
    if weights is None:
        weights = prepared.values.get("weight", np.ones(len(prepared), np.float32))[examples]
    # A labelled example's second sequence is another prompt's completion, which only the loss asks for.
    for j in range(1 if prepared.kind == "labelled" else len(RESPONSES[prepared.kind])):
        name = f"generation{j + 1}"
        wholes = [prepared.sequence(i, j)[0] for i in examples]
        decoded = tokenizer.batch_decode([ids.tolist() for ids in wholes])
        fields[name] = decoded
        fields[f"{name}_response_only"] = [
            # The rest of the text, so that prompt and response make the whole, unless a character spans the border.
            text[len(prompt) :] if text.startswith(prompt) else tokenizer.decode(ids[len(start) :].tolist())
            for text, prompt, ids, start in zip(decoded, texts, wholes, prompts, strict=True)
        ]
        fields |= _padded(name, wholes, prepared.pad_id)
        reward: list[float | None] = [None] * len(examples)
        if "label" in prepared.values:
            reward = prepared.values["label"][examples].tolist()
        elif rewards_known and prepared.kind in ("pairs", "triples") and j < 2:
            reward = [1.0 - j] * len(examples)
        fields[f"{name}_reward"] = reward
        fields[f"{name}_weight"] = weights.tolist()
    return fields


def _padded(name: str, rows: Sequence[np.ndarray], pad_id: int) -> dict[str, list[Any]]:
    longest = max(map(len, rows))
    return {
        f"{name}_token_ids": [ids.tolist() + [pad_id] * (longest - len(ids)) for ids in rows],
        f"{name}_attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows],
    }


def _columns(prepared: Prepared) -> dict[str, np.ndarray]:
    """Each column of numbers [N] by its name; scores are numbered."""
    found: dict[str, np.ndarray] = {}
    for name, values in prepared.values.items():
        found |= {name: values} if values.ndim == 1 else {f"{name}[{k}]": column for k, column in enumerate(values.T)}
    return found


def _scored(prepared: Prepared) -> int:
    """Tokens that are scored."""
    if prepared.kind == "chats":
        return sum(int(prepared.sequence(i, 0)[1].sum()) for i in range(len(prepared)))
    return int((prepared.lengths - prepared.prompt_lengths[:, None]).sum())


def _percentiles(values: np.ndarray, type: Callable[[Any], Any] = float) -> dict[str, Any]:
    return {str(p): type(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _batches(source: ExampleSource) -> dict[str, Any]:
    """The lengths of the first batches' rows, and the share of padding in them."""
    counts: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    places: Counter[int] = Counter()
    for step in range(min(source.steps(1), _BATCHES_LOOKED_AT)):
        batch = source(step)
        length = batch["tokens"].shape[1]
        counts[length] += 1
        tokens[length] += int(batch["lengths"].sum())
        places[length] += batch["tokens"].size
    return {
        "batches": [
            {
                "length": length,
                "share": round(counts[length] / counts.total(), 6),
                "padding_share": round(1 - tokens[length] / places[length], 6),
            }
            for length in sorted(counts)
        ],
        "padding_share": round(1 - tokens.total() / places.total(), 6),
    }


def _example(prepared: Prepared, i: int, tokenizer: Any) -> dict[str, Any]:
    border = int(prepared.prompt_lengths[i])
    ids, mask = prepared.sequence(i, 0)
    shown: dict[str, Any] = {"row": prepared.source_row(i), "prompt": _tokens(tokenizer, ids[:border], mask[:border])}
    for j, name in enumerate(RESPONSES[prepared.kind]):
        ids, mask = prepared.sequence(i, j)
        shown[name] = _tokens(tokenizer, ids[border:], mask[border:])
    if prepared.kind == "prompts":
        shown["columns"] = {name: value for name, (value,) in prepared.columns([i]).items()}
    return shown | {"values": {name: float(values[i]) for name, values in _columns(prepared).items()}}


def _tokens(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[tuple[int, str, bool]]:
    """(id, text, whether it is scored) of each token; a piece of a character is shown by the tokenizer's own name for
    it."""
    texts = [tokenizer.decode([int(token)]) for token in ids]
    names = tokenizer.convert_ids_to_tokens([int(token) for token in ids])
    return [
        (int(token), name if "\ufffd" in text else text, bool(scored))
        for token, text, name, scored in zip(ids, texts, names, mask, strict=True)
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
        for part in ("prompt", *RESPONSES[report["kind"]]):
            tokens = example[part]
            scored = sum(is_scored for *_, is_scored in tokens)
            of_these = "scored" if scored == len(tokens) else f"{scored} of them scored" if scored else "not scored"
            console.print(Text(f"{part}: {len(tokens)} tokens, {of_these}", style="bold"))
            console.print(_coloured(tokens, STYLES.get(part, STYLES["chosen"]), marked=not console.is_terminal))
        for name, value in example.get("columns", {}).items():
            console.print(Text.assemble((f"{name}: ", "bold"), _excerpt(value)))
        if example["values"]:
            console.print(", ".join(f"{name} {value:g}" for name, value in example["values"].items()), style="bold")
    console.rule(style="dim")
    formats = " as ".join(filter(None, (report["transform"], report["format"])))
    table = Table(title=Text(f"{report['label']} ({formats})"), show_header=False)
    for name, value in _facts(report):
        table.add_row(Text(name), Text(value))
    console.print(table)
    lengths = Table("tokens", *(f"{p}%" for p in report["lengths"]["prompt"]), title="by percentile")
    for part, values in (*report["lengths"].items(), *report["values"].items()):
        lengths.add_row(Text(part), *(f"{value:,}" for value in values.values()))
    console.print(lengths)
    if "batches" in report:
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


def _coloured(tokens: Sequence[tuple[int, str, bool]], styles: tuple[str, str], *, marked: bool) -> Any:
    """Tokens in two styles by turns, those that are not scored dim; `marked` puts a bar between them too, for output
    without colours, a double one where scoring begins or ends."""
    from rich.text import Text

    line = Text()
    for i, (_, text, scored) in enumerate(tokens):
        if marked and i:
            line.append("|" if scored == tokens[i - 1][2] else "‖")
        line.append(text.replace("\n", "⏎"), style=(styles if scored else UNSCORED)[i % 2])
        if text.endswith("\n"):
            line.append("\n")
    return line


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    here = f", {report['size']:,} of them here" * (report["size"] != report["kept"])
    facts = [("rows", f"{report['rows']:,}"), (f"kept ({report['kind']})", f"{report['kept']:,}{here}")]
    facts += [(f"left out: {reason}", f"{count:,}") for reason, count in report["dropped"].items()]
    facts.append(
        ("left out in all", f"{report['dropped_share']:.2%}" + ", too many: a run would refuse" * report["refused"])
    )
    if report["kind"] == "prompts":
        return facts
    facts += [
        ("examples cut to max_length", f"{report['truncated']:,}"),
        ("responses that never end (no eos)", f"{report['unfinished']:,}"),
        ("tokens scored", f"{report['scored_share']:.1%} of those that are no padding"),
        ("padding", f"{report['padding_share']:.1%}"),
    ]
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    """The command. Exits with 1 and a message where the data cannot be read."""
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    flags.DEFINE_integer("rows", 4, "Examples to show as tokens.", lower_bound=0, flag_values=values)
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
    terms, _ = config_lib.loss_arguments(config)
    batch_size = config.batch_size
    if data.train.kind == "prompts":  # the prompts whose completions are sampled at once
        batch_size = batch_size * config.rollout.steps_per_generation // config.rollout.num_generations
    reports = {
        name: preview(
            part,
            data.tokenizer,
            batch_size=batch_size,
            seed=config.seed,
            buckets=config.data.buckets or None,
            packing=config.data.packing,
            packed_length=config.data.packed_length,
            weigh=build.weigher(config.data.weight, part),
            max_dropped_share=allowed,
            rows=values.rows,
            rewards_known=all(objectives.LOSSES[term].head == "lm" for term in terms),
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
