"""Rows -> tokenized pairs on disk, made once and memory-mapped."""

import atexit
import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxalign import paths
from jaxalign.data.chat import EncodedPair, encode_pairs, template_of
from jaxalign.data.formats import FORMATS, Example, RowError, detect
from jaxalign.data.rows import Rows, digest, read_rows, to_json
from jaxalign.data.tokenizers import Lazy

__all__ = ["Prepared", "Rows", "prepare", "read_rows", "split_by_hash"]

log = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same rows would become other tokens or other files.
VERSION = 2

# Rows handed to the tokenizer at once; the number of rows from which worker processes pay for their start; and the rows
# that are tried before they do.
_CHUNK = 1000
_WORKERS_FROM = 8000
_TRIED = 32

_ARRAYS = ("tokens", "offsets", "prompt_lengths", "rows", "prompt_hashes", "text_offsets")


@dataclass(frozen=True)
class Prepared:
    """Tokenized pairs, memory-mapped; or a selection of them. Pair i of N has its own tokens, lengths and text.

    Attributes:
        index: [N] int64, places of these pairs in the cached arrays.
        fingerprint: hash of the tokens of these pairs in this order; equal for equal tokens wherever they came from.
        meta: of the whole cached set: label, format, rows, kept, dropped {reason: rows}, truncated (pairs with a side
            that was cut), unfinished (sides that were not cut and hold no eos), max_length, columns, vocab_size (the
            tokenizer's).
        pad_id: what batches are filled up with.
        folder: where the arrays, `texts.jsonl` and `dropped.jsonl` lie.
        kept_in: the folder of the cache that holds all that was prepared: above `folder`, or in a bucket.
    """

    folder: Path
    kept_in: epath.Path
    meta: Mapping[str, Any]
    fingerprint: str
    pad_id: int
    index: np.ndarray = field(repr=False)
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N, 2] int32: tokens of prompt + chosen and of prompt + rejected."""
        return np.diff(self.arrays["offsets"]).astype(np.int32).reshape(-1, 2)[self.index]

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """[N] int32: tokens of the prompt, shared by both sides and not scored."""
        return np.asarray(self.arrays["prompt_lengths"])[self.index]

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids of prompt + chosen, ids of prompt + rejected, length of the prompt), ids int32."""
        at = int(self.index[i])
        start, middle, end = (int(offset) for offset in self.arrays["offsets"][2 * at : 2 * at + 3])
        tokens = self.arrays["tokens"]
        return tokens[start:middle], tokens[middle:end], int(self.arrays["prompt_lengths"][at])

    def prompt(self, i: int) -> np.ndarray:
        """Ids of pair i's prompt [P] int32, to generate from."""
        chosen, _, border = self.pair(i)
        return chosen[:border]

    def source_row(self, i: int) -> int:
        """The number of pair i's row in the source, from 0."""
        return int(self.arrays["rows"][self.index[i]])

    def text(self, i: int) -> Any:
        """Pair i's row as it stood in the source."""
        return self.source_text(self.source_row(i))

    def source_text(self, row: int) -> Any:
        """Row `row` of the source, kept or dropped."""
        start, end = self.arrays["text_offsets"][row : row + 2]
        with open(self.folder / "texts.jsonl", "rb") as stream:
            stream.seek(int(start))
            return json.loads(stream.read(int(end - start)))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """{row, reason, detail} of each row of the source that was left out."""
        with open(self.folder / "dropped.jsonl", "rb") as stream:
            yield from map(json.loads, stream)

    def select(self, places: np.ndarray) -> "Prepared":
        """The pairs at these places (into this selection), in their order."""
        index = self.index[np.asarray(places, np.int64)]
        fingerprint = self.fingerprint
        if not np.array_equal(index, self.index):
            fingerprint = digest(self.meta["fingerprint"], hashlib.sha256(index.tobytes()).hexdigest())
        return replace(self, index=index, fingerprint=fingerprint)


