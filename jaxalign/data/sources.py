"""Rows -> tokenized examples on disk, made once and memory-mapped."""

import atexit
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxalign import paths, user_code
from jaxalign.data import transform as transform_lib
from jaxalign.data.chat import template_of
from jaxalign.data.encoding import CHUNK, Task, assemble, encode_file, encode_lines, read_lines, run_workers
from jaxalign.data.formats import FORMATS, KINDS, TRAIN_ON, RowError, default_format, detect
from jaxalign.data.prepared import ARRAYS, Prepared, open_prepared, split_by_hash
from jaxalign.data.rows import Rows, digest, read_rows, to_json
from jaxalign.data.tokenizers import Lazy

__all__ = ["Prepared", "Rows", "prepare", "read_rows", "split_by_hash"]

log = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same rows would become other tokens or other files.
VERSION = 4

# The number of rows from which worker processes pay for their start; and the rows that are tried before they do.
_WORKERS_FROM = 8000
_TRIED = 32


def prepare(
    source: Any,
    *,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int | None = None,
    format: str = "auto",
    format_options: Mapping[str, Any] | None = None,
    on_long: str = "truncate",
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    cache_dir: paths.PathLike | None = None,
    dropped_path: paths.PathLike | None = None,
    max_dropped_share: float = 0.1,
    workers: int | None = None,
    kind: str = "pairs",
    train_on: str = "assistant",
    score_columns: Sequence[str] = (),
    weight_column: str | None = None,
) -> Prepared:
    """Tokenized examples of a source: from the cache if the same was made before, else made on all cores and cached.

    A sequence keeps its first `max_length` tokens. A row is dropped if it cannot be read or be an example of this
    kind, a response is empty or blank, chosen and rejected are equal (before or after the cut), nothing that is scored
    is left, or a number that it should have is missing, NaN or infinite, or a weight is negative.

    Args:
        source: see `read_rows`, as are split, name and limit.
        tokenizer: a fast tokenizer of transformers, or a `tokenizers.Lazy` one, which is not read if all is cached.
        max_length: most tokens of prompt + response.
        max_prompt_length: examples with a longer prompt are dropped; a prompt is never cut.
        format: a name in FORMATS, or "auto": chosen by the first rows, and logged. Or a function of the user's own (see
            `transform.load`), whose rows are then read by "auto".
        format_options: what such a function finds in cfg["datasets"][0] beside path, split, name and type.
        on_long: "truncate", or "drop" for examples with a sequence of more than `max_length` tokens.
        cache_dir: a folder private to the user is made here; None: `$XDG_CACHE_HOME/jaxalign/data`. What is kept in a
            bucket is copied to a temporary folder, which lasts as long as this process.
        dropped_path: where the rows that were left out are listed: {"row", "reason", "detail"} a line.
        max_dropped_share: more than this share of dropped rows raises, those apart that a format has left out.
        workers: processes; None: one a core for large sources, none for small ones.
        kind: what an example is, a name in `formats.KINDS`; rows of other kinds are turned into it where that makes
            sense (see `formats.convert`). Pairs have a margin where a row has the column `margin`.
            Of `prompts` no response is kept, and `on_long` does not matter.
        train_on: of `chats`, what is scored of a row that is a conversation (see `chat.encode`). A row that names its
            prompt scores the completion, but for "all".
        score_columns: of `scored`, the columns that hold the scores.
        weight_column: the column that holds the weight of an example.

    Raises:
        ValueError: an argument is wrong, the source cannot be read, no example is left, or too many were dropped.
    """
    _check("max_length", max_length, max_length >= 2, "at least 2 tokens")
    is_function = user_code.is_function(format)
    known = format == "auto" or format in FORMATS or is_function
    _check("format", format, known, f"auto, FILE.function or one of {', '.join(FORMATS)}")
    _check("format_options", format_options, is_function or not format_options, "none, as format is no function")
    _check("kind", kind, kind in KINDS, f"one of {', '.join(KINDS)}")
    _check("train_on", train_on, train_on in TRAIN_ON, f"one of {', '.join(TRAIN_ON)}")
    _check(
        "score_columns", score_columns, bool(score_columns) == (kind == "scored"), "columns if kind is scored, else ()"
    )
    _check("on_long", on_long, on_long in ("truncate", "drop"), "truncate or drop")
    _check("max_dropped_share", max_dropped_share, 0 <= max_dropped_share <= 1, "a share from 0 to 1")
    rows = read_rows(source, split=split, name=name, limit=limit)
    kept_in = _cache_root(cache_dir)
    facts = _facts(tokenizer, kept_in)
    transform = None
    if is_function:
        dataset = {"path": rows.label, "split": split, "name": name, "type": format, **(format_options or {})}
        transform, format = transform_lib.load(format, dataset=dataset), "auto"
    scored_part = train_on if kind == "chats" else None
    options = (kind, format, max_length, max_prompt_length, on_long, scored_part, list(score_columns), weight_column)
    transformed = () if transform is None else (transform.identity, dict(format_options or {}))
    key = digest(VERSION, rows.fingerprint, _versions(), facts.key, options, *transformed)
    remote = kept_in / key if paths.is_remote(kept_in) else None
    folder = Path(kept_in / key) if remote is None else _temporary() / key
    if remote is not None:
        _fetch(remote, folder)
    prepared = open_prepared(folder, kept_in, facts.pad_id)
    if prepared is None:
        task = Task(
            *options,
            chat_template=template_of(tokenizer),
            tokenizer=_tokenizer_json(tokenizer),
            special_tokens=_special_tokens(tokenizer),
        )
        prepared = _make(folder, kept_in, rows, task, tokenizer, facts, workers, transform)
        if remote is not None:
            for name in [*prepared.meta["sizes"], "meta.json"]:  # the last one says that all are there
                paths.upload(folder / name, remote / name)
    else:
        log.info("%s: %d %s from the cache %s", rows.label, len(prepared), kind, remote or folder)
    if dropped_path is not None:
        paths.make_folder(paths.at(dropped_path).parent)
        paths.replace(dropped_path, (folder / "dropped.jsonl").read_bytes())
    _check_dropped(prepared, rows.label, max_dropped_share, dropped_path or folder / "dropped.jsonl")
    return prepared


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r}, expected {expected}")


