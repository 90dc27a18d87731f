"""Weights from safetensors folders and GGUF files, leaf by leaf and by byte ranges."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import gguf_file, models, paths, safetensors_file
from jaxalign.hf import names
from jaxalign.hf.names import Leaf
from jaxalign.hf_files import is_gguf, read_config, resolve
from jaxalign.messages import listed
from jaxalign.models.config import ModelConfig
from jaxalign.paths import PathLike, inside
from jaxalign.safetensors_file import DTYPES, THREADS, Folder, ReadRows

# Buffers that old files carry and that are computed, not learnt.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq$")


class Source(NamedTuple):
    """Tensors under HF's names and in HF's layout."""

    where: Folder
    shapes: Mapping[str, tuple[int, ...]]
    read: ReadRows


def open_source(where: Folder, cfg: ModelConfig) -> Source:
    if not is_gguf(where):
        return Source(where, *safetensors_file.open_folder(where))
    everything = names.leaves(dataclasses.replace(cfg, num_labels=0, tie_word_embeddings=False))
    known = [name for leaf in everything for name in leaf.names]
    return Source(where, *gguf_file.weights(gguf_file.open_file(where), cfg, known))


def load(
    path: PathLike,
    cfg: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    shardings: Any = None,
    head: str = "lm",
    keep: Callable[[tuple[str, ...], jax.Array], Any] = lambda path, leaf: leaf,
) -> tuple[ModelConfig, models.Params]:
    """Reads a model, one leaf of the parameter tree at a time: each process the rows that its own devices hold.

    A file is read by byte ranges of whole rows of its tensors, so where a weight is split along what is a row in the
    file (with fsdp the inputs of q, k, v, gate and up), all of each row is read and the rest of it dropped. The host
    holds this process's part of one leaf, and 8 MB a thread.

    Args:
      path: see `resolve`.
      cfg: the config to read it by, when the caller has changed how it is run; by default the model's own. Where its
        vocab_size is larger than the model's (tokens were added), embedding and head get new rows: the mean of the old.
      dtype: of every leaf: float32 | bfloat16 | float16.
      shardings: a tree of shardings like the declared one, or one sharding for all; None is the default device.
      head: "lm" is the language model; "score" a value per token (reward models): taken from a sequence-classification
        checkpoint, or, over a language model, new with `num_labels` at least 1: normal(initializer_range), fixed seed.
      keep: (path, leaf) -> what stands in the tree for it, made before the next leaf is read (`frozen.keeper`).

    Returns:
      The config (num_labels is 0 for head "lm") and the params as a nested dict of jax Arrays.

    Raises:
      ValueError: missing, unexpected, misshapen or duplicate tensors (all are listed); a damaged file; pickles; a
        model that is not implemented.
    """
    cfg, read = reader(path, cfg, dtype=dtype, shardings=shardings, head=head)
    return cfg, names.nest({leaf.path: keep(leaf.path, read(leaf.path)) for leaf in names.leaves(cfg)})


def reader(
    path: PathLike,
    cfg: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    shardings: Any = None,
    head: str = "lm",
) -> tuple[ModelConfig, Callable[[tuple[str, ...]], jax.Array]]:
    """A model's config, and what reads the leaf at a path of the parameter tree; see `load`. Nothing is read yet."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if head not in ("lm", "score"):
        raise ValueError(f"head {head!r}: expected 'lm' or 'score'")
    where = resolve(path)
    own = read_config(where)
    cfg = own if cfg is None else cfg
    if head == "score":
        cfg = dataclasses.replace(cfg, num_labels=max(cfg.num_labels, 1))
    else:
        cfg = dataclasses.replace(cfg, num_labels=0, labels=(), reward_weights=())
    there = dataclasses.replace(cfg, vocab_size=min(cfg.vocab_size, own.vocab_size))
    source = open_source(where, there)
    new_score = head == "score" and "score.weight" not in source.shapes
    check(source, there, names.leaves(there), new_score=new_score)
    if new_score:
        source = _with_score(source, cfg)
    if cfg.vocab_size > own.vocab_size:
        source = _with_rows(source, cfg.vocab_size)
    leaves = {leaf.path: leaf for leaf in names.leaves(cfg)}

    def read(path: tuple[str, ...]) -> jax.Array:
        sharding = names.get(shardings, path) if isinstance(shardings, Mapping) else shardings
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return _place(source, leaves[path], DTYPES[dtype], sharding, pool)

    return cfg, read


