"""Safetensors files of a model folder: one, or several with an index; read by byte range, written as a stream."""

import concurrent.futures
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import ml_dtypes
import numpy as np
from etils import epath

from jaxalign import paths
from jaxalign.messages import listed
from jaxalign.paths import inside, read_json, write_json

Folder: TypeAlias = Path | epath.Path
"""A folder, or a file, here, in a bucket or on the hub."""

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_BY_NAME = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"], "F16": DTYPES["float16"]}
NAMES: Mapping[np.dtype, str] = {dtype: name for name, dtype in _BY_NAME.items()}
"""How a safetensors header spells a dtype."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
THREADS = 16
"""Reads at once: a bucket answers each after tens of milliseconds, however small it is."""
READ_BYTES = 8 << 20
"""Of a tensor that a thread has on the host at once, counted as float32."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ReadRows(Protocol):
    """Reads rows [start, stop) of a tensor (its first dimension; all of them by default) and nothing else."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray: ...


def weight_files(folder: Folder) -> list[Folder]:
    """The safetensors files of a folder: model.safetensors, or all that the index names."""
    single, index = folder / WEIGHTS, folder / INDEX
    if index.exists():
        if single.exists():
            raise ValueError(f"{folder} has both {WEIGHTS} and {INDEX}; remove the one that is not the model's")
        weight_map = read_json(inside(folder, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        files = [inside(folder, name) for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{index} names files that are not in the folder: {listed(missing)}; download them again")
        return files
    if single.exists() or (not paths.is_remote(folder) and os.path.islink(single)):
        return [inside(folder, WEIGHTS)]
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [inside(folder, others[0])]
    if others:
        raise ValueError(f"{folder} has {listed(others)} but no {INDEX} that says what belongs to the model")
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds weights only as pickles ({listed(pickles)}), which can run code when opened and are "
            "never read. Use the model's safetensors, or convert it where you trust it"
        )
    raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def open_folder(folder: Folder) -> tuple[dict[str, tuple[int, ...]], ReadRows]:
    """The shapes of a folder's tensors by their names in HF, and what reads rows of one.

    Raises:
      ValueError: no weights but pickles, a damaged file, or files that the index does not describe.
    """
    tensors: dict[str, Tensor] = {}
    duplicates: dict[str, list[str]] = {}
    files = weight_files(folder)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        headers = list(pool.map(read_header, files))
    for file, header in zip(files, headers, strict=True):
        for name, tensor in header.items():
            if name in tensors:
                duplicates.setdefault(name, [tensors[name].file.name]).append(file.name)
            tensors[name] = tensor
    if duplicates:
        shown = [f"{name} in {', '.join(files)}" for name, files in sorted(duplicates.items())]
        raise ValueError(f"{folder} holds tensors more than once: {listed(shown)}")
    if (folder / INDEX).exists():
        promised = read_json(folder / INDEX)["weight_map"]
        lost = sorted(name for name, file in promised.items() if name not in tensors or tensors[name].file.name != file)
        if lost:
            raise ValueError(f"{folder / INDEX} names tensors that are not in the file it says: {listed(lost)}")
        unnamed = sorted(tensors.keys() - promised.keys())
        if unnamed:
            raise ValueError(f"{folder / INDEX} does not name these tensors of its files: {listed(unnamed)}")
    # A bare LlamaModel names its tensors without the prefix that LlamaForCausalLM gives it.
    if "embed_tokens.weight" in tensors and not any(name.startswith("model.") for name in tensors):
        tensors = {
            name if name.split(".")[0] in ("lm_head", "score") else "model." + name: tensor
            for name, tensor in tensors.items()
        }

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype not in _BY_NAME:
            raise ValueError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}, expected one of {', '.join(_BY_NAME)}; "
                "quantised safetensors are not read"
            )
        return read_rows(tensor, start, stop)

    return {name: tensor.shape for name, tensor in tensors.items()}, read


class Tensor(NamedTuple):
    """Where one tensor lies in a safetensors file."""

    file: Folder
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_rows(tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of a tensor whose dtype is one of DTYPES."""
    dtype = _BY_NAME[tensor.dtype]
    start, stop, _ = slice(start, stop).indices(tensor.shape[0])
    row = dtype.itemsize * math.prod(tensor.shape[1:])
    raw = paths.read_range(tensor.file, tensor.offset + start * row, (stop - start) * row)
    return np.frombuffer(raw, dtype).reshape(stop - start, *tensor.shape[1:])


