"""Attention over explicit masks: causal by slot, within a segment, within a window.

Letters: R rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries that share one, Q = G * T,
H head size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxalign import sharding

MASKED = -1e30  # finite, so that a row without any key stays a number

HEADS = ("tensor", "sequence")


def distance(n_queries: int, n_keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """How many slots key s lies before query t, which stands in slot `first_query + t`: int32 [T, S]."""
    return (first_query + jnp.arange(n_queries))[:, None] - jnp.arange(n_keys)[None, :]


def attention_mask(
    distance_TS: jax.Array,
    query_segments_RT: jax.Array | None = None,
    key_segments_RS: jax.Array | None = None,
    *,
    prefixes_RT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """True where a query may look: bool, [T, S] without segments, [R, T, S] with them.

    Order is that of slots, not of positions (packed rows restart their positions): a query sees slots up to its own,
    of its own segment or of the segment that `prefixes` names, fewer than `window` slots back.
    """
    mask = distance_TS >= 0
    if window is not None:
        mask &= distance_TS < window
    if query_segments_RT is not None and key_segments_RS is not None:
        keys_R1S = key_segments_RS[:, None, :]
        seen_RTS = query_segments_RT[:, :, None] == keys_R1S
        if prefixes_RT is not None:
            seen_RTS |= prefixes_RT[:, :, None] == keys_R1S
        mask = mask & seen_RTS
    return mask


def attend(q_RTNH: jax.Array, k_RSKH: jax.Array, v_RSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped queries; scores and softmax in float32. Returns [R, T, N, H].

    With a sequence axis in the mesh, time is exchanged for heads on the way in (all-to-all) and the caller's layout
    brings it back: DeepSpeed-Ulysses (Jacobs et al. 2023).
    """
    rows, n_queries, n_heads, head_dim = q_RTNH.shape
    if k_RSKH.shape[2] % sharding.axis_size(HEADS):
        # Too few key/value heads for the heads' axes: give every query head its own copy, which splits.
        k_RSKH, v_RSKH = (jnp.repeat(x, n_heads // x.shape[2], axis=2) for x in (k_RSKH, v_RSKH))
    q_RTNH, k_RSKH, v_RSKH = (sharding.constrain(x, sharding.ROWS, None, HEADS, None) for x in (q_RTNH, k_RSKH, v_RSKH))
    n_kv = k_RSKH.shape[2]
    # Heads first, and a group's queries one after another: then both products are plain matrix products per key/value
    # head, and no transposed copy is made of the scores, which are by far the largest array here.
    q_RKGTH = q_RTNH.reshape(rows, n_queries, n_kv, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_RKQH = q_RKGTH.reshape(rows, n_kv, -1, head_dim)
    k_RKSH, v_RKSH = k_RSKH.swapaxes(1, 2), v_RSKH.swapaxes(1, 2)
    scores_RKQS = jnp.einsum("RKQH,RKSH->RKQS", q_RKQH, k_RKSH, preferred_element_type=jnp.float32)
    scores_RKGTS = scores_RKQS.reshape(rows, n_kv, -1, *mask.shape[-2:])
    mask_R11TS = mask[None, None, None] if mask.ndim == 2 else mask[:, None, None]
    scores_RKGTS = jnp.where(mask_R11TS, scores_RKGTS * lax.rsqrt(jnp.float32(head_dim)), MASKED)
    weights_RKQS = jax.nn.softmax(scores_RKGTS, axis=-1).astype(v_RSKH.dtype).reshape(scores_RKQS.shape)
    out_RKQH = jnp.einsum("RKQS,RKSH->RKQH", weights_RKQS, v_RKSH)
    out_RTNH = out_RKQH.reshape(rows, n_kv, -1, n_queries, head_dim).transpose(0, 3, 1, 2, 4).reshape(q_RTNH.shape)
    return sharding.constrain(out_RTNH, sharding.ROWS, None, HEADS, None)