def split_by_hash(prepared: Prepared, fraction: float) -> tuple[Prepared, Prepared]:
    """(train, held out): a prompt goes by its hash, so it is never in both, and where it goes depends on it alone.

    About `fraction` of the prompts are held out. Raises ValueError if either part is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.eval.fraction must lie between 0 and 1, got {fraction}")
    held_out = np.asarray(prepared.arrays["prompt_hashes"])[prepared.index] < np.uint64(int(fraction * 2**64))
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"data.eval.fraction={fraction} puts {int(held_out.sum())} of {len(prepared)} pairs into the held-out "
            "part: take another fraction, or give data.eval.path a file of its own"
        )
    return prepared.select(np.flatnonzero(~held_out)), prepared.select(np.flatnonzero(held_out))


def prepare(
    source: Any,
    *,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int | None = None,
    format: str = "auto",
    on_long: str = "truncate",
    chat_template: str | None = None,
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    cache_dir: paths.PathLike | None = None,
    dropped_path: paths.PathLike | None = None,
    max_dropped_share: float = 0.1,
    workers: int | None = None,
) -> Prepared:
    """Tokenized pairs of a source: from the cache if the same was made before, else made on all cores and cached.

    Both sides keep their first `max_length` tokens. A pair is dropped if its row cannot be read, a side is empty or
    blank, both sides are equal (before or after the cut), or the prompt leaves no room for a response.

    Args:
        source: see `read_rows`, as are split, name and limit.
        tokenizer: a fast tokenizer of transformers, or a `tokenizers.Lazy` one, which is not read if all is cached.
        max_length: most tokens of prompt + response.
        max_prompt_length: pairs with a longer prompt are dropped; a prompt is never cut.
        format: a name in FORMATS, or "auto": chosen by the first rows, and logged.
        on_long: "truncate", or "drop" for pairs with a side of more than `max_length` tokens.
        chat_template: in place of the tokenizer's own.
        cache_dir: a folder private to the user is made here; None: `$XDG_CACHE_HOME/jaxalign/data`. What is kept in a
            bucket is copied to a temporary folder, which lasts as long as this process.
        dropped_path: where the rows that were left out are listed: {"row", "reason", "detail"} a line.
        max_dropped_share: more than this share of dropped rows raises.
        workers: processes; None: one a core for large sources, none for small ones.

    Raises:
        ValueError: an argument is wrong, the source cannot be read, no pair is left, or too many were dropped.
    """
    _check("max_length", max_length, max_length >= 2, "at least 2 tokens")
    _check("format", format, format == "auto" or format in FORMATS, f"auto or one of {', '.join(FORMATS)}")
    _check("on_long", on_long, on_long in ("truncate", "drop"), "truncate or drop")
    _check("max_dropped_share", max_dropped_share, 0 <= max_dropped_share <= 1, "a share from 0 to 1")
    if chat_template is not None:
        _check("chat_template", chat_template, "{" in chat_template, "the text of a Jinja template")
    rows = read_rows(source, split=split, name=name, limit=limit)
    kept_in = _cache_root(cache_dir)
    facts = _facts(tokenizer, chat_template, kept_in)
    options = (format, max_length, max_prompt_length, on_long)
    key = digest(VERSION, rows.fingerprint, _versions(), facts.key, options)
    remote = kept_in / key if paths.is_remote(kept_in) else None
    folder = Path(kept_in / key) if remote is None else _temporary() / key
    if remote is not None:
        _fetch(remote, folder)
    prepared = _open(folder, kept_in, facts)
    if prepared is None:
        task = _Task(
            *options,
            chat_template=template_of(tokenizer, chat_template),
            tokenizer=_tokenizer_json(tokenizer),
            special_tokens=_special_tokens(tokenizer),
        )
        prepared = _make(folder, kept_in, rows, task, tokenizer, facts, workers)
        if remote is not None:
            for name in [*prepared.meta["sizes"], "meta.json"]:  # the last one says that all are there
                paths.upload(folder / name, remote / name)
    else:
        log.info("%s: %d pairs from the cache %s", rows.label, len(prepared), remote or folder)
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
    if kept == 0 or dropped > allowed * total:
        columns = ", ".join(prepared.meta["columns"])
        verdict = f"more than max_dropped_share={allowed:g} allows" if kept else "so none is left"
        raise ValueError(
            f"{label}: {dropped:,} of {total:,} rows ({dropped / total:.1%}) cannot be used, {verdict}:\n{counts}\n"
            f"Each is listed with its number in {listed}; the columns are {columns}. Repair the "
            f"data, raise max_length ({prepared.meta['max_length']}) if prompts are too long, name the format "
            f"({', '.join(FORMATS)}; it was {prepared.meta['format']}), or raise data.max_dropped_share."
        )
    if dropped:
        log.warning("%s: dropped %d of %d rows (listed in %s):\n%s", label, dropped, total, listed, counts)


@dataclass(frozen=True)
class _Task:
    """Everything that decides what a row becomes; goes to the workers as JSON."""

    format: str
    max_length: int
    max_prompt_length: int | None
    on_long: str
    chat_template: str | None
    tokenizer: str = field(repr=False)
    special_tokens: Mapping[str, str]


@dataclass
class _Chunk:
    """What a run of rows became; the lists are one entry a pair (tokens: two a pair)."""

    tokens: list[list[int]] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    prompt_hashes: list[int] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    truncated: int = 0
    unfinished: int = 0


class _Facts(NamedTuple):
    """What has to be known of a tokenizer to find and use the rows that it has made.

    key: a hash of its rules, special tokens and template. pad_id: what batches are filled up with.
    """

    key: str
    pad_id: int
    vocab_size: int


def _facts(tokenizer: Any, chat_template: str | None, kept_in: epath.Path) -> _Facts:
    """The facts of a tokenizer; of a lazy one those that were found the last time, if there are any."""
    file = None
    if isinstance(tokenizer, Lazy):
        name = digest(VERSION, _versions(), tokenizer.identity, chat_template)
        file = kept_in / f"tokenizer-{name}.json"
        if file.exists():
            return _Facts(**paths.read_json(file))
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer of transformers, which is what data needs")
    template = template_of(tokenizer, chat_template)
    facts = _Facts(
        key=digest(_tokenizer_json(tokenizer), _special_tokens(tokenizer), template),
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


def _open(folder: Path, kept_in: epath.Path, facts: _Facts) -> Prepared | None:
    """The prepared data of a cache folder, or None if there is none or a file is not as long as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        arrays = {key: _load(folder / f"{key}.npy", mapped=meta["kept"] > 0) for key in _ARRAYS}
    except (OSError, ValueError, KeyError):
        return None
    index = np.arange(meta["kept"], dtype=np.int64)
    return Prepared(folder, kept_in, meta, meta["fingerprint"], facts.pad_id, index, arrays)