def row_ranges(shape: Sequence[int], wanted: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The rows of a tensor that any of `wanted` [start, stop) names, each once, in ranges of READ_BYTES at most."""
    most = max(1, READ_BYTES // (4 * math.prod(shape[1:])))
    ranges, end = [], 0
    for start, stop in sorted(wanted):
        start = max(start, end)
        ranges += [(begin, min(begin + most, stop)) for begin in range(start, stop, most)]
        end = max(end, stop)
    return ranges


class _Duplicate(Exception):
    """Raised inside the JSON parser, which turns no ValueError into its own."""


def read_header(file: Folder) -> dict[str, Tensor]:
    """The tensors of one safetensors file; the file's size is checked against them."""
    size = paths.size(file)
    broken = f"{file} is cut short or no safetensors file ({size} bytes{{}}); download or export it again"
    if size < 8:
        raise ValueError(broken.format(""))
    (length,) = struct.unpack("<Q", paths.read_range(file, 0, 8))
    if length > size - 8:
        raise ValueError(broken.format(f", header of {length}"))
    raw = paths.read_range(file, 8, length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        double = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if double:
            raise _Duplicate(f"{file} names these tensors twice: {listed(double)}")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except _Duplicate as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError(broken.format(", unreadable header")) from error
    header.pop("__metadata__", None)
    found, data, end = {}, 8 + length, 8 + length
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = _BY_NAME.get(entry["dtype"])
        if dtype is not None and (begin < 0 or stop - begin != dtype.itemsize * math.prod(shape)):
            raise ValueError(f"{file}: tensor {name} of {entry['dtype']} {shape} has {stop - begin} bytes")
        found[name] = Tensor(file, entry["dtype"], shape, data + begin)
        end = max(end, data + stop)
    if end != size:
        raise ValueError(broken.format(f", its header describes {end}"))
    return found


class Shard(NamedTuple):
    """A safetensors file to write: its name and its tensors' shapes, in the order in which they lie in it."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]


def plan(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, max_shard_bytes: int) -> list[Shard]:
    """Files of at most `max_shard_bytes` (a larger tensor has its own) for tensors in the order of `shapes`."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    n = len(shards)
    names = [WEIGHTS] if n == 1 else [f"model-{number:05d}-of-{n:05d}.safetensors" for number in range(1, n + 1)]
    return [Shard(file, own) for file, own in zip(names, shards, strict=True)]


def write(folder: Folder, shard: Shard, dtype: np.dtype, blocks: Iterable[tuple[str, np.ndarray]]) -> dict[str, int]:
    """Writes one file from (tensor's name, its next rows in `dtype`), tensor after tensor as the shard has them.

    Returns:
      The CRC-32 of each tensor's bytes.
    """
    # transformers asks for the format; its "pt" only means that the layout is torch's.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    sums = dict.fromkeys(shard.shapes, 0)
    with (folder / shard.file).open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for name, rows in blocks:
            content = rows.reshape(-1).view(np.uint8).data
            sums[name] = zlib.crc32(content, sums[name])
            stream.write(content)
        if not paths.is_remote(folder):
            stream.flush()
            os.fsync(stream.fileno())
    return sums


def verify(folder: Folder, shard: Shard, dtype: np.dtype, sums: Mapping[str, int]) -> None:
    """Opens a file that was written as any reader would.

    Raises:
      ValueError: it has not the tensors of `shard` in `dtype`, or the CRC-32 of one is not that of `sums`.
    """
    file = folder / shard.file
    found = read_header(file)
    for name, shape in shard.shapes.items():
        got = (found[name].shape, found[name].dtype) if name in found else None
        if got != (shape, NAMES[dtype]):
            raise ValueError(f"{file} reads back {name} as {got}, expected {shape} {NAMES[dtype]}")

    def check(name: str) -> None:
        crc = 0
        for rows in row_ranges(shard.shapes[name], [(0, shard.shapes[name][0])]):
            crc = zlib.crc32(read_rows(found[name], *rows).view(np.uint8).data, crc)
        if crc != sums[name]:
            raise ValueError(f"{file}: tensor {name} reads back with other values than were written")

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, shard.shapes))


def write_index(folder: Folder, shards: Sequence[Shard], dtype: np.dtype) -> None:
    """Writes the index of several shards; one needs none."""
    if len(shards) == 1:
        return
    total = sum(math.prod(shape) * dtype.itemsize for shard in shards for shape in shard.shapes.values())
    weight_map = {name: shard.file for shard in shards for name in shard.shapes}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
