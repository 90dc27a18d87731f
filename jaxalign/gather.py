"""Weights that lie on many devices and processes as the tensors of files, a few megabytes at a time.

A leaf `[L, in, out]` is L tensors `[out, in]` of a file. What a process writes is cut into blocks of rows. For each
block every process gives the part that its own devices hold, zeros elsewhere, and the sum arrives at the process that
writes it: whatever the mesh, a process holds no more than a block for each process, and a device no more than that
beside its own weights. Each part has one giver, so the sums are of bits and zeros and lose nothing.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BLOCK_BYTES = 32 << 20
"""Of a round of all processes together."""


class Tensor(NamedTuple):
    """A tensor of a file: `layer` of the leaf at `path` (None: the leaf is not stacked), in the file's own layout."""

    path: tuple[str, ...]
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


class _Rows(NamedTuple):
    """Rows [start, stop) of a tensor, and where their bytes begin in a block."""

    name: str
    start: int
    stop: int
    offset: int


class _Piece(NamedTuple):
    """A part of a leaf that this process gives, and where in the leaf it begins."""

    data: Any
    begin: tuple[int, ...]


def stream(
    leaf: Callable[[tuple[str, ...]], Any],
    tensors: Mapping[str, Tensor],
    writers: Sequence[Sequence[str]],
    dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
    """The rows of this process's tensors in order, as (name, rows in `dtype`); each array is valid until the next.

    All processes call it with the same arguments and exhaust it, as every block takes all of them.

    Args:
      leaf: the array at a path; with several processes a global jax.Array, or values that all of them hold. It is
        called once for a run of tensors of the same leaf, and what it gave before is let go first.
      tensors: by name.
      writers: for each process the names of the tensors that it writes.
    """
    n, me = jax.process_count(), jax.process_index()
    sizes = {name: _row_bytes(tensor, dtype) * tensor.shape[0] for name, tensor in tensors.items()}
    largest = max(sum(sizes[name] for name in names) for names in writers)
    size = min(largest, max(BLOCK_BYTES // n, *(_row_bytes(tensor, dtype) for tensor in tensors.values())))
    plans = [_blocks(names, tensors, dtype, size) for names in writers]
    given = np.zeros((n, -(-size // 4) * 4), np.uint8)
    held: dict[tuple[str, ...], list[_Piece]] = {}
    for number in range(max(map(len, plans))):
        current = [blocks[number] if number < len(blocks) else [] for blocks in plans]
        for buffer, block in zip(given, current, strict=True):
            for rows in block:
                tensor = tensors[rows.name]
                if tensor.path not in held:
                    if len(held) >= n:
                        held.clear()
                    held[tensor.path] = _own_pieces(leaf(tensor.path))
                view = _view(buffer, rows, tensor, dtype)
                if n > 1:
                    view[...] = 0
                _put(view, rows, tensor, held[tensor.path])
        mine = given[0] if n == 1 else _sum(given)
        for rows in current[me]:
            yield rows.name, _view(mine, rows, tensors[rows.name], dtype)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxalign:{name}")


def _row_bytes(tensor: Tensor, dtype: np.dtype) -> int:
    return math.prod(tensor.shape[1:]) * dtype.itemsize


def _blocks(names: Sequence[str], tensors: Mapping[str, Tensor], dtype: np.dtype, size: int) -> list[list[_Rows]]:
    """The tensors in order, cut into blocks of at most `size` bytes, which no row exceeds.

    Equal tensors are cut at equal rows, a quarter of a block at a time: each new size is a program to compile.
    """
    blocks: list[list[_Rows]] = [[]]
    offset = 0
    for name in names:
        row, n_rows = _row_bytes(tensors[name], dtype), tensors[name].shape[0]
        most = max(1, size // 4 // row)
        for start in range(0, n_rows, most):
            stop = min(start + most, n_rows)
            if offset + (stop - start) * row > size:
                blocks.append([])
                offset = 0
            blocks[-1].append(_Rows(name, start, stop, offset))
            offset += (stop - start) * row
    return blocks


def _view(buffer: np.ndarray, rows: _Rows, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """The rows as an array in a buffer of bytes."""
    shape = (rows.stop - rows.start, *tensor.shape[1:])
    end = rows.offset + math.prod(shape) * dtype.itemsize
    return buffer[rows.offset : end].view(dtype).reshape(shape)


def _own_pieces(value: Any) -> list[_Piece]:
    """The parts of a leaf that this process gives: of those who hold a part, the first device's process gives it."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable and jax.process_count() > 1:
        return [_Piece(value, (0,) * value.ndim)] if jax.process_index() == 0 else []
    givers: dict[tuple[int, ...], Any] = {}
    indices: Any = value.sharding.devices_indices_map(value.shape)
    for device in sorted(indices, key=lambda device: (device.process_index, device.id)):
        givers.setdefault(tuple(part.start or 0 for part in indices[device]), device)
    pieces = {shard.device: shard.data for shard in value.addressable_shards}
    return [_Piece(pieces[device], begin) for begin, device in givers.items() if device in pieces]


def _put(view: np.ndarray, rows: _Rows, tensor: Tensor, pieces: Sequence[_Piece]) -> None:
    """Writes what `pieces` hold of some rows into them."""
    first = 0 if tensor.layer is None else 1  # of the leaf's dimensions that are the tensor's
    for piece in pieces:
        begin, sizes = [0] * piece.data.ndim, list(piece.data.shape)
        if tensor.layer is not None:
            begin[0], sizes[0] = tensor.layer - piece.begin[0], 1
            if not 0 <= begin[0] < piece.data.shape[0]:
                continue
        # The dimension of the leaf that is the rows in the file.
        axis = piece.data.ndim - 1 if tensor.transposed else first
        offset = piece.begin[axis]
        start, stop = max(rows.start, offset), min(rows.stop, offset + piece.data.shape[axis])
        if start >= stop:
            continue
        begin[axis], sizes[axis] = start - offset, stop - start
        part = _take(piece.data, begin, sizes).reshape(sizes[first:])
        place = [slice(at, at + size) for at, size in zip(piece.begin[first:], part.shape, strict=True)]
        place[axis - first] = slice(start - rows.start, stop - rows.start)
        if tensor.transposed:
            part, place = part.T, place[::-1]
        view[tuple(place)] = part


def _take(data: Any, begin: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """A part of an array on the host; of a device's array no more than that leaves the device."""
    if isinstance(data, jax.Array):
        with jax.set_mesh(None):  # the caller's mesh has other devices than the one of this piece
            return np.asarray(jax.lax.dynamic_slice(data, begin, sizes))
    return data[tuple(slice(at, at + size) for at, size in zip(begin, sizes, strict=True))]


@functools.cache
def _meeting() -> tuple[NamedSharding, Any]:
    """One device of each process, and the sum over them whose row p stays on process p.

    The sum comes after an exchange: XLA's reduce-scatter between processes on CPUs (gloo) was seen to lose bytes.
    """
    devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([devices[process] for process in sorted(devices)]), ("process",))
    spec = PartitionSpec("process")

    def exchange(given: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(given[0], "process", 0, 0).sum(0, keepdims=True, dtype=np.uint32)

    return NamedSharding(mesh, spec), jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))


def _sum(given: np.ndarray) -> np.ndarray:
    """What all processes gave in the row [n, bytes] that is this process's, summed."""
    with jax.set_mesh(None):
        sharding, exchange = _meeting()
        device = sharding.mesh.devices[jax.process_index()]
        local = jax.device_put(given.view(np.uint32)[None], device)
        whole = jax.make_array_from_single_device_arrays((len(given), *local.shape[1:]), sharding, [local])
        return np.array(exchange(whole).addressable_data(0)).view(np.uint8)[0]