def _load(file: Path, *, mapped: bool) -> np.ndarray:
    """An array, mapped unless it may be empty (which cannot be)."""
    return np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)


def _make(
    folder: Path,
    kept_in: epath.Path,
    rows: Rows,
    task: _Task,
    tokenizer: Any,
    facts: _Facts,
    workers: int | None,
) -> Prepared:
    started = time.monotonic()
    _sweep(folder.parent)
    work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))  # mkdtemp: for this user alone
    try:
        text_offsets, chosen_format, columns = _write_texts(rows, work, task.format)
        task = replace(task, format=chosen_format)
        total = len(text_offsets) - 1
        if workers is None:
            workers = _cores() if total >= _WORKERS_FROM and sys.executable else 0
        log.info("%s: tokenizing %d rows as %s", rows.label, total, chosen_format)
        starts = range(0, total, _CHUNK)
        if workers > 1:
            # What is wrong with the template or the tokenizer itself shows here, as an error that names it.
            _encode(_read_lines(work, text_offsets[: _TRIED + 1]), 0, task, tokenizer)
            _run_workers(work, task, workers, total)
        else:
            for start in starts:
                _encode_file(work, start, task, tokenizer)
        meta = _assemble(work, starts, text_offsets)
        meta |= {
            "label": rows.label,
            "format": chosen_format,
            "rows": total,
            "columns": columns,
            "max_length": task.max_length,
            "vocab_size": facts.vocab_size,
        }
        meta["sizes"] = {
            name: (work / name).stat().st_size
            for name in [*(f"{key}.npy" for key in _ARRAYS), "texts.jsonl", "dropped.jsonl"]
        }
        (work / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        prepared = _publish(work, folder, kept_in, facts)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("%s: %d pairs in %.1f s, cached in %s", rows.label, len(prepared), time.monotonic() - started, folder)
    return prepared


def _publish(work: Path, folder: Path, kept_in: epath.Path, facts: _Facts) -> Prepared:
    """Renames the finished folder into place. Another process may have been faster: then its equal work is used."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            work.rename(folder)
        prepared = _open(folder, kept_in, facts)
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


def _write_texts(rows: Rows, work: Path, format: str) -> tuple[np.ndarray, str, list[str]]:
    """Writes each row as a line of texts.jsonl. Returns where they begin [rows + 1] int64, the format, the columns."""
    offsets, columns = [0], None
    with open(work / "texts.jsonl", "wb") as out:
        for row in rows:
            if columns is None and isinstance(row, Mapping):
                columns = [str(column) for column in row]
            if format == "auto" and (found := detect(row)):
                format = found
                log.info("%s: the rows look like the format %s", rows.label, format)
            offsets.append(offsets[-1] + out.write(to_json(row) + b"\n"))
    if format == "auto":
        format = "pairs"  # no row told; its errors say what is missing
    text_offsets = np.asarray(offsets, np.int64)
    np.save(work / "text_offsets.npy", text_offsets)
    return text_offsets, format, columns or []


def _run_workers(work: Path, task: _Task, workers: int, total: int) -> None:
    """Encodes all chunks in processes of their own. Started as fresh interpreters (not spawned or forked by
    multiprocessing), they neither import the caller's script again nor inherit the threads of a device runtime."""
    (work / "task.json").write_text(json.dumps({key: getattr(task, key) for key in task.__dataclass_fields__}))
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    command = (
        "import sys; from jaxalign.data.sources import encode_worker; "
        "encode_worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    )
    logs = [open(work / f"worker-{n}.log", "wb") for n in range(workers)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(work), str(n), str(workers)],
            stdin=subprocess.DEVNULL,
            stdout=logs[n],
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )
        for n in range(workers)
    ]
    try:
        pending, told = dict(enumerate(processes)), time.monotonic()
        while pending:
            for n, process in list(pending.items()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                if process.returncode:
                    said = (work / f"worker-{n}.log").read_text(errors="replace").strip().splitlines()[-12:]
                    raise RuntimeError(f"tokenizing worker {n} ended with {process.returncode}:\n" + "\n".join(said))
                if process.returncode == 0:
                    del pending[n]
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.info("tokenized about %d of %d rows", _CHUNK * len(list(work.glob("chunk-*.json"))), total)
    finally:
        for process, stream in zip(processes, logs, strict=True):
            if process.poll() is None:
                process.kill()
                process.wait()
            stream.close()


def encode_worker(folder: str, worker: int, workers: int) -> None:
    """The body of a worker process: encodes each chunk whose number is `worker` modulo `workers`."""
    import transformers

    path = Path(folder)
    task = _Task(**json.loads((path / "task.json").read_text()))
    (path / f"tokenizer-{worker}.json").write_text(task.tokenizer, encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / f"tokenizer-{worker}.json"), **task.special_tokens
    )
    total = len(np.load(path / "text_offsets.npy", mmap_mode="r")) - 1
    for start in range(worker * _CHUNK, total, workers * _CHUNK):
        _encode_file(path, start, task, tokenizer)