def _check_dropped(prepared: Prepared, label: str, allowed: float, listed: Any) -> None:
    total, kept, reasons = prepared.meta["rows"], prepared.meta["kept"], prepared.meta["dropped"]
    dropped = sum(reasons.values())
    counts = "\n".join(f"  {count:>8,} {reason}" for reason, count in reasons.items())
    if total == 0:
        raise ValueError(f"{label} has no rows")
    if kept == 0 or prepared.unusable > allowed * total:
        columns = ", ".join(prepared.meta["columns"])
        verdict = f"more than max_dropped_share={allowed:g} allows" if kept else "so none is left"
        raise ValueError(
            f"{label}: {dropped:,} of {total:,} rows ({dropped / total:.1%}) cannot be used, {verdict}:\n{counts}\n"
            f"Each is listed with its number in {listed}; the columns are {columns}. Repair the "
            f"data, raise max_length ({prepared.meta['max_length']}) if prompts are too long, name the format "
            f"({', '.join(FORMATS)}, FILE.function; it was {prepared.meta['format']}), or raise "
            "data.max_dropped_share."
        )
    if dropped:
        log.warning("%s: dropped %d of %d rows (listed in %s):\n%s", label, dropped, total, listed, counts)


class _Facts(NamedTuple):
    """What has to be known of a tokenizer to find and use the rows that it has made.

    key: a hash of its rules, special tokens and template. pad_id: what batches are filled up with.
    """

    key: str
    pad_id: int
    vocab_size: int


def _facts(tokenizer: Any, kept_in: epath.Path) -> _Facts:
    """The facts of a tokenizer; of a lazy one those that were found the last time, if there are any."""
    file = None
    if isinstance(tokenizer, Lazy):
        name = digest(VERSION, _versions(), tokenizer.identity)
        file = kept_in / f"tokenizer-{name}.json"
        if file.exists():
            return _Facts(**paths.read_json(file))
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer of transformers, which is what data needs")
    facts = _Facts(
        key=digest(_tokenizer_json(tokenizer), _special_tokens(tokenizer), template_of(tokenizer)),
        pad_id=next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None),
            0,  # any id will do: a pad is never scored and never attended to
        ),
        vocab_size=len(tokenizer),
    )
    if file is not None:
        paths.replace(file, json.dumps(facts._asdict()).encode())
    return facts


def _special_tokens(tokenizer: Any) -> dict[str, str]:
    return {key: str(token) for key, token in tokenizer.special_tokens_map.items() if key.endswith("_token")}


def _tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer's rules as JSON, without the padding and truncation that its last caller happened to set."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: value for key, value in rules.items() if key not in ("padding", "truncation")})


def _versions() -> list[str]:
    return [version("tokenizers"), version("transformers")]


