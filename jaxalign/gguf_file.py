"""GGUF files: their metadata as a config and as a tokenizer, their tensors under Hugging Face's names.

The names are those of the `gguf` package's own map. It, tokenizers and transformers are imported where they are used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.messages import first_line
from jaxalign.models.config import KNOWN, ModelConfig, RopeScaling, config_from_hf

# Split patterns of byte-level BPE tokenizers by GGUF's `tokenizer.ggml.pre`, as in those models' own tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# GGUF token types (llama.cpp's llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


class GgufTensor(NamedTuple):
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


class Gguf(NamedTuple):
    """A GGUF file: its metadata as plain values, and its tensors (memory-mapped, still quantised)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, dequantised to float32, in the file's own order of rows."""
        import gguf

        tensor = self.tensors[name]
        rows = slice(start, stop)
        try:
            if len(tensor.shape) == 1:  # blocks of quantisation lie along the last dimension
                return gguf.dequantize(tensor.data, tensor.kind)[rows]
            return gguf.dequantize(tensor.data[rows], tensor.kind)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name} has a quantisation that gguf can't undo: {error}") from error


def open_file(path: Path) -> Gguf:
    """The file's metadata and tensors; ValueError if it is damaged or something else."""
    state = path.stat()
    return _parse(path.resolve(), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _parse(path: Path, size: int, modified: int) -> Gguf:
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
            tensor.name: GgufTensor(tuple(int(n) for n in tensor.shape[::-1]), tensor.tensor_type, tensor.data)
            for tensor in reader.tensors
        }
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is cut short or no GGUF file ({size} bytes): {first_line(error)}") from error
    return Gguf(path, metadata, tensors)


def read_config(file: Gguf) -> ModelConfig:
    """The model's config from the metadata; ValueError if it is a model that is not implemented."""
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
        rope_scaling=rope_scaling(file, arch, head_dim),
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


def rope_scaling(file: Gguf, arch: str, head_dim: int) -> dict[str, Any] | None:
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


def _llama3_from_divisors(file: Gguf, theta: float, head_dim: int) -> dict[str, Any]:
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


def weights(
    file: Gguf, cfg: ModelConfig, names: Iterable[str]
) -> tuple[dict[str, tuple[int, ...]], Callable[..., np.ndarray]]:
    """The shapes of the tensors by their names in HF, of which `names` are known; what reads rows of one as float32."""
    import gguf

    arch = file.metadata["general.architecture"]
    enum = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    table = gguf.get_tensor_name_map(enum, cfg.num_hidden_layers)
    renamed: dict[str, str] = {}
    for name in names:
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

    def read(name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        own = back.get(name, name)
        start, stop, _ = slice(start, stop).indices(shapes[name][0])
        n_heads = heads.get(name.split(".")[-2])
        if n_heads is None:
            return file.read(own, start, stop)
        head = shapes[name][0] // n_heads
        first, last = start // head * head, -(-stop // head) * head  # rows change places within their head
        values = file.read(own, first, last)
        ordered = values.reshape(-1, head // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return ordered[start - first : stop - first]

    return shapes, read


def load_tokenizer(file: Gguf) -> Any:
    """A transformers fast tokenizer from the metadata; ValueError if it is of a kind that is not known."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_bpe, "llama": _sentencepiece}
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


def _byte_bpe(file: Gguf, pieces: list[str], types: Sequence[int]) -> tuple[Any, bool]:
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


def _sentencepiece(file: Gguf, pieces: list[str], types: Sequence[int]) -> tuple[Any, bool]:
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
