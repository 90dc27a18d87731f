"""Rows of files, packages, folders, the hub or memory, with a fingerprint of their content."""

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxalign import paths
from jaxalign.messages import first_line
from jaxalign.paths import in_package, nearest

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz")

# Rows read at once from a table.
_TABLE_ROWS = 1000


@dataclass(frozen=True)
class Rows:
    """Rows of a source, read when iterated. A row is what its format gets: a dict, or text that is not JSON.

    Attributes:
        label: the source's name in messages.
        fingerprint: a hash of the content, known without reading rows where the content is files.
    """

    label: str
    fingerprint: str
    read: Callable[[], Iterator[Any]] = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        return self.read()


def read_rows(source: Any, *, split: str | None = None, name: str | None = None, limit: int | None = None) -> Rows:
    """Finds a source's rows.

    Args:
        source: a file (json, jsonl, parquet, csv; the text ones also .gz) or a glob, here or in a bucket (gs://...), a
            list of these, `package:NAME/FILE` (a file inside an installed package), a folder (of `save_to_disk`, or
            here one that `datasets.load_dataset` reads), a dataset id on the Hugging Face hub, a list of dicts, or a
            `datasets.Dataset`.
        split: which split of a folder, hub dataset or DatasetDict; None: "train". What has no splits takes no other.
        name: configuration of a hub dataset.
        limit: keep the first rows only.

    Raises:
        ValueError: nothing is there; the message names what was looked for and what is near.
    """
    if isinstance(source, Rows):
        rows = source
    elif isinstance(source, (str, os.PathLike)):
        rows = _read_path(str(source), split, name)
    elif isinstance(source, Sequence) and source and all(isinstance(item, (str, os.PathLike)) for item in source):
        rows = _read_files([file for item in source for file in find_files(str(item))], split, name)
    elif isinstance(source, Sequence):
        rows = _in_memory(list(source), f"a list of {len(source)} rows")
    elif hasattr(source, "column_names"):
        rows = _read_dataset(source, split, "a dataset in memory", key=None)
    else:
        raise ValueError(
            f"data must be a path, a list of paths, a hub id, a list of dicts or a datasets.Dataset, got "
            f"{type(source).__name__}"
        )
    if limit is None:
        return rows
    if limit < 1:
        raise ValueError(f"limit={limit}, expected at least 1")
    return Rows(rows.label, digest(rows.fingerprint, limit), lambda: itertools.islice(iter(rows), limit))


def find_files(path: str) -> list[epath.Path]:
    """The files that a path, a glob or `package:NAME/FILE` names; raises ValueError if there are none."""
    if path.startswith("package:"):
        file = in_package(path)
        if file.is_dir():
            raise ValueError(f"{path!r} is a folder, expected a file: package:NAME/FILE")
        return [epath.Path(file)]
    file = paths.at(path)
    if file.is_file():
        return [file]
    found = paths.glob(path)
    if not found:
        raise ValueError(f"no data file {path!r}{'' if paths.is_remote(path) else nearest(Path(file))}")
    return found


def _read_path(path: str, split: str | None, name: str | None) -> Rows:
    is_package = path.startswith("package:")
    if not is_package and (folder := paths.at(path)).is_dir():
        return _read_folder(folder, split, name)
    is_file_name = is_package or path.endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or glob.has_magic(path)
    if is_file_name or path.count("/") > 1 or paths.at(path).is_file():
        return _read_files(find_files(path), split, name)
    return _read_hub(path, split, name)


def _read_files(files: list[epath.Path], split: str | None, name: str | None) -> Rows:
    if split not in (None, "train") or name is not None:
        raise ValueError(
            f"split={split!r} and name={name!r} are for data sets of `datasets`; {files[0]} is a file, which has no "
            "splits: give the path of the file that you mean"
        )
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise ValueError(f"{file}: cannot read this kind of file; expected {', '.join(SUFFIXES)}")
    label = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    key = digest("files", *((file.name.split(".", 1)[-1], paths.content_hash(file)) for file in files))
    return Rows(label, key, lambda: itertools.chain.from_iterable(map(_read_file, files)))


