"""Models from and to the formats of Hugging Face: safetensors folders, GGUF files, hub ids, here or in a bucket.

One table serves both directions and is written down nowhere: a tensor's name follows from its path in the declared tree
(`models.declare`). `layers/self_attn/q_proj/kernel` is `model.layers.{i}.self_attn.q_proj.weight`, transposed, one
tensor a layer; an embedding keeps its layout. The files themselves are the matter of `safetensors_file`, `gguf_file`
and (config, tokenizer) `hf_files`; how weights on many devices become a file's tensors, that of `gather`.

Nothing here imports torch, unpickles, runs code from a model folder, or touches the network unless a hub id is given.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxalign import gather, gguf_file, models, paths, safetensors_file
from jaxalign.hf_files import (
    TOKENIZER_FILES,
    end_of_turn,
    fit_to_tokenizer,
    generation_config,
    is_gguf,
    load_tokenizer,
    padding_of_score,
    read_config,
    resolve,
    stop_ids,
    tokenizer_identity,
    write_tokenizer,
)
from jaxalign.messages import listed
from jaxalign.models.config import ModelConfig, config_to_hf
from jaxalign.paths import PathLike, inside, write_json
from jaxalign.safetensors_file import DTYPES, THREADS, Folder, ReadRows

__all__ = [
    "DTYPES",
    "TOKENIZER_FILES",
    "end_of_turn",
    "fingerprint",
    "fit_to_tokenizer",
    "load",
    "load_tokenizer",
    "read_config",
    "reader",
    "reader",
    "resolve",
    "save",
    "stop_ids",
    "tokenizer_identity",
    "write_tokenizer",
]

_HOW_IT_IS_RUN = {"compute_dtype", "remat", "attention"}  # fields of a config that no config.json has
# What `save` writes.
_OF_A_MODEL = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|"
    + "|".join(map(re.escape, TOKENIZER_FILES))
)
# Buffers that old files carry and that are computed, not learnt.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq$")


class _Leaf(NamedTuple):
    """One leaf of the declared tree and its tensors in HF's spelling: one a layer, or just one."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of its tensors in HF's layout."""
        own = self.shape[1:] if self.stacked else self.shape
        return own[::-1] if self.transposed else own


def _leaves(cfg: ModelConfig) -> list[_Leaf]:
    """The name table of a model, from its declared tree."""
    kinds = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

    def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Leaf]:
        for key, value in tree.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                yield from walk(value, here)
                continue
            stacked = here[0] == "layers"
            stem = ".".join(here[1:-1] if stacked else here[:-1]) + "." + kinds[key]
            if stacked:
                names = tuple(f"model.layers.{layer}.{stem}" for layer in range(value.shape[0]))
            else:
                names = (stem if here[0] in ("lm_head", "score") else "model." + stem,)
            yield _Leaf(here, tuple(value.shape), names, stacked)

    return list(walk(models.declare(cfg), ()))


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


class _Source(NamedTuple):
    """Tensors under HF's names and in HF's layout."""

    where: Folder
    shapes: Mapping[str, tuple[int, ...]]
    read: ReadRows


def _open_source(where: Folder, cfg: ModelConfig) -> _Source:
    if not is_gguf(where):
        return _Source(where, *safetensors_file.open_folder(where))
    everything = _leaves(dataclasses.replace(cfg, num_labels=0, tie_word_embeddings=False))
    names = [name for leaf in everything for name in leaf.names]
    return _Source(where, *gguf_file.weights(gguf_file.open_file(where), cfg, names))


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
    return cfg, _nest({leaf.path: keep(leaf.path, read(leaf.path)) for leaf in _leaves(cfg)})


def reader(
    path: PathLike,
    cfg: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    shardings: Any = None,
    head: str = "lm",
) -> tuple[ModelConfig, Callable[[tuple[str, ...]], jax.Array]]:
    """A model's config, and what reads the leaf at a path of the parameter tree; see `load`. Nothing is read yet."""
    cfg, read = reader(path, cfg, dtype=dtype, shardings=shardings, head=head)
    return cfg, _nest({leaf.path: read(leaf.path) for leaf in _leaves(cfg)})


def reader(
    path: PathLike,
    cfg: ModelConfig | None = None,
    *,
    dtype: str = "float32",
    shardings: Any = None,
    head: str = "lm",
) -> tuple[ModelConfig, Callable[[tuple[str, ...]], jax.Array]]:
    """As `load`, but instead of the params what reads one leaf by its path, for weights that exceed the memory."""
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
    source = _open_source(where, there)
    new_score = head == "score" and "score.weight" not in source.shapes
    _check(source, there, _leaves(there), new_score=new_score)
    if new_score:
        source = _with_score(source, cfg)
    if cfg.vocab_size > own.vocab_size:
        source = _with_rows(source, cfg.vocab_size)
    leaves = {leaf.path: leaf for leaf in _leaves(cfg)}

    def read(path: tuple[str, ...]) -> jax.Array:
        sharding = _get(shardings, path) if isinstance(shardings, Mapping) else shardings
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            return _place(source, leaves[path], DTYPES[dtype], sharding, pool)

    return cfg, read


