"""Safetensors files of a model folder: one, or several with an index; read in place, written as a stream."""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxalign.messages import listed
from jaxalign.paths import inside, read_json, write_json

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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(folder: Path) -> list[Path]:
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
    if single.exists() or single.is_symlink():
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


def open_folder(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """The shapes of a folder's tensors by their names in HF, and what reads one: a view of the file, read lazily.

    Raises:
      ValueError: no weights but pickles, a damaged file, or files that the index does not describe.
    """
    tensors: dict[str, _Tensor] = {}
    duplicates: dict[str, list[str]] = {}
    for file in weight_files(folder):
        for name, tensor in _read_header(file).items():
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

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype not in _BY_NAME:
            raise ValueError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}, expected one of {', '.join(_BY_NAME)}; "
                "quantised safetensors are not read"
            )
        dtype = _BY_NAME[tensor.dtype]
        return np.memmap(tensor.file, dtype, mode="r", offset=tensor.offset, shape=tensor.shape)

    return {name: tensor.shape for name, tensor in tensors.items()}, read


class _Tensor(NamedTuple):
    """Where one tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Duplicate(Exception):
    """Raised inside the JSON parser, which turns no ValueError into its own."""


def _read_header(file: Path) -> dict[str, _Tensor]:
    """The tensors of one safetensors file; the file's size is checked against them."""
    size = file.stat().st_size
    broken = f"{file} is cut short or no safetensors file ({size} bytes{{}}); download or export it again"
    if size < 8:
        raise ValueError(broken.format(""))
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size - 8:
            raise ValueError(broken.format(f", header of {length}"))
        raw = stream.read(length)

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
        found[name] = _Tensor(file, entry["dtype"], shape, data + begin)
        end = max(end, data + stop)
    if end != size:
        raise ValueError(broken.format(f", its header describes {end}"))
    return found


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes `tensors`, in the order of `shapes`, to files of at most `max_shard_bytes` (a larger one has its own).

    The headers follow from the shapes, so the tensors may be made one at a time.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    many = len(shards) > 1
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS
        for number in range(1, len(shards) + 1)
    ]
    remaining = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        # transformers asks for the format; its "pt" only means that the layout is torch's.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in shard:
            end = offset + sizes[name]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            for _ in shard:
                stream.write(next(remaining).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    if many:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