def _encode_file(folder: Path, start: int, task: _Task, tokenizer: Any) -> None:
    """Encodes the chunk of rows from `start` of texts.jsonl into files beside it."""
    offsets = np.load(folder / "text_offsets.npy", mmap_mode="r")[start : start + _CHUNK + 1]
    chunk = _encode(_read_lines(folder, offsets), start, task, tokenizer)
    np.savez(
        folder / f"chunk-{start}.npz",
        tokens=np.fromiter(itertools.chain.from_iterable(chunk.tokens), np.int32),
        lengths=np.asarray([len(ids) for ids in chunk.tokens], np.int64),
        prompt_lengths=np.asarray(chunk.prompt_lengths, np.int32),
        rows=np.asarray(chunk.rows, np.int64),
        prompt_hashes=np.asarray(chunk.prompt_hashes, np.uint64),
    )
    counts = {"dropped": chunk.dropped, "truncated": chunk.truncated, "unfinished": chunk.unfinished}
    (folder / f"chunk-{start}.json").write_text(json.dumps(counts))


def _read_lines(folder: Path, offsets: np.ndarray) -> list[bytes]:
    """The rows of texts.jsonl between these neighbouring offsets."""
    with open(folder / "texts.jsonl", "rb") as stream:
        stream.seek(int(offsets[0]))
        return stream.read(int(offsets[-1] - offsets[0])).splitlines()


def _encode(lines: Sequence[bytes], first_row: int, task: _Task, tokenizer: Any) -> _Chunk:
    chunk = _Chunk()
    examples: list[Example] = []
    numbers: list[int] = []

    def drop(row: int, error: RowError) -> None:
        chunk.dropped.append({"row": row, "reason": error.reason, "detail": error.detail})

    for row, line in enumerate(lines, first_row):
        try:
            found = _read_example(line, task.format)
        except RowError as error:
            drop(row, error)
            continue
        examples += found
        numbers += [row] * len(found)
    encoded = encode_pairs(tokenizer, examples, chat_template=task.chat_template)
    for row, example, pair in zip(numbers, examples, encoded, strict=True):
        if isinstance(pair, EncodedPair):
            pair = _fit(pair, task)
        if isinstance(pair, RowError):
            drop(row, pair)
            continue
        cut = [len(ids) > task.max_length for ids in (pair.chosen, pair.rejected)]
        sides = [pair.chosen[: task.max_length], pair.rejected[: task.max_length]]
        chunk.tokens += sides
        chunk.prompt_lengths.append(pair.prompt_length)
        chunk.rows.append(row)
        prompt = json.dumps(example.prompt, sort_keys=True).encode()
        chunk.prompt_hashes.append(int.from_bytes(hashlib.sha256(prompt).digest()[:8], "big"))
        chunk.truncated += any(cut)
        chunk.unfinished += sum(
            not was_cut and tokenizer.eos_token_id not in ids[pair.prompt_length :]
            for was_cut, ids in zip(cut, sides, strict=True)
        )
    chunk.dropped.sort(key=lambda entry: entry["row"])
    return chunk


