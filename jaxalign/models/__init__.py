"""Models as functions on a nested dict of weights: `declare`, `init`, `apply`, `unembed`, `value`, `init_cache`.

Letters: R rows, T time, S cache slots, L layers, D model, V vocabulary, K key/value heads, H head size.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import quantize
from jaxalign.models.config import ModelConfig, RopeScaling, config_from_hf, config_to_hf
from jaxalign.models.decoder import REMAT_POLICIES, Declared, Decoder

__all__ = [
    "REMAT_POLICIES",
    "ModelConfig",
    "Params",
    "RopeScaling",
    "Weight",
    "abstract",
    "apply",
    "as_used",
    "config_from_hf",
    "config_to_hf",
    "declare",
    "head_table",
    "init",
    "init_cache",
    "unembed",
    "unstacked",
    "value",
]

Params = dict[str, Any]


class Weight(NamedTuple):
    """What the decoder declares of one weight: its shape and the logical names of its dimensions (sharding.RULES)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def _boxed_init(cfg: ModelConfig, key: jax.Array) -> Any:
    token = jnp.zeros((1, 1), jnp.int32)
    cfg = dataclasses.replace(cfg, attention="xla")  # weights don't depend on it, and it depends on the devices
    return Decoder(cfg).init(key, token, token, None, None, None, None)["params"]


@functools.lru_cache(maxsize=16)
def declare(cfg: ModelConfig) -> Params:
    """Every weight of a model as a nested dict of Weight. Nothing is computed."""
    boxed = jax.eval_shape(lambda: _boxed_init(cfg, jax.random.key(0)))
    return jax.tree.map(
        lambda box: Weight(box.value.shape, box.names), boxed, is_leaf=lambda x: isinstance(x, Declared)
    )


def abstract(cfg: ModelConfig, dtype: Any = jnp.float32, shardings: Any = None) -> Params:
    """The weights as ShapeDtypeStructs of `dtype`, with `shardings` (a tree of the same form) where given."""
    declared = declare(cfg)
    is_weight = lambda x: isinstance(x, Weight)  # noqa: E731
    if shardings is None:
        return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, dtype), declared, is_leaf=is_weight)
    return jax.tree.map(
        lambda w, s: jax.ShapeDtypeStruct(w.shape, dtype, sharding=s), declared, shardings, is_leaf=is_weight
    )


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random float32 weights: normal(initializer_range), norms 1, biases 0. Jit it, with out_shardings on a mesh."""
    return nn.meta.unbox(_boxed_init(cfg, key))


def apply(
    cfg: ModelConfig,
    params: Params,
    tokens_RT: jax.Array,
    positions_RT: jax.Array,
    segment_ids_RT: jax.Array | None = None,
    *,
    prefix_ids_RT: jax.Array | None = None,
    cache: Params | None = None,
    dropout_keys_R: jax.Array | None = None,
) -> tuple[jax.Array, Params | None]:
    """The decoder up to its last norm.

    Args:
      tokens_RT, positions_RT: int32. Positions turn the rotary embedding and nothing else.
      segment_ids_RT: int32; tokens see earlier slots of their own segment only. None (static) means one segment a row:
        plain causal attention, in which right padding needs no mask.
      prefix_ids_RT: int32; the segment that a token sees besides its own (0: none), of the same row and before it. A
        segment that several share is computed once. Windows count slots, so not for models with sliding windows.
      cache: from `init_cache`, a ring that all rows write at the same slots [index, index + T), which have to lie
        within it. A row sees what it has written; segments and prefixes are not for caches. T tokens that fill it begin
        it: they are computed as without one, right padding is theirs.
      dropout_keys_R: a key (`jax.random.key`) for each row, by which inputs of adapters are dropped (with the rate of
        lora.Spec.dropout); None: nothing is.

    Returns:
      Hidden states [R, T, D] in cfg.compute_dtype, and the extended cache (None without one).
    """
    out: Any = Decoder(cfg).apply(
        {"params": params}, tokens_RT, positions_RT, segment_ids_RT, prefix_ids_RT, cache, dropout_keys_R
    )
    return out


def as_used(cfg: ModelConfig, params: Params) -> Params:
    """Every weight in the dtype that the forward pass casts it to anyway, so that no number changes.

    Norms are used in float32; quantised weights stay as they are.
    """

    def cast(path: Any, leaf: Any) -> Any:
        is_kept = isinstance(leaf, quantize.Quantized) or path[-1].key == "scale"
        return leaf if is_kept else leaf.astype(cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda x: isinstance(x, quantize.Quantized))


def head_table(cfg: ModelConfig, params: Params) -> jax.Array:
    """The head's weight [V, D]: the embedding itself where it is tied."""
    table = params["embed_tokens" if cfg.tie_word_embeddings else "lm_head"]["embedding"]
    return quantize.dequantize(table, cfg.compute_dtype) if isinstance(table, quantize.Quantized) else table


def unembed(cfg: ModelConfig, params: Params, hidden_RTD: jax.Array) -> jax.Array:
    """Logits [R, T, V] in float32. For a few positions; training scores through `logprobs`, which never holds these."""
    table_VD = head_table(cfg, params).astype(hidden_RTD.dtype)
    return jnp.einsum("RTD,VD->RTV", hidden_RTD, table_VD, preferred_element_type=jnp.float32)


def value(cfg: ModelConfig, params: Params, hidden_RTD: jax.Array) -> jax.Array:
    """The score head's outputs [R, T, num_labels] in float32 (reward models, critics)."""
    kernel = params["score"]["kernel"].astype(hidden_RTD.dtype)
    return jnp.einsum("RTD,DK->RTK", hidden_RTD, kernel, preferred_element_type=jnp.float32)


def unstacked(params: Params) -> Params:
    """The weights with a tuple of layers in place of stacked ones, for `apply` with a cache of the same form.

    Decoding touches every weight once a token. Where a loop over stacked layers copies each layer's slice to compute
    with it (XLA on CPU), layers that stand for themselves are faster, and compile for longer.
    """
    layers, count = params["layers"], len(jax.tree.leaves(params["layers"])[0])
    return params | {"layers": tuple(jax.tree.map(lambda x, n=n: x[n], layers) for n in range(count))}


def init_cache(cfg: ModelConfig, rows: int, length: int, *, stacked: bool = True) -> Params:
    """An empty cache of `length` slots.

    Returns:
      k [L, R, K, H, S] and v [L, R, K, S, H] in cfg.compute_dtype, or tuples of L arrays for `unstacked` weights: the
      slots stand where the products of `attention.attend` want them, which on a CPU halves their time; index int32, the
      slot that is written next; lengths [R] int32, the tokens that a row has in the cache (-n: its next n tokens are
      padding).
    """
    depth, heads = cfg.num_hidden_layers, (rows, cfg.num_key_value_heads)

    def buffers(*shape: int) -> Any:
        if stacked:
            return jnp.zeros((depth, *heads, *shape), cfg.compute_dtype)
        return tuple(jnp.zeros((*heads, *shape), cfg.compute_dtype) for _ in range(depth))

    return {
        "k": buffers(cfg.head_dim, length),
        "v": buffers(length, cfg.head_dim),
        "index": jnp.zeros((), jnp.int32),
        "lengths": jnp.zeros(rows, jnp.int32),
    }