def _read_file(file: epath.Path) -> Iterator[Any]:
    kind = next(suffix for suffix in SUFFIXES if file.name.endswith(suffix)).removesuffix(".gz")
    if kind == ".parquet":
        import pyarrow.parquet

        with file.open("rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_TABLE_ROWS):
                yield from batch.to_pylist()
        return
    try:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(file.open("rb"))
            if file.name.endswith(".gz"):
                stream = stack.enter_context(gzip.open(stream, "rb"))
            if kind == ".csv":
                csv.field_size_limit(2**31 - 1)
                yield from csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
            else:
                yield from _read_json(stream, file)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or not what its name says: {error}") from error


def _read_json(stream: Any, file: epath.Path) -> Iterator[Any]:
    """Rows of one JSON list, or of one JSON value a line. A line that is no JSON is given as its text."""
    first = next((line for line in stream if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    if first.lstrip().startswith(b"["):
        try:
            rows = json.loads(first + stream.read())
        except ValueError as error:
            raise ValueError(f"{file} begins like one JSON list but is none: {error}") from error
        yield from rows
        return
    for line in itertools.chain([first], stream):  # bytes: split at \n alone, not at every line separator of Unicode
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                yield line.decode("utf-8", errors="replace")


def _read_folder(folder: epath.Path, split: str | None, name: str | None) -> Rows:
    import datasets

    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _read_dataset(datasets.load_from_disk(str(folder)), split, str(folder), key=str)
    if paths.is_remote(folder):
        raise ValueError(f"{folder} is a folder in a bucket: name its files, as {folder}/*.jsonl")
    return _load_dataset(str(folder), split, name)


def _read_hub(path: str, split: str | None, name: str | None) -> Rows:
    try:
        return _load_dataset(path, split, name)
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        way_out = (
            "HF_HUB_OFFLINE is set, so only data sets in the local cache can be used: unset it, or give a local file"
            if offline
            else "if the data set is gated, accept its terms on its page and set HF_TOKEN; or give a local file"
        )
        raise ValueError(
            f"{path!r} is no file or folder here{nearest(Path(path))}, and as a dataset of the Hugging Face hub it "
            f"cannot be loaded ({type(error).__name__}: {first_line(error)}); {way_out}"
        ) from error


def _load_dataset(path: str, split: str | None, name: str | None) -> Rows:
    import datasets

    split = split or "train"
    # A repository's own code is never run: datasets >= 4 cannot, and nothing here asks for it.
    data = datasets.load_dataset(path, name, split=split)
    return _read_dataset(data, None, f"{path} ({split})", key=lambda file: f"{split}:{file}")


def _read_dataset(data: Any, split: str | None, label: str, *, key: Callable[[str], str] | None) -> Rows:
    """Rows of a `datasets.Dataset`. With `key`, its Arrow files are hashed in place of its rows."""
    if hasattr(data, "keys"):  # a DatasetDict
        split = split or "train"
        if split not in data:
            raise ValueError(f"{label} has no split {split!r}; it has {', '.join(map(repr, data))}")
        data, label = data[split], f"{label} ({split})"
    elif split not in (None, "train"):
        raise ValueError(f"{label} has no splits, so split={split!r} cannot be chosen")
    if not hasattr(data, "cache_files"):
        raise ValueError(f"{label}: a streamed data set has no fixed rows; load it without streaming")
    files = [entry["filename"] for entry in data.cache_files]

    def read() -> Iterator[Any]:
        for table in data.with_format("arrow").iter(_TABLE_ROWS):
            yield from table.to_pylist()

    if key is None or not files:
        return Rows(label, _hash_rows(read()), read)
    hashes = [(key(Path(file).suffix), paths.content_hash(file)) for file in files]
    return Rows(label, digest("arrow", len(data), *data.column_names, *hashes), read)


def _in_memory(rows: list[Any], label: str) -> Rows:
    return Rows(label, _hash_rows(rows), lambda: iter(rows))


def _hash_rows(rows: Iterable[Any]) -> str:
    state = hashlib.sha256()
    for row in rows:
        state.update(to_json(row))
        state.update(b"\n")
    return state.hexdigest()


def digest(*parts: Any) -> str:
    """A short hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def to_json(row: Any) -> bytes:
    """One line of JSON. What JSON lacks (bytes, images, dates) becomes an object: no format takes it for text."""
    return json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", errors="surrogatepass")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return {"type": type(value).__name__}
