"""Models from and to the formats of Hugging Face: safetensors folders, GGUF files, hub ids; weights, config, tokenizer.

One table serves both directions and is written down nowhere: a tensor's name follows from its path in the declared tree
(`models.declare`). `layers/self_attn/q_proj/kernel` is `model.layers.{i}.self_attn.q_proj.weight`, transposed, one
tensor a layer; an embedding keeps its layout. The files themselves are the matter of `safetensors_file`, `gguf_file`.

Nothing here imports torch, unpickles, runs code from a model folder, or touches the network unless a hub id is given.
Transformers, tokenizers, gguf and huggingface_hub are imported where they are used: to import this module is quick.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import gguf_file, models, paths, safetensors_file
from jaxalign.messages import first_line, listed
from jaxalign.models.config import ModelConfig, config_from_hf, config_to_hf, token_ids
from jaxalign.paths import PathLike, inside, read_json, write_json
from jaxalign.safetensors_file import DTYPES

_UNSIGNED = {2: np.uint16, 4: np.uint32}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
# Buffers that old files carry and that are computed, not learnt.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq$")


def resolve(path: PathLike) -> Path:
    """The folder or .gguf file that `path` names, downloaded first if it is a hub id.

    Args:
      path: a folder with config.json; a .gguf file, or a folder holding just one; `package:NAME[/FILE]`, a file inside
        an installed Python package, found without importing it (no FILE: the one .gguf in it); or a hub id
        `organisation/name`, of which only safetensors, JSON and tokenizer files are downloaded.

    Raises:
      ValueError: nothing there; or the hub refuses, does not know the id, or can't be reached.
    """
    return paths.find_model(path, check=read_config)


def read_config(path: PathLike) -> ModelConfig:
    """The model's config, from config.json or GGUF metadata; no weights are read.

    Raises:
      ValueError: nothing there, or a model that is not implemented (see `config_from_hf`).
    """
    where = resolve(path)
    if where.is_file():
        return gguf_file.read_config(gguf_file.open_file(where))
    file = inside(where, "config.json")
    if not file.exists():
        raise ValueError(f"{where} has no config.json; expected a Hugging Face model folder or a .gguf file")
    try:
        return config_from_hf(read_json(file))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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
    """Tensors under HF's names and in HF's layout. `read` gives an array or a lazily read view of the file."""

    where: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def _open_source(where: Path, cfg: ModelConfig) -> _Source:
    if where.is_dir():
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
) -> tuple[ModelConfig, models.Params]:
    """Reads a model, one leaf of the parameter tree at a time.

    Args:
      path: see `resolve`.
      cfg: the config to read it by, when the caller has changed how it is run; by default the model's own.
      dtype: of every leaf: float32 | bfloat16 | float16.
      shardings: a tree of shardings like the declared one, or one sharding for all; None is the default device.
        A process reads only what its own devices hold.
      head: "lm" is the language model; "score" a value per token (reward models): taken from a sequence-classification
        checkpoint, or, over a language model, new with `num_labels` at least 1: normal(initializer_range), fixed seed.

    Returns:
      The config (num_labels is 0 for head "lm") and the params as a nested dict of jax Arrays.

    Raises:
      ValueError: missing, unexpected, misshapen or duplicate tensors (all are listed); a damaged file; pickles; a
        model that is not implemented.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if head not in ("lm", "score"):
        raise ValueError(f"head {head!r}: expected 'lm' or 'score'")
    where = resolve(path)
    if cfg is None:
        cfg = read_config(where)
    cfg = dataclasses.replace(cfg, num_labels=max(cfg.num_labels, 1) if head == "score" else 0)
    source = _open_source(where, cfg)
    leaves = _leaves(cfg)
    new_score = head == "score" and "score.weight" not in source.shapes
    _check(source, cfg, leaves, new_score=new_score)
    flat = {}
    for leaf in leaves:
        sharding = shardings if shardings is None or hasattr(shardings, "device_set") else _get(shardings, leaf.path)
        if new_score and leaf.path[0] == "score":
            values = np.random.default_rng(0).normal(0.0, cfg.initializer_range, leaf.tensor_shape)
            flat[leaf.path] = _place({"score.weight": values}.__getitem__, leaf, DTYPES[dtype], sharding)
        else:
            flat[leaf.path] = _place(source.read, leaf, DTYPES[dtype], sharding)
    return cfg, _nest(flat)


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
        same = source.shapes[tied] == source.shapes[embedding]
        if not same or not np.array_equal(source.read(tied), source.read(embedding)):
            raise ValueError(
                f"{source.where}: config says tie_word_embeddings, but {tied} differs from {embedding}; set "
                "tie_word_embeddings to false in config.json if the head has its own weights"
            )