def _check(source: _Source, cfg: ModelConfig, leaves: Iterable[_Leaf], *, new_score: bool) -> None:
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


def _with_score(source: _Source, cfg: ModelConfig) -> _Source:
    """The source with a new score head."""
    shape = (cfg.num_labels, cfg.hidden_size)
    values = np.random.default_rng(0).normal(0.0, cfg.initializer_range, shape)

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return values[start:stop] if name == "score.weight" else source.read(name, start, stop)

    return source._replace(shapes={**source.shapes, "score.weight": shape}, read=read)


def _with_rows(source: _Source, vocab_size: int) -> _Source:
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
    source: _Source,
    leaf: _Leaf,
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


def _place(
    source: _Source, leaf: _Leaf, dtype: np.dtype, sharding: Any, pool: concurrent.futures.Executor
) -> jax.Array:
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


def save(
    folder: PathLike,
    cfg: ModelConfig,
    params: Mapping[str, Any] | Callable[[tuple[str, ...]], Any],
    *,
    tokenizer_from: Any = None,
    generation_from: PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Folder:
    """Writes a folder that transformers opens and reads back every bit of it; only then does the model appear.

    With several processes all of them call it: each writes every n-th weight file, a few megabytes at a time, to a disk
    that all share or a bucket. On a disk an earlier model there is replaced when the new one is complete; in a bucket,
    which knows no renaming, it is deleted first and config.json is written last: a folder without it is no model.

    Args:
      folder: where.
      params: the tree of `models.declare(cfg)`, on whatever devices; or what gives the leaf at a path, for weights that
        are not in memory. They are asked for in order and not kept.
      tokenizer_from: a model (see `resolve`) whose tokenizer files go along, or a transformers tokenizer.
      generation_from: a model whose generation_config.json is continued; by default `tokenizer_from` if that is a path.
      dtype: of the tensors; by default the source checkpoint's, `cfg.dtype`.
      max_shard_bytes: tensors are spread over files of at most this size (a larger tensor has its own).

    Returns:
      The folder.

    Raises:
      ValueError: params that are not those of `cfg`; a folder that holds something else; a copy that reads back
        otherwise.
    """
    target = paths.at(folder)
    dtype = dtype or cfg.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    _check_target(target)
    cfg = dataclasses.replace(cfg, dtype=dtype)
    leaves = _leaves(cfg)
    if isinstance(params, Mapping):
        _check_params(cfg, params, leaves)
        params = functools.partial(_get, params)
    if generation_from is None and isinstance(tokenizer_from, str | os.PathLike):
        generation_from = tokenizer_from

    tensors = {
        name: gather.Tensor(leaf.path, layer if leaf.stacked else None, leaf.transposed, leaf.tensor_shape)
        for leaf in leaves
        for layer, name in enumerate(leaf.names)
    }
    shards = safetensors_file.plan({name: one.shape for name, one in tensors.items()}, DTYPES[dtype], max_shard_bytes)
    first = jax.process_index() == 0
    with tempfile.TemporaryDirectory() as small:
        if first:  # what is quick and may fail comes before the weights
            _clean(target)
            _write_small_files(Path(small), cfg, tokenizer_from, generation_from)
        with _place_to_write(target, first) as place:
            _write_weights(place, params, tensors, shards, DTYPES[dtype])
            if first:
                safetensors_file.write_index(place, shards, DTYPES[dtype])
                _check(_Source(place, *safetensors_file.open_folder(place)), cfg, leaves, new_score=False)
                for file in sorted(Path(small).iterdir(), key=lambda file: file.name == "config.json"):
                    paths.replace(place / file.name, file.read_bytes())
    return target


def _check_params(cfg: ModelConfig, params: Mapping[str, Any], leaves: Iterable[_Leaf]) -> None:
    declared = {leaf.path: leaf.shape for leaf in leaves}
    given: dict[tuple[str, ...], tuple[int, ...]] = {}

    def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, key))
            else:
                given[(*path, key)] = tuple(value.shape)

    walk(params, ())
    missing = ["/".join(path) for path in declared if path not in given]
    extra = ["/".join(path) for path in given if path not in declared]
    misshapen = [
        f"{'/'.join(path)} is {list(given[path])}, declared {list(shape)}"
        for path, shape in declared.items()
        if path in given and given[path] != shape
    ]
    if missing or extra or misshapen:
        raise ValueError(
            f"params are not those of this {cfg.model_type} config. Missing: {listed(missing) or 'none'}. Unexpected: "
            f"{listed(extra) or 'none'}. Misshapen: {listed(misshapen) or 'none'}"
        )


