"""`ModelConfig`, and config.json of Hugging Face to and from it, in the spelling of transformers 4 and of 5.

Whatever would change the numbers and is not implemented here is a ValueError: a field that is ignored gives a model
that runs and is wrong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxalign.models import llama, qwen


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training context.

    `linear` divides every frequency by `factor` (its other fields are None); `llama3` divides those of long wavelength,
    keeps those of short, and blends between (Llama 3.1 and later).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that the one decoder needs to know about a model. Names are those of HF's config.json.

    attention_bias is the bias of q, k and v, attention_out_bias that of o_proj. sliding_windows has one entry a layer:
    the number of last tokens (own one included) it attends to, or None. dtype is the source checkpoint's. num_labels
    above 0 means a score head in place of the language-model head; `labels` are the names of its outputs (id2label; ()
    where they have none) and `reward_weights` what each counts in their weighted sum, the reward (() means their mean).
    The last three say how the model is run and are never written to a config.json; `attention` is judged by
    `attention.choose`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    hidden_act: str
    initializer_range: float
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    num_labels: int = 0
    labels: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()

    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"


class Family(NamedTuple):
    """One `model_type`: HF's class name stem, HF's defaults, and the two directions of the particular fields."""

    class_stem: str
    defaults: Mapping[str, Any]
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", llama.LLAMA_DEFAULTS, llama.llama_fields, llama.llama_to_hf),
    "mistral": Family("Mistral", llama.MISTRAL_DEFAULTS, llama.mistral_fields, llama.mistral_to_hf),
    "qwen2": Family("Qwen2", qwen.QWEN2_DEFAULTS, qwen.qwen2_fields, qwen.qwen2_to_hf),
    "qwen3": Family("Qwen3", qwen.QWEN3_DEFAULTS, qwen.qwen3_fields, qwen.qwen3_to_hf),
}
KNOWN = (
    "jaxalign loads llama (Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2), mistral, qwen2 (Qwen 2, 2.5) and qwen3, with rope "
    "types default, linear and llama3 and the activation silu"
)
DTYPES = ("float32", "bfloat16", "float16")
# HF's default rope base, for every family here (transformers' default_theta).
DEFAULT_ROPE_THETA = 10000.0
_UNNAMED = "LABEL_{}"  # what transformers calls an output that nobody has named


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig` from the contents of a config.json, in transformers 4's or 5's spelling.

    Absent fields take the value that Hugging Face assumes for that model_type.

    Raises:
        ValueError: an unknown model_type, rope type, activation or dtype; a quantised checkpoint; a field that would
            change the numbers and is not implemented; numbers that contradict each other.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        code = " (its auto_map asks to run Python code from the folder, which jaxalign never does)"
        raise ValueError(
            f"config.json has model_type {model_type!r}, which jaxalign does not know"
            f"{code if hf.get('auto_map') else ''}. {KNOWN}"
        )
    family = FAMILIES[model_type]
    if hf.get("quantization_config"):
        raise ValueError(
            f"config.json has quantization_config {hf['quantization_config']!r}: quantised safetensors are not read. "
            "Use the unquantised checkpoint, or its GGUF file"
        )
    full = {**family.defaults, **hf}
    is_scored = _architecture(hf, family) == "ForSequenceClassification"

    heads = _integer(full, "num_attention_heads")
    layers = _integer(full, "num_hidden_layers")
    hidden = _integer(full, "hidden_size")
    kv_heads = heads if full["num_key_value_heads"] is None else _integer(full, "num_key_value_heads")
    if full["head_dim"] is None:
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and config.json has no head_dim"
            )
        head_dim = hidden // heads
    else:
        head_dim = _integer(full, "head_dim")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even number")

    if full["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"config.json has hidden_act {full['hidden_act']!r}. {KNOWN}")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"):
        if not isinstance(full.get(name, False), bool):
            raise ValueError(f"config.json has {name} = {full[name]!r}, expected true or false")
    if full.get("sliding_window") is not None:
        _integer(full, "sliding_window")

    rope_theta, rope_scaling = _rope(full)
    return ModelConfig(
        model_type=model_type,
        vocab_size=_integer(full, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(full, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_integer(full, "max_position_embeddings"),
        rms_norm_eps=_number(full, "rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=full["tie_word_embeddings"],
        hidden_act="silu",
        initializer_range=_number(full, "initializer_range", zero=True),
        bos_token_id=_token_id(full, "bos_token_id"),
        eos_token_id=token_ids(full["eos_token_id"], "eos_token_id"),
        pad_token_id=_token_id(full, "pad_token_id"),
        dtype=_dtype(full),
        num_labels=_num_labels(full) if is_scored else 0,
        labels=_labels(full) if is_scored else (),
        reward_weights=tuple(map(float, full.get("reward_weights") or ())) if is_scored else (),
        **family.fields(full),
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a model: what transformers 5 writes, and beside it what transformers 4 reads.

    Transformers 5 takes `rope_parameters` and `dtype`; 4 takes `rope_theta`, `rope_scaling` and `torch_dtype`. Both
    ignore or accept the other's keys, and here they always agree. `config_from_hf(config_to_hf(cfg)) == cfg` as far as
    the model goes (how it is run is not written).

    Raises:
        ValueError: `cfg` holds something its model_type can't say in a config.json.
    """
    if cfg.model_type not in FAMILIES:
        raise ValueError(f"model_type {cfg.model_type!r} can't be written as a config.json. {KNOWN}")
    family = FAMILIES[cfg.model_type]
    scaling = None
    if cfg.rope_scaling is not None:
        scaling = {key: value for key, value in vars(cfg.rope_scaling).items() if value is not None}
    head = "ForSequenceClassification" if cfg.num_labels else "ForCausalLM"
    eos = list(cfg.eos_token_id)
    hf: dict[str, Any] = dict(
        architectures=[family.class_stem + head],
        model_type=cfg.model_type,
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        max_position_embeddings=cfg.max_position_embeddings,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": cfg.rope_theta},
        rope_theta=cfg.rope_theta,
        rope_scaling=scaling,
        tie_word_embeddings=cfg.tie_word_embeddings,
        hidden_act=cfg.hidden_act,
        initializer_range=cfg.initializer_range,
        attention_dropout=0.0,
        bos_token_id=cfg.bos_token_id,
        eos_token_id=(eos[0] if len(eos) == 1 else eos) if eos else None,
        pad_token_id=cfg.pad_token_id,
        dtype=cfg.dtype,
        torch_dtype=cfg.dtype,
        use_cache=True,
    )
    if cfg.num_labels:
        names = cfg.labels or tuple(map(_UNNAMED.format, range(cfg.num_labels)))
        hf |= dict(
            num_labels=cfg.num_labels,
            id2label={str(label): name for label, name in enumerate(names)},
            label2id={name: label for label, name in enumerate(names)},
            problem_type="regression",
        )
        if cfg.reward_weights:
            hf["reward_weights"] = list(cfg.reward_weights)
    return hf | family.to_hf(cfg)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """An id, a list of ids or None as a tuple without repeats, in order. `name` is for the error.

    Raises:
        ValueError: neither of the three.
    """
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for one in values:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise ValueError(f"config.json has {name} = {value!r}, expected a token id, a list of them or null")
    return tuple(dict.fromkeys(values))