def _fill(read: Callable[[str], np.ndarray], leaf: _Leaf, dtype: np.dtype, indices: Sequence[Any]) -> list[np.ndarray]:
    """The parts of one leaf at `indices` (tuples of slices over its shape), each tensor being read once."""
    bounds = [tuple(part.indices(n) for part, n in zip(index, leaf.shape, strict=True)) for index in indices]
    parts = [np.empty([len(range(*bound)) for bound in one], dtype) for one in bounds]
    for layer, name in enumerate(leaf.names):
        tensor = read(name)
        values = tensor.T if leaf.transposed else tensor
        for index, part in zip(indices, parts, strict=True):
            if not leaf.stacked:
                part[...] = values[index]
            elif layer in (held := range(*index[0].indices(leaf.shape[0]))):
                part[held.index(layer)] = values[index[1:]]
    return parts


def _place(read: Callable[[str], np.ndarray], leaf: _Leaf, dtype: np.dtype, sharding: Any) -> jax.Array:
    """Reads one leaf and puts it where `sharding` says."""
    if sharding is None:
        (whole,) = _fill(read, leaf, dtype, [tuple(slice(0, n) for n in leaf.shape)])
        return jax.device_put(whole)
    devices: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        key = tuple(part.indices(n) for part, n in zip(index, leaf.shape, strict=True))
        devices.setdefault(key, []).append(device)
    parts = _fill(read, leaf, dtype, [tuple(slice(*bound) for bound in key) for key in devices])
    arrays = []
    for group in devices.values():
        part = parts.pop(0)
        arrays += [jax.device_put(part, device) for device in group]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def save(
    folder: PathLike,
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_from: Any = None,
    generation_from: PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a folder that transformers opens, reads it back, and compares every bit; only then does it appear.

    Args:
      folder: where; an earlier model there is replaced once the new one is complete.
      params: the tree of `models.declare(cfg)`, wholly on this process's devices. One leaf at a time comes to the host.
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
    target = Path(folder).expanduser()
    dtype = dtype or cfg.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").exists())):
        raise ValueError(f"{target} exists and is no model folder; choose another folder or remove it")
    cfg = dataclasses.replace(cfg, dtype=dtype)
    leaves = _leaves(cfg)
    _check_params(cfg, params, leaves)
    if generation_from is None and isinstance(tokenizer_from, str | os.PathLike):
        generation_from = tokenizer_from

    target.parent.mkdir(parents=True, exist_ok=True)
    # Fixed names: what a killed export left behind is cleared away, or put back, by the next.
    temporary, old = target.parent / f".{target.name}.partial", target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write_json(temporary / "config.json", config_to_hf(cfg))
        shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
        tensors = itertools.chain.from_iterable(
            _host_tensors(leaf, _get(params, leaf.path), DTYPES[dtype]) for leaf in leaves
        )
        safetensors_file.write(temporary, shapes, tensors, DTYPES[dtype], max_shard_bytes)
        tokenizer = None
        if tokenizer_from is not None:
            _write_tokenizer(temporary, tokenizer_from)
            tokenizer = load_tokenizer(temporary)
        write_json(temporary / "generation_config.json", _generation_config(cfg, tokenizer, generation_from))
        _verify(temporary, cfg, params, leaves, DTYPES[dtype])
        _swap(temporary, target, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
                if isinstance(value, jax.Array) and not value.is_fully_addressable:
                    raise ValueError(
                        f"params leaf {'/'.join((*path, key))} lies partly on other processes; export from a "
                        "checkpoint on one host (python -m jaxalign.export)"
                    )

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


def _host_tensors(leaf: _Leaf, value: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of one leaf in HF's layout and in `dtype`, in the order of its names."""
    host = np.asarray(value)
    for layer in range(len(leaf.names)):
        tensor = host[layer] if leaf.stacked else host
        yield np.ascontiguousarray((tensor.T if leaf.transposed else tensor).astype(dtype))


def _verify(
    folder: Path, cfg: ModelConfig, params: Mapping[str, Any], leaves: Sequence[_Leaf], dtype: np.dtype
) -> None:
    """Opens what was written as any reader would, and compares it with `params`.

    Raises:
      ValueError: config, a header or a bit differs.
    """
    from safetensors import safe_open

    written = read_config(folder)
    how = {"compute_dtype", "remat"}
    for field in dataclasses.fields(cfg):
        if field.name not in how and getattr(written, field.name) != getattr(cfg, field.name):
            raise ValueError(
                f"config.json reads back {field.name} = {getattr(written, field.name)!r}, written was "
                f"{getattr(cfg, field.name)!r}: this config can't be said in a {cfg.model_type} config.json"
            )
    seen: set[str] = set()
    shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    for file in safetensors_file.weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # safe_open is no mapping
                part = opened.get_slice(name)
                got = (tuple(part.get_shape()), part.get_dtype())
                if name in seen or got != (shapes.get(name), safetensors_file.NAMES[dtype]):
                    raise ValueError(f"{file} reads back {name} as {got}, expected {shapes.get(name)} {dtype}, once")
                seen.add(name)
    if seen != shapes.keys():
        raise ValueError(f"{folder} reads back without {listed(sorted(shapes.keys() - seen))}")
    source = _open_source(folder, cfg)
    bits = _UNSIGNED[dtype.itemsize]
    for leaf in leaves:
        tensors = _host_tensors(leaf, _get(params, leaf.path), dtype)
        for name, tensor in zip(leaf.names, tensors, strict=True):
            if not np.array_equal(source.read(name).view(bits), tensor.view(bits)):
                raise ValueError(f"{folder}: tensor {name} reads back with other values than were written")


def _swap(new: Path, target: Path, old: Path) -> None:
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


def load_tokenizer(path: PathLike, *, chat_template: str | None = None) -> Any:
    """The model's tokenizer, as a transformers fast tokenizer. Code from the folder is never run.

    Args:
      path: see `resolve`; a GGUF's tokenizer is built from its metadata.
      chat_template: a Jinja template, or a file that holds one, in place of the model's own.

    Raises:
      ValueError: no tokenizer there, or one that can't be read without running code from the folder.
    """
    where = resolve(path)
    # transformers would advise, when first imported, to install torch, which jaxalign never needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if where.is_file():
        tokenizer = gguf_file.load_tokenizer(gguf_file.open_file(where))
    else:
        if not any((where / name).exists() for name in TOKENIZER_FILES):
            raise ValueError(f"{where} holds no tokenizer; expected tokenizer.json and tokenizer_config.json")
        for name in TOKENIZER_FILES:
            inside(where, name)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(where), trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ValueError(f"{where}: the tokenizer can't be read: {first_line(error)}") from error
    if chat_template is not None:
        is_file = "{" not in chat_template and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8") if is_file else chat_template
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer_from: Any) -> None:
    if isinstance(tokenizer_from, str | os.PathLike):
        where = resolve(tokenizer_from)
        if where.is_dir():
            names = [name for name in TOKENIZER_FILES if (where / name).exists()]
            if not names:
                raise ValueError(f"{where} holds no tokenizer to export; expected tokenizer.json")
            for name in names:
                shutil.copyfile(inside(where, name), folder / name)
            return
        tokenizer_from = load_tokenizer(where)
    tokenizer_from.save_pretrained(str(folder))
    # transformers 4 knows this class under its older name only, and 5 still takes that.
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an answer (<|im_end|>, <|eot_id|>, </s>), or None."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    import jinja2

    answer = "jaxalign-answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError):  # a template may refuse such turns; then it names no end
        return None
    _, found, rest = text.rpartition(answer)
    if not found:
        return None
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer.encode(rest, add_special_tokens=False)
    return next((index for index in ids if index in special and index != tokenizer.bos_token_id), None)


def stop_ids(cfg: ModelConfig, tokenizer: Any = None, path: PathLike | None = None) -> tuple[int, ...]:
    """The ids that end a generation: those of the config, of generation_config.json at `path`, and of the tokenizer.

    The tokenizer gives its end of sequence and the token with which its chat template ends an answer.
    """
    ids = list(cfg.eos_token_id)
    if path is not None:
        ids += token_ids(_source_generation_config(path).get("eos_token_id"), "eos_token_id")
    if tokenizer is not None:
        ids += [one for one in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if one is not None]
    return tuple(dict.fromkeys(ids))


def _source_generation_config(path: PathLike) -> dict[str, Any]:
    where = resolve(path)
    if where.is_file() or not (where / "generation_config.json").exists():
        return {}
    return read_json(inside(where, "generation_config.json"))


def _generation_config(cfg: ModelConfig, tokenizer: Any, source: PathLike | None) -> dict[str, Any]:
    ignored = {"transformers_version", "_from_model_config", "auto_map"}
    kept = {} if source is None else _source_generation_config(source)
    stops = list(stop_ids(cfg, tokenizer, source))
    pad = cfg.pad_token_id
    if pad is None:
        pad = getattr(tokenizer, "pad_token_id", None)
    own = dict(
        bos_token_id=cfg.bos_token_id,
        eos_token_id=(stops[0] if len(stops) == 1 else stops) if stops else None,
        pad_token_id=pad,
    )
    return {key: value for key, value in kept.items() if key not in ignored} | own


def fingerprint(path: PathLike, *, whole_below: int = 10**9) -> str:
    """A hexadecimal digest of a model's config and weights, whatever its path.

    Files of up to `whole_below` bytes are read whole; of larger ones the size, the first megabyte (a safetensors header
    stands there) and 64 more spread evenly, which any training step changes.

    Raises:
      ValueError: no model there.
    """
    where = resolve(path)
    digest = hashlib.sha256()
    files = [where] if where.is_file() else [inside(where, "config.json"), *safetensors_file.weight_files(where)]
    block = 1 << 20
    for file in files:
        size = file.stat().st_size
        digest.update(f"{'' if where.is_file() else file.name}:{size}\n".encode())
        with open(file, "rb") as stream:
            if size <= whole_below:
                while chunk := stream.read(block):
                    digest.update(chunk)
                continue
            for number in range(65):
                stream.seek(number * max(size - block, 0) // 64)
                digest.update(stream.read(block))
    return digest.hexdigest()
