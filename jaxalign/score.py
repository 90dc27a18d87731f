"""Rows scored by a reward model: `python -m jaxalign.score --model=PATH --data=rows.jsonl --out=scored.jsonl`.

    --model=PATH       a Hugging Face folder of a ...ForSequenceClassification, a hub id, or the folder of a run
    --adapter=FOLDER   PEFT adapters of a reward model that are merged into --model, which may be a language model
    --data=FILE        rows (jsonl, json, parquet, csv) with prompt and response (or completion), as text or as chat
                       messages; or with messages, a whole chat; or with chosen and rejected, beside a prompt or not
    --out=FILE.jsonl   the rows again, each with its score (of a pair score_chosen and score_rejected); else on stdout

A score is the head's output at the last token, `logits[0, 0]` of transformers. A model with several outputs writes all
of them under `scores` by their names, and their weighted sum as `score`. Text is scored as it stands and messages
through the model's chat template, as in training; --chat makes text messages. Of rows above --max_length tokens the
end is cut off. `score` does the same from Python. One process scores, on all devices that it has.
"""

import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxalign import generate, objectives, sharding
from jaxalign.data import chat
from jaxalign.data.batching import bucket_of, default_buckets
from jaxalign.models import ModelConfig, Params

CHUNK = 64  # batches whose rows are sorted by length together: what stays in memory, and what a stop loses
MAX_LENGTH = 512
RESPONSES = ("response", "completion")


@functools.partial(jax.jit, static_argnums=0)
def _outputs(cfg: ModelConfig, params: Params, batch: objectives.Batch) -> jax.Array:
    """`objectives.score`, whole on every device."""
    values = objectives.score(cfg, params, batch)
    return sharding.constrain(values, *(None,) * values.ndim)


