"""Models to folders that transformers opens: every byte read back, and the model appears when it is complete."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxalign import gather, paths, safetensors_file
from jaxalign.hf import names
from jaxalign.hf.names import Leaf
from jaxalign.hf.reading import Source, check
from jaxalign.hf_files import (
    TOKENIZER_FILES,
    generation_config,
    load_tokenizer,
    padding_of_score,
    read_config,
    write_tokenizer,
)
from jaxalign.messages import listed
from jaxalign.models.config import ModelConfig, config_to_hf
from jaxalign.paths import PathLike, write_json
from jaxalign.safetensors_file import DTYPES, Folder

_HOW_IT_IS_RUN = {"compute_dtype", "remat", "attention"}  # fields of a config that no config.json has
# What `save` writes.
_OF_A_MODEL = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|(generation_)?config\.json|"
    + "|".join(map(re.escape, TOKENIZER_FILES))
)


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
    leaves = names.leaves(cfg)
    if isinstance(params, Mapping):
        _check_params(cfg, params, leaves)
        params = functools.partial(names.get, params)
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
                check(Source(place, *safetensors_file.open_folder(place)), cfg, leaves, new_score=False)
                for file in sorted(Path(small).iterdir(), key=lambda file: file.name == "config.json"):
                    paths.replace(place / file.name, file.read_bytes())
    return target


def _check_params(cfg: ModelConfig, params: Mapping[str, Any], leaves: Iterable[Leaf]) -> None:
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