def check(source: Source, cfg: ModelConfig, leaves: Iterable[Leaf], *, new_score: bool) -> None:
    """Compares the tensors that are there with those of the declared tree, both ways.

    Raises:
      ValueError: naming every difference.
    """
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    if new_score:
        del expected["score.weight"]
    optional = {"lm_head.weight"} if new_score or (cfg.tie_word_embeddings and not cfg.num_labels) else set()
    missing = [name for name in expected if name not in source.shapes]
    extra = sorted(
        name for name in source.shapes if name not in expected and name not in optional and not _HARMLESS.match(name)
    )
    misshapen = [
        f"{name} is {list(source.shapes[name])}, config says {list(shape)}"
        for name, shape in expected.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    if missing or extra or misshapen:
        hint = ""
        if "score.weight" in extra:
            hint = ". It is a reward or sequence-classification model: load it with head='score'"
        elif missing == ["lm_head.weight"]:
            hint = ". If the head is tied to the embedding, config.json must say tie_word_embeddings: true"
        raise ValueError(
            f"{source.where} does not hold the tensors of its config. "
            f"Missing ({len(missing)}): {listed(missing) or 'none'}. "
            f"Unexpected ({len(extra)}): {listed(extra) or 'none'}. "
            f"Misshapen ({len(misshapen)}): {listed(misshapen) or 'none'}{hint}"
        )
    tied, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if tied in optional and tied in source.shapes and not new_score:
        rows = safetensors_file.row_ranges(source.shapes[embedding], [(0, source.shapes[embedding][0])])
        if source.shapes[tied] != source.shapes[embedding] or not all(
            np.array_equal(source.read(tied, *some), source.read(embedding, *some)) for some in rows
        ):
            raise ValueError(
                f"{source.where}: config says tie_word_embeddings, but {tied} differs from {embedding}; set "
                "tie_word_embeddings to false in config.json if the head has its own weights"
            )


def _with_score(source: Source, cfg: ModelConfig) -> Source:
    """The source with a new score head."""
    shape = (cfg.num_labels, cfg.hidden_size)
    values = np.random.default_rng(0).normal(0.0, cfg.initializer_range, shape)

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return values[start:stop] if name == "score.weight" else source.read(name, start, stop)

    return source._replace(shapes={**source.shapes, "score.weight": shape}, read=read)


def _with_rows(source: Source, vocab_size: int) -> Source:
    """The source with as many rows of embedding and head: those that it lacks are the mean of those that it has."""
    grown = {
        name: (vocab_size, source.shapes[name][1])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        if name in source.shapes
    }

    @functools.cache
    def mean(name: str) -> np.ndarray:
        rows = safetensors_file.row_ranges(source.shapes[name], [(0, source.shapes[name][0])])
        sums = [source.read(name, *some).sum(axis=0, dtype=np.float64) for some in rows]
        return (np.sum(sums, axis=0) / source.shapes[name][0]).astype(np.float32)

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in grown:
            return source.read(name, start, stop)
        start, stop, _ = slice(start, stop).indices(vocab_size)
        there = source.shapes[name][0]
        old = source.read(name, min(start, there), min(stop, there)).astype(np.float32)
        new = np.broadcast_to(mean(name), (stop - max(start, there), old.shape[1])) if stop > there else old[:0]
        return np.concatenate([old, new])

    return source._replace(shapes={**source.shapes, **grown}, read=read)


def _fill(
    source: Source,
    leaf: Leaf,
    dtype: np.dtype,
    bounds: Sequence[tuple[tuple[int, int], ...]],
    pool: concurrent.futures.Executor,
) -> list[np.ndarray]:
    """The parts of one leaf within `bounds` ((start, stop) in each of its dimensions), each row being read once."""
    parts = [np.empty([stop - start for start, stop in bound], dtype) for bound in bounds]

    def in_tensor(layer: int) -> Iterator[tuple[np.ndarray, tuple[tuple[int, int], ...]]]:
        """What goes into a layer's tensor of each part that has that layer: a view, and its bounds in HF's layout."""
        for part, bound in zip(parts, bounds, strict=True):
            if leaf.stacked:
                (first, last), *rest = bound
                if not first <= layer < last:
                    continue
                part, bound = part[layer - first], tuple(rest)
            yield (part.T, bound[::-1]) if leaf.transposed else (part, bound)

    def fill(layer: int, start: int, stop: int) -> None:
        rows = source.read(leaf.names[layer], start, stop)
        for part, ((first, last), *others) in in_tensor(layer):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                columns = tuple(slice(*bound) for bound in others)
                part[begin - first : end - first] = rows[(slice(begin - start, end - start), *columns)]

    tasks = []
    for layer in range(len(leaf.names)):
        wanted = [bound[0] for _, bound in in_tensor(layer)]
        tasks += [(layer, *rows) for rows in safetensors_file.row_ranges(leaf.tensor_shape, wanted)]
    for done in [pool.submit(fill, *task) for task in tasks]:
        done.result()
    return parts


def _place(source: Source, leaf: Leaf, dtype: np.dtype, sharding: Any, pool: concurrent.futures.Executor) -> jax.Array:
    """Reads one leaf and puts it where `sharding` says."""
    if sharding is None:
        (whole,) = _fill(source, leaf, dtype, [tuple((0, n) for n in leaf.shape)], pool)
        return jax.device_put(whole)
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
    parts = _fill(source, leaf, dtype, list(devices), pool)
    arrays = []
    for group in devices.values():
        part = parts.pop(0)
        arrays += [jax.device_put(part, device) for device in group]
    # Waiting lets go of the leaf on the host before the next one is read.
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays))


def fingerprint(path: PathLike, *, whole_below: int = 10**9) -> str:
    """A hexadecimal digest of a model's config and weights, whatever its path.

    Files of up to `whole_below` bytes are read whole; of larger ones the size, the first megabyte (a safetensors header
    stands there) and 64 more spread evenly, which any training step changes.

    Raises:
      ValueError: no model there.
    """
    where = resolve(path)
    digest = hashlib.sha256()
    files = [where] if is_gguf(where) else [inside(where, "config.json"), *safetensors_file.weight_files(where)]
    block = 1 << 20
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for file in files:
            size = paths.size(file)
            digest.update(f"{'' if is_gguf(where) else file.name}:{size}\n".encode())
            starts = list(range(0, size, block))
            if size > whole_below:
                starts = [number * max(size - block, 0) // 64 for number in range(65)]
            ranges = [(file, start, min(block, size - start)) for start in starts]
            for begin in range(0, len(ranges), THREADS):  # the others wait, or the whole file would be in memory
                for content in pool.map(lambda part: paths.read_range(*part), ranges[begin : begin + THREADS]):
                    digest.update(content)
    return digest.hexdigest()