def score(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_length: int = MAX_LENGTH,
    batch_size: int = 8,
    weights: Sequence[float] | None = None,
    column: str = "score",
    as_chat: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows in order, each a copy with its score.

    Args:
      cfg, params: of a model with a score head; on a mesh, call this under `sharding.use_mesh(mesh)`.
      rows: with `prompt` and `response` or `completion` (text or chat messages); with `messages`; or with `chosen` and
        `rejected`, beside a `prompt` that they follow or begin with, or without one.
      max_length: tokens of a row that are read, from its beginning; at most the model's positions.
      batch_size: sequences scored at once, of about the same length.
      weights: of the model's outputs in their sum; None: the model's own (`cfg.reward_weights`), else their mean.
      column: the name of what is added; several outputs stand under its plural.
      as_chat: a text prompt is a user's message, a text response the assistant's.

    Raises:
      ValueError: no score head, another number of weights, or a row that is none of the above or has the column.
    """
    weights_K = sum_weights(cfg, weights)
    max_length = min(max_length, cfg.max_position_embeddings)
    names = cfg.labels or tuple(map(str, range(cfg.num_labels)))
    groups = sharding.axis_size(sharding.ROWS, mesh)
    size = -(-batch_size // groups) * groups
    numbered = enumerate(rows)
    while chunk := list(itertools.islice(numbered, CHUNK * size)):
        sequences, owners = [], []
        for place, (number, row) in enumerate(chunk):
            for suffix, ids in _encode(tokenizer, row, number, column, as_chat):
                sequences.append(ids[:max_length])
                owners.append((place, suffix))
        scored = [dict(row) for _, row in chunk]
        found = values(cfg, params, sequences, size, max_length, mesh)
        for (place, suffix), outputs in zip(owners, found, strict=True):
            scored[place][f"{column}{suffix}"] = float(outputs @ weights_K)
            if cfg.num_labels > 1:
                scored[place][f"{column}s{suffix}"] = dict(zip(names, outputs.tolist(), strict=True))
        yield from scored


def sum_weights(cfg: ModelConfig, weights: Sequence[float] | None = None) -> np.ndarray:
    """What each of the model's K outputs counts in its score, [K] float64; see `score`.

    Raises:
      ValueError: no score head, or another number of weights.
    """
    if not cfg.num_labels:
        raise ValueError(
            "the model is a language model without a score head; scores come from a reward model "
            "(...ForSequenceClassification), which loss.name=reward trains"
        )
    weights = weights or cfg.reward_weights or (1 / cfg.num_labels,) * cfg.num_labels
    if len(weights) != cfg.num_labels:
        raise ValueError(f"{len(weights)} weights were given for the {cfg.num_labels} outputs of the model")
    return np.asarray(weights, np.float64)


def values(
    cfg: ModelConfig, params: Params, sequences: Sequence[Sequence[int]], size: int, max_length: int, mesh: Any
) -> np.ndarray:
    """The head's outputs [N, K] float64 of token sequences, `size` of them at a time, the longest first.

    Several processes call it alike, under `sharding.use_mesh(mesh)`.
    """
    own = slice(None) if mesh is None else sharding.process_rows(mesh, size)
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    outputs = np.zeros((len(sequences), cfg.num_labels))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        length = bucket_of(len(sequences[batch[0]]), default_buckets(max_length))
        tokens_RT = np.zeros((size, length), np.int32)  # what stands behind the last token is never attended to
        ends_R1 = np.full((size, 1), -1, np.int32)
        for row, n in enumerate(batch):
            tokens_RT[row, : len(sequences[n])] = sequences[n]
            ends_R1[row] = len(sequences[n]) - 1
        positions_RT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_RT.shape)
        leaves = {"tokens": tokens_RT, "positions": positions_RT, "ends": ends_R1}
        placed = sharding.place_batch(mesh, {name: leaf[own] for name, leaf in leaves.items()}, size)
        outputs[batch] = np.asarray(_outputs(cfg, params, placed)).reshape(size, -1)[: len(batch)]
    return outputs


def _encode(tokenizer: Any, row: Any, number: int, column: str, as_chat: bool) -> Iterator[tuple[str, list[int]]]:
    """(what its columns' names end with, token ids) of each sequence that a row gives."""
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is no JSON object with columns: {row!r:.100}")
    prompt = row.get("prompt")
    if row.get("chosen") is not None and row.get("rejected") is not None:
        answers = {"_chosen": row["chosen"], "_rejected": row["rejected"]}
    elif row.get("messages") is not None:
        prompt, answers = None, {"": row["messages"]}
    else:
        given = [name for name in RESPONSES if row.get(name) is not None]
        if prompt is None or not given:
            raise ValueError(
                f"row {number} has the columns {', '.join(row)}; expected prompt and response (or completion), "
                "messages, or chosen and rejected"
            )
        answers = {"": row[given[0]]}
    for suffix, answer in answers.items():
        if f"{column}{suffix}" in row:
            raise ValueError(
                f"row {number} has a column {column}{suffix} already: give the new one another name (column)"
            )
        try:
            ids = encode(tokenizer, prompt, answer, as_chat)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        if not ids:
            raise ValueError(f"row {number} has no tokens")
        yield suffix, ids


def encode(tokenizer: Any, prompt: Any, answer: Any, as_chat: bool = False) -> list[int]:
    """Token ids of prompt + answer (text, or chat messages), as training has them; `as_chat` as of `score`.

    Raises:
      ValueError: one is neither, or messages meet a tokenizer without a chat template.
    """
    if isinstance(answer, str) and not as_chat and (prompt is None or isinstance(prompt, str)):
        text, end = (prompt or "") + answer, tokenizer.eos_token or ""
        return chat.encode_prompt(tokenizer, text if text.endswith(end) else text + end)
    before, after = _messages(prompt, "user"), _messages(answer, "assistant")
    whole = after if after[: len(before)] == before else before + after
    text = chat.render(tokenizer, whole)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _messages(given: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    if not isinstance(given, Sequence | None) or not all(isinstance(message, Mapping) for message in given or ()):
        raise ValueError(f"got {given!r:.100}, expected text or chat messages")
    return [{key: value for key, value in message.items() if value is not None} for message in given or ()]


def define_flags(values: flags.FlagValues) -> None:
    """The command's flags."""
    text, number = flags.DEFINE_string, flags.DEFINE_integer
    text("model", None, "Hugging Face folder, hub id, package:NAME, or the folder of a run.", values)
    text("step", None, "Of a run: last (the default), best, or a step's number.", values)
    text("adapter", None, "PEFT folder with adapters for --model.", values)
    text("data", None, "File with the rows (jsonl, json, parquet, csv).", values)
    text("out", None, "File for the rows with their scores; else they go to stdout.", values)
    text("column", "score", "Name of the new column.", values)
    number("max_length", MAX_LENGTH, "Tokens of a row that are read.", 1, flag_values=values)
    number("batch_size", 8, "Sequences scored at once.", 1, flag_values=values)
    number(
        "tensor", 1, "Devices that the model is split over; the others take rows of their own.", 1, flag_values=values
    )
    flags.DEFINE_list("weights", None, "Weights of the outputs of a model with several, e.g. 1,1,-0.5.", values)
    flags.DEFINE_bool("chat", False, "Text prompts and responses are messages of a chat.", values)
    flags.DEFINE_bool("help", False, "Print the flags and stop.", values)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; mistakes are printed to stderr and end it with status 2."""
    values = flags.FlagValues()
    define_flags(values)
    try:
        if rest := values(list(sys.argv if argv is None else argv))[1:]:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return
        _run(values)
    except (flags.Error, ValueError) as error:
        _say(f"score: {error}")
        raise SystemExit(2) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(values: flags.FlagValues) -> None:
    from jaxalign.data import sources

    for name in ("model", "data"):
        if values[name].value is None:
            raise ValueError(f"--{name} is missing")
    if values.out is not None and not Path(values.out).expanduser().absolute().parent.is_dir():
        raise ValueError(f"--out={values.out}: its folder does not exist")
    weights = None if values.weights is None else [float(weight) for weight in values.weights]
    rows = sources.read_rows(values.data)
    n_devices = jax.device_count()
    mesh = None if n_devices == values.tensor == 1 else sharding.make_mesh(data=-1, tensor=values.tensor)
    model = generate.load(values.model, values.step, mesh, head="score", adapter=values.adapter)
    _say(f"{values.model} on {n_devices} devices; rows are cut to {values.max_length} tokens")
    began = said = time.monotonic()
    file = None if values.out is None else open(Path(values.out).expanduser(), "w", encoding="utf-8")
    with sharding.use_mesh(mesh), contextlib.nullcontext(sys.stdout) if file is None else file as out:
        scored = score(
            model.cfg,
            model.params,
            model.tokenizer,
            rows,
            max_length=values.max_length,
            batch_size=values.batch_size,
            weights=weights,
            column=values.column,
            as_chat=values.chat,
            mesh=mesh,
        )
        done = 0
        for row in scored:
            done += 1
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            if time.monotonic() - said > 10:
                said = time.monotonic()
                _say(f"{done} rows in {said - began:.0f} s")
    _say(f"{done} rows scored in {time.monotonic() - began:.1f} s with compilation")


if __name__ == "__main__":
    main()