def _cache_root(cache_dir: paths.PathLike | None) -> epath.Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign" / "data"
    root = default if cache_dir is None else cache_dir
    paths.check_bucket(root)
    try:
        return paths.make_folder(root, private=True)
    except OSError as error:
        raise ValueError(
            f"the cache folder {root} cannot be made ({error.strerror}): give data.cache_dir a folder that can be "
            "written"
        ) from error


@cache
def _temporary() -> Path:
    """A folder that is deleted when this process ends: arrays are memory-mapped, which a bucket can't be."""
    folder = tempfile.TemporaryDirectory(prefix="jaxalign-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _fetch(remote: epath.Path, folder: Path) -> None:
    """Copies prepared data out of a bucket, if it is there and not yet here."""
    if folder.exists() or not (remote / "meta.json").exists():
        return
    folder.mkdir()
    meta = (remote / "meta.json").read_bytes()
    for name in json.loads(meta)["sizes"]:
        paths.download(remote / name, folder / name)
    (folder / "meta.json").write_bytes(meta)


def _make(
    folder: Path,
    kept_in: epath.Path,
    rows: Rows,
    task: Task,
    tokenizer: Any,
    facts: _Facts,
    workers: int | None,
    transform: transform_lib.Transform | None,
) -> Prepared:
    started = time.monotonic()
    _sweep(folder.parent)
    work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))  # mkdtemp: for this user alone
    try:
        text_offsets, task, columns = _write_texts(rows, work, task, transform, tokenizer)
        total = len(text_offsets) - 1
        if workers is None:
            workers = _cores() if total >= _WORKERS_FROM and sys.executable else 0
        log.info("%s: tokenizing %d rows (%s) as %s", rows.label, total, task.format, task.kind)
        starts = range(0, total, CHUNK)
        if workers > 1:
            # What is wrong with the template or the tokenizer itself shows here, as an error that names it.
            encode_lines(read_lines(work, text_offsets[: _TRIED + 1]), 0, task, tokenizer)
            run_workers(work, task, workers, total)
        else:
            for start in starts:
                encode_file(work, start, task, tokenizer)
        meta = assemble(work, starts, task)
        meta |= {"label": rows.label, "rows": total, "columns": columns, "vocab_size": facts.vocab_size}
        meta["transform"] = transform and transform.name
        meta["sizes"] = {
            name: (work / name).stat().st_size
            for name in [*(f"{key}.npy" for key in ARRAYS), "texts.jsonl", "dropped.jsonl"]
        }
        (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        prepared = _publish(work, folder, kept_in, facts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info(
        "%s: %d %s in %.1f s, cached in %s", rows.label, len(prepared), task.kind, time.monotonic() - started, folder
    )
    return prepared


def _publish(work: Path, folder: Path, kept_in: epath.Path, facts: _Facts) -> Prepared:
    """Renames the finished folder into place. Another process may have been faster: then its equal work is used."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            work.rename(folder)
        prepared = open_prepared(folder, kept_in, facts.pad_id)
        if prepared is not None:
            return prepared
        shutil.rmtree(folder, ignore_errors=True)  # what lay there is damaged
    raise OSError(f"the prepared data cannot be written to {folder}; set the cache folder to one that can be written")


def _sweep(root: Path) -> None:
    """Removes what killed runs left behind more than a day ago."""
    for left in root.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write_texts(
    rows: Rows, work: Path, task: Task, transform: transform_lib.Transform | None, tokenizer: Any
) -> tuple[np.ndarray, Task, list[str]]:
    """Writes each row, transformed, as a line of texts.jsonl. Returns where they begin [rows + 1] int64, the task with
    what they told of it, and the columns of the first row."""
    offsets, columns, margin, format = [0], None, False, task.format
    refused: dict[str, tuple[str, str]] = {}
    with open(work / "texts.jsonl", "wb") as out:
        for number, row in enumerate(rows):
            if transform is not None:
                try:
                    row = transform(row, tokenizer)
                except RowError as error:
                    refused[str(number)] = (error.reason, error.detail)
            if isinstance(row, Mapping):
                columns = columns or [str(column) for column in row]
                margin = margin or row.get("margin") is not None
            if format == "auto" and str(number) not in refused and (found := detect(row, task.kind)):
                format = found
                log.info("%s: the rows look like the format %s", rows.label, format)
            offsets.append(offsets[-1] + out.write(to_json(row) + b"\n"))
    if format == "auto":
        format = default_format(task.kind)  # no row told; its errors say what is missing
    text_offsets = np.asarray(offsets, np.int64)
    np.save(work / "text_offsets.npy", text_offsets)
    task = replace(task, format=format, margin=margin and task.kind == "pairs", refused=refused)
    return text_offsets, task, columns or []
