"""Config of the Llama family: `llama` (Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2) and `mistral`.

A family says three things: the values that Hugging Face assumes for fields absent from a config.json, the fields of our
`ModelConfig` that are particular to it, and how those are spelt on the way back. It touches no weights: every tensor's
name follows from the declared tree (`models.declare`).
"""

from collections.abc import Mapping
from typing import Any

# What LlamaConfig and MistralConfig of transformers assume (5.23; the same numbers as 4.x). None means "see derived".
LLAMA_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    head_dim=None,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    initializer_range=0.02,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    attention_bias=False,
    mlp_bias=False,
)
MISTRAL_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=None,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    initializer_range=0.02,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    sliding_window=4096,
)


def llama_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` particular to `llama`, from a config.json with the defaults filled in."""
    return dict(
        attention_bias=hf["attention_bias"],
        attention_out_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        qk_norm=False,
        sliding_windows=(None,) * hf["num_hidden_layers"],
    )


def mistral_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` particular to `mistral`: one window for all layers, no biases.

    Raises:
        ValueError: `layer_types` gives a layer full attention while `sliding_window` is set (transformers would
            silently window every layer).
    """
    window = hf["sliding_window"]
    if window is not None and "full_attention" in (hf.get("layer_types") or ()):
        raise ValueError(
            f"a mistral config has one window for all layers, got sliding_window={window} together with "
            f"layer_types={hf['layer_types']}; set sliding_window to null or remove layer_types"
        )
    return dict(
        attention_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(window,) * hf["num_hidden_layers"],
    )


def llama_to_hf(cfg: Any) -> dict[str, Any]:
    """The keys of config.json particular to `llama`. `cfg` is a `ModelConfig`."""
    if cfg.attention_bias != cfg.attention_out_bias:
        raise ValueError(
            "a llama config.json has one attention_bias for the q, k, v and o projections, got "
            f"attention_bias={cfg.attention_bias}, attention_out_bias={cfg.attention_out_bias}"
        )
    if any(window is not None for window in cfg.sliding_windows) or cfg.qk_norm:
        raise ValueError(
            "a llama config.json can say neither a sliding window nor qk_norm, got "
            f"sliding_windows={cfg.sliding_windows}, qk_norm={cfg.qk_norm}; use model_type mistral or qwen3"
        )
    return dict(attention_bias=cfg.attention_bias, mlp_bias=cfg.mlp_bias, pretraining_tp=1)


def mistral_to_hf(cfg: Any) -> dict[str, Any]:
    """The keys of config.json particular to `mistral`. `cfg` is a `ModelConfig`."""
    windows = set(cfg.sliding_windows)
    if len(windows) != 1 or cfg.qk_norm or cfg.attention_bias or cfg.attention_out_bias or cfg.mlp_bias:
        raise ValueError(
            "a mistral config.json can say one window for all layers and no bias or qk_norm, got "
            f"sliding_windows={cfg.sliding_windows}, qk_norm={cfg.qk_norm}, attention_bias={cfg.attention_bias}, "
            f"attention_out_bias={cfg.attention_out_bias}, mlp_bias={cfg.mlp_bias}"
        )
    return dict(sliding_window=windows.pop())