def _check_target(target: Folder) -> None:
    """Raises ValueError if something is at `target` that is no model, or it is in a bucket that can't be read."""
    paths.check_bucket(target)
    if not target.exists() or (target / "config.json").exists():
        return
    if not target.is_dir() or any(not _OF_A_MODEL.fullmatch(file.name) for file in target.iterdir()):
        raise ValueError(f"{target} exists and is no model folder; choose another folder or remove it")


def _beside(target: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Where a folder is made before it is `target`, and where the earlier one is until then."""
    return target.parent / f".{target.name}.partial", target.parent / f".{target.name}.old"


def _clean(target: epath.Path) -> None:
    """Clears away, or puts back, what a killed save left on a disk."""
    if paths.is_remote(target):
        return
    temporary, old = _beside(target)
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _place_to_write(target: epath.Path, first: bool) -> Iterator[epath.Path]:
    """The empty folder to write to, which is `target` itself in a bucket; on a disk it gets that name at the end.

    Every process enters and leaves it; the `first` one does what has to be done once.
    """
    if paths.is_remote(target):
        if first and target.exists():  # config.json goes first: from then on there is no model
            for file in sorted(target.iterdir(), key=lambda file: file.name != "config.json"):
                if _OF_A_MODEL.fullmatch(file.name):
                    file.unlink()
        gather.wait_for_all("export begins")
        yield target
        gather.wait_for_all("export ends")
        return
    temporary, old = _beside(target)
    try:
        if first:
            temporary.mkdir(parents=True)
        gather.wait_for_all("export begins")
        if not temporary.exists():
            raise ValueError(
                f"{temporary}, made by process 0, is not seen by process {jax.process_index()}: the "
                "processes of a run write to a disk that all of them share, or to a bucket (gs://)"
            )
        yield temporary
        if first:
            _swap(temporary, target, old)
        gather.wait_for_all("export ends")
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_small_files(folder: Path, cfg: ModelConfig, tokenizer_from: Any, generation_from: PathLike | None) -> None:
    """Writes config, tokenizer and, for a model that generates, generation config.

    Raises:
      ValueError: no tokenizer there, or a config that can't be said in config.json.
    """
    write_json(folder / "config.json", config_to_hf(cfg))  # without it there is no reading the tokenizer
    tokenizer = None
    if tokenizer_from is not None:
        write_tokenizer(folder, tokenizer_from)
        tokenizer = load_tokenizer(folder)
    if not cfg.num_labels:
        write_json(folder / "generation_config.json", generation_config(cfg, tokenizer, generation_from))
    elif tokenizer is not None:
        pad = padding_of_score(cfg, tokenizer)
        if pad != tokenizer.pad_token_id:
            tokenizer.pad_token = None if pad is None else tokenizer.convert_ids_to_tokens(pad)
            write_tokenizer(folder, tokenizer)
        cfg = dataclasses.replace(cfg, pad_token_id=pad)
        write_json(folder / "config.json", config_to_hf(cfg))
    written = read_config(folder)
    for field in dataclasses.fields(cfg):
        if field.name not in _HOW_IT_IS_RUN and getattr(written, field.name) != getattr(cfg, field.name):
            raise ValueError(
                f"config.json reads back {field.name} = {getattr(written, field.name)!r}, written was "
                f"{getattr(cfg, field.name)!r}: this config can't be said in a {cfg.model_type} config.json"
            )


def _write_weights(
    place: epath.Path,
    params: Callable[[tuple[str, ...]], Any],
    tensors: Mapping[str, gather.Tensor],
    shards: Sequence[safetensors_file.Shard],
    dtype: np.dtype,
) -> None:
    """Writes this process's share of the weight files and reads it back; returns when all processes have.

    Raises:
      ValueError: what is read is not what was written.
    """
    n = jax.process_count()
    writers = [[name for shard in shards[process::n] for name in shard.shapes] for process in range(n)]
    shard_of = {name: shard for shard in shards for name in shard.shapes}
    blocks = gather.stream(params, tensors, writers, dtype)
    written = []
    for shard, own in itertools.groupby(blocks, key=lambda block: shard_of[block[0]]):
        written.append((shard, safetensors_file.write(place, shard, dtype, own)))
    for shard, sums in written:
        safetensors_file.verify(place, shard, dtype, sums)
    gather.wait_for_all("export written")


def _swap(new: epath.Path, target: epath.Path, old: epath.Path) -> None:
    """Puts the finished folder in place; an earlier one is moved aside to `old` first and removed last."""
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