def _read_example(line: bytes, format: str) -> list[Example]:
    row = json.loads(line.decode("utf-8", errors="surrogatepass"))
    if isinstance(row, str):
        raise RowError("not JSON", "the line cannot be read")
    found = FORMATS[format](row)
    if found is None:
        raise RowError("left out by the format", format)
    return found if isinstance(found, list) else [found]


def _fit(pair: EncodedPair, task: _Task) -> EncodedPair | RowError:
    """The pair, if something of both responses remains within max_length and the remains differ."""
    longest = max(len(pair.chosen), len(pair.rejected))
    if pair.prompt_length >= task.max_length:
        return RowError("the prompt alone fills max_length", f"{pair.prompt_length} tokens")
    if task.max_prompt_length is not None and pair.prompt_length > task.max_prompt_length:
        return RowError("the prompt is longer than max_prompt_length", f"{pair.prompt_length} tokens")
    if task.on_long == "drop" and longest > task.max_length:
        return RowError("longer than max_length", f"{longest} tokens")
    if pair.chosen == pair.rejected:
        return RowError("chosen and rejected are equal", "once tokenized")
    if pair.chosen[: task.max_length] == pair.rejected[: task.max_length]:
        return RowError("chosen and rejected are equal after the cut to max_length", f"{longest} tokens")
    return pair


def _assemble(work: Path, starts: Iterable[int], text_offsets: np.ndarray) -> dict[str, Any]:
    """Joins the chunks into the final arrays, one chunk in memory at a time. Returns counts and the fingerprint."""
    parts: dict[str, list[np.ndarray]] = {key: [] for key in ("lengths", "prompt_lengths", "rows", "prompt_hashes")}
    reasons: Counter[str] = Counter()
    truncated = unfinished = 0
    content = hashlib.sha256()
    with open(work / "tokens.bin", "wb") as tokens, open(work / "dropped.jsonl", "w", encoding="utf-8") as dropped:
        for start in starts:
            with np.load(work / f"chunk-{start}.npz", allow_pickle=False) as chunk:
                ids = chunk["tokens"].tobytes()
                for key, values in parts.items():
                    values.append(chunk[key])
            tokens.write(ids)
            content.update(ids)
            counts = json.loads((work / f"chunk-{start}.json").read_text())
            for entry in counts["dropped"]:
                dropped.write(json.dumps(entry, ensure_ascii=False) + "\n")
                reasons[entry["reason"]] += 1
            truncated += counts["truncated"]
            unfinished += counts["unfinished"]
    empty = {"lengths": np.int64, "prompt_lengths": np.int32, "rows": np.int64, "prompt_hashes": np.uint64}
    joined = {key: np.concatenate([np.empty(0, empty[key]), *values]) for key, values in parts.items()}
    offsets = np.concatenate([[0], np.cumsum(joined.pop("lengths"))]).astype(np.int64)
    with open(work / "tokens.npy", "wb") as out:
        header = {"descr": "<i4", "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(out, header)
        with open(work / "tokens.bin", "rb") as stream:
            shutil.copyfileobj(stream, out, 1 << 22)
    np.save(work / "offsets.npy", offsets)
    for key, array in joined.items():
        np.save(work / f"{key}.npy", array)
    content.update(joined["prompt_lengths"].tobytes())
    content.update(offsets.tobytes())
    for leftover in [*work.glob("chunk-*"), *work.glob("worker-*"), *work.glob("tokenizer-*"), work / "tokens.bin"]:
        leftover.unlink()
    (work / "task.json").unlink(missing_ok=True)
    return {
        "kept": len(joined["rows"]),
        "dropped": dict(reasons.most_common()),
        "truncated": truncated,
        "unfinished": unfinished,
        "tokens": int(offsets[-1]),
        "fingerprint": content.hexdigest()[:32],
    }
