"""Config of the Qwen family: `qwen2` (Qwen 2 and 2.5) and `qwen3`.

See `llama.py` for what a family says. Both may window some layers only: `layer_types` names them, or, in files older
than that field, every layer from `max_window_layers` on.
"""

from collections.abc import Mapping
from typing import Any

# What Qwen2Config and Qwen3Config of transformers assume (5.23; the same numbers as 4.x).
QWEN2_DEFAULTS: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=None,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    initializer_range=0.02,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
QWEN3_DEFAULTS: dict[str, Any] = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}


def _sliding_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window (tokens, the own one included) or None per layer."""
    layers = hf["num_hidden_layers"]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    kinds = hf["layer_types"]
    if kinds is None:
        return tuple(window if layer >= hf["max_window_layers"] else None for layer in range(layers))
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}; they must agree")
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layer_types holds {unknown}; known are full_attention and sliding_attention")
    if window is None and "sliding_attention" in kinds:
        raise ValueError(
            "layer_types asks for sliding_attention but there is no window: "
            f"use_sliding_window={hf['use_sliding_window']}, sliding_window={hf['sliding_window']}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def qwen2_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` particular to `qwen2`: always a bias on q, k and v and none elsewhere."""
    return dict(
        attention_bias=True,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=_sliding_windows(hf),
    )


def qwen3_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` particular to `qwen3`: RMS norm on each head's q and k; `attention_bias` means all."""
    return dict(
        attention_bias=hf["attention_bias"],
        attention_out_bias=hf["attention_bias"],
        mlp_bias=False,
        qk_norm=True,
        sliding_windows=_sliding_windows(hf),
    )


def _windows_to_hf(cfg: Any) -> dict[str, Any]:
    windows = {window for window in cfg.sliding_windows if window is not None}
    if len(windows) > 1:
        raise ValueError(f"a {cfg.model_type} config.json can say one window size, got {cfg.sliding_windows}")
    sliding = [window is not None for window in cfg.sliding_windows]
    # Readers older than `layer_types` window every layer from max_window_layers on.
    first = sliding.index(True) if True in sliding else cfg.num_hidden_layers
    return dict(
        use_sliding_window=bool(windows),
        sliding_window=windows.pop() if windows else None,
        max_window_layers=first,
        layer_types=["sliding_attention" if one else "full_attention" for one in sliding],
    )


def qwen2_to_hf(cfg: Any) -> dict[str, Any]:
    """The keys of config.json particular to `qwen2`. `cfg` is a `ModelConfig`."""
    if not cfg.attention_bias or cfg.attention_out_bias or cfg.mlp_bias or cfg.qk_norm:
        raise ValueError(
            "a qwen2 config.json means a bias on q, k and v and nothing else, got "
            f"attention_bias={cfg.attention_bias}, attention_out_bias={cfg.attention_out_bias}, "
            f"mlp_bias={cfg.mlp_bias}, qk_norm={cfg.qk_norm}"
        )
    return _windows_to_hf(cfg)


def qwen3_to_hf(cfg: Any) -> dict[str, Any]:
    """The keys of config.json particular to `qwen3`. `cfg` is a `ModelConfig`."""
    if cfg.attention_bias != cfg.attention_out_bias or cfg.mlp_bias or not cfg.qk_norm:
        raise ValueError(
            "a qwen3 config.json means qk_norm, one attention_bias for q, k, v and o, and no mlp_bias, got "
            f"attention_bias={cfg.attention_bias}, attention_out_bias={cfg.attention_out_bias}, "
            f"mlp_bias={cfg.mlp_bias}, qk_norm={cfg.qk_norm}"
        )
    return {**_windows_to_hf(cfg), "attention_bias": cfg.attention_bias}