def _architecture(hf: Mapping[str, Any], family: Family) -> str:
    """The head that the first entry of `architectures` names."""
    names = hf.get("architectures") or [family.class_stem + "ForCausalLM"]
    heads = ("ForCausalLM", "ForSequenceClassification", "Model")
    for head in heads:
        if names[0] == family.class_stem + head:
            return head
    expected = [family.class_stem + head for head in heads]
    raise ValueError(
        f"config.json of model_type {hf['model_type']} has architectures {names}; read are {expected}. {KNOWN}"
    )


def _integer(hf: Mapping[str, Any], name: str) -> int:
    value = hf[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {name} = {value!r}, expected a positive integer")
    return value


def _number(hf: Mapping[str, Any], name: str, *, zero: bool = False) -> float:
    value = hf.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not (value > 0 or (zero and value == 0)):
        raise ValueError(f"config.json has {name} = {value!r}, expected a number {'>= 0' if zero else '> 0'}")
    return float(value)


def _token_id(hf: Mapping[str, Any], name: str) -> int | None:
    # Old Llama files say "no pad token" as -1.
    if hf[name] is None or hf[name] == -1:
        return None
    ids = token_ids(hf[name], name)
    if len(ids) != 1:
        raise ValueError(f"config.json has {name} = {hf[name]!r}, expected one token id or null")
    return ids[0]


def _dtype(hf: Mapping[str, Any]) -> str:
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise ValueError(f"config.json has dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return short


def _num_labels(hf: Mapping[str, Any]) -> int:
    # transformers does not write its default of two labels.
    if hf.get("id2label"):
        return len(hf["id2label"])
    return _integer({"num_labels": 2, **hf}, "num_labels")


def _labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    names = hf.get("id2label") or {}
    ordered = tuple(names[key] for key in sorted(names, key=int))
    return () if ordered == tuple(map(_UNNAMED.format, range(len(ordered)))) else ordered


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"config.json has {name} = {value!r}, expected an object or null")
        if value and any(isinstance(inner, Mapping) for inner in value.values()):
            raise ValueError(f"config.json has {name} = {value!r}: rope parameters by layer are not known. {KNOWN}")
    theta = (old or {}).get("rope_theta") or (new or {}).get("rope_theta") or hf.get("rope_theta")
    theta = _number({"rope_theta": DEFAULT_ROPE_THETA if theta is None else theta}, "rope_theta")
    for name, given in (("rope_parameters", (new or {}).get("rope_theta")), ("top level", hf.get("rope_theta"))):
        if given is not None and given != theta:
            raise ValueError(f"config.json contradicts itself: rope_theta is {theta}, but {given} at the {name}")
    scaling = _scaling(old, hf) if old else _scaling(new or {}, hf)
    if old and new and _scaling(new, hf) != scaling:
        raise ValueError(f"config.json contradicts itself: rope_scaling is {old!r}, rope_parameters is {new!r}")
    return theta, scaling


def _scaling(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json has partial_rotary_factor {partial!r}; only 1 is known. {KNOWN}")
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return RopeScaling("linear", _number(rope, "factor"))
    if rope_type == "llama3":
        # HF's order: a top-level value, then the scaling's own, then the whole context.
        original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        original = original or hf["max_position_embeddings"]
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if high <= low:
            raise ValueError(f"llama3 rope scaling needs high_freq_factor > low_freq_factor, got {high} and {low}")
        context = _integer({"original_max_position_embeddings": original}, "original_max_position_embeddings")
        return RopeScaling("llama3", _number(rope, "factor"), low, high, context)
    raise ValueError(f"config.json has rope type {rope_type!r}. {KNOWN}")
