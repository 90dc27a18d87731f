"""Attention over explicit masks (causal by slot, within a segment, within a window), and what is chosen instead of it.

XLA's attention runs everywhere and sees whatever a mask says; its scores take [R, N, T, S] float32. The kernels of
flash.py never hold them; where those can run is known here.

Letters: R rows, T queries, S keys, N query heads, K key/value heads, G = N / K queries that share one, Q = G * T,
H head size.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxalign import sharding
from jaxalign.models.config import ModelConfig

log = logging.getLogger(__name__)

MASKED = -1e30  # finite, so that a row without any key stays a number

HEADS = ("tensor", "sequence")

KERNEL_OF = {"tpu": "splash", "gpu": "cudnn"}  # by platform


def choose(
    cfg: ModelConfig, mesh: Any = None, *, packed: bool = False, prefixes: bool = False, cached: bool = False
) -> tuple[str, str]:
    """How attention is computed on `mesh`, and why: ("xla" | "splash" | "cudnn", reason).

    Args:
      cfg: its field `attention` is "auto" (the platform's kernel where it can run, otherwise XLA) or one of the three.
      mesh: concrete or abstract; None: the current one, and without any the default backend.
      packed: rows have segment ids. prefixes: segments are shared (`prefix_ids`). cached: keys come from a cache. The
        kernels know neither of the last two: such a call is XLA's even if cfg.attention says otherwise.

    Raises:
      ValueError: cfg.attention names a kernel that can't run here.
    """
    mesh = mesh if mesh is not None else sharding.current_mesh()
    platform = sharding.platform(mesh)
    if cached:
        return "xla", "keys and values come from a cache"
    if prefixes:
        return "xla", "rows share prefixes (data.prefixes), which no kernel knows"
    kernel = KERNEL_OF.get(platform) if cfg.attention == "auto" else cfg.attention
    if kernel is None:
        return "xla", f"there is no kernel for {platform}"
    if kernel == "xla":
        return "xla", "model.attention says so"
    if obstacle := _obstacle(kernel, cfg, mesh, platform):
        if cfg.attention == "auto":
            return "xla", obstacle
        raise ValueError(
            f"model.attention is {kernel!r}, but {obstacle}. Set it to 'auto' (a kernel where one can run) or to 'xla'"
        )
    if packed and kernel == "cudnn" and cfg.attention == "auto":
        return "xla", "rows are packed and cuDNN has no segment ids ('cudnn' would give it the mask as a bias)"
    return kernel, {"splash": "the devices are TPUs", "cudnn": "the devices are NVIDIA GPUs"}[kernel]


def _obstacle(kernel: str, cfg: ModelConfig, mesh: Any, platform: str) -> str | None:
    """Why a kernel can't run, None if it can. cuDNN's limits are those that jax.nn.dot_product_attention checks."""
    parts = sharding.axis_size(HEADS, mesh)
    if cfg.num_attention_heads % parts:
        return f"{cfg.num_attention_heads} heads do not divide over mesh.tensor x mesh.sequence = {parts}"
    if kernel == "splash":
        return None if platform == "tpu" else f"the kernel runs on TPUs and the devices are of platform {platform}"
    if platform != "gpu":
        return f"cuDNN runs on NVIDIA GPUs and the devices are of platform {platform}"
    device = jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:
        return "cuDNN runs on NVIDIA GPUs and these are not"
    if cfg.compute_dtype not in ("bfloat16", "float16"):
        return f"cuDNN's flash attention computes in bfloat16 or float16 and model.compute_dtype is {cfg.compute_dtype}"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    if capability < (8, 0):
        return f"cuDNN's flash attention needs compute capability 8.0 and {device.device_kind} has {capability}"
    largest = 256 if capability >= (9, 0) else 128
    if cfg.head_dim > largest or cfg.head_dim % 8:
        return (
            f"cuDNN's flash attention takes head sizes up to {largest} on {device.device_kind}, in eights, "
            f"and head_dim is {cfg.head_dim}"
        )
    return None


@functools.cache
def say(name: str, reason: str) -> None:
    """Logs a choice once a process."""
    log.info("attention: %s, because %s", name, reason)


def distance(n_queries: int, n_keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """How many slots key s lies before query t, which stands in slot `first_query + t`: int32 [T, S]."""
    return (first_query + jnp.arange(n_queries))[:, None] - jnp.arange(n_keys)[None, :]


def age(n_queries: int, n_keys: int, index: jax.Array) -> jax.Array:
    """How many tokens before query t, which stands in slot `index + t` of a ring, slot s was written: int32 [T, S]."""
    return distance(n_queries, n_keys, index) % n_keys


def cache_mask(age_TS: jax.Array, lengths_R: jax.Array, *, window: int | None = None) -> jax.Array:
    """True where a query may look in a cache: bool [R, T, S].

    A row sees what it has written, itself included: the `lengths` tokens before this call's and the call's own.
    """
    seen_RT = lengths_R[:, None] + 1 + jnp.arange(age_TS.shape[0])
    mask = age_TS < seen_RT[:, :, None]
    return mask if window is None else mask & (age_TS < window)


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


def split_heads(q_RTNH: jax.Array, k_RSKH: jax.Array, v_RSKH: jax.Array) -> tuple[jax.Array, ...]:
    """q, k and v with whole time and heads split over HEADS, where the query heads divide.

    Too few key/value heads are copied, just as often as makes them split.
    """
    n_kv, parts = k_RSKH.shape[2], sharding.axis_size(HEADS)
    if n_kv % parts and q_RTNH.shape[2] % parts == 0:
        k_RSKH, v_RSKH = (jnp.repeat(x, math.lcm(n_kv, parts) // n_kv, axis=2) for x in (k_RSKH, v_RSKH))
    return tuple(sharding.constrain(x, sharding.ROWS, None, HEADS, None) for x in (q_RTNH, k_RSKH, v_RSKH))


def split_time(x_RTNH: jax.Array) -> jax.Array:
    """Heads with time split over the sequence axis, as the rest of a layer has it.

    Said of q, k, v and the output, so that these are what is exchanged and not what they are computed from.
    """
    return sharding.constrain(x_RTNH, sharding.ROWS, "sequence", "tensor", None)


def attend(q_RTNH: jax.Array, k_RSKH: jax.Array, v_RSKH: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped queries; scores and softmax in float32. Returns [R, T, N, H].

    With a sequence axis in the mesh, time is exchanged for heads on the way in (all-to-all) and the caller's
    `split_time` brings it back: DeepSpeed-Ulysses (Jacobs et al. 2023).
    """
    rows, n_queries, _, head_dim = q_RTNH.shape
    q_RTNH, k_RSKH, v_RSKH = split_heads(q_RTNH, k_RSKH, v_RSKH)
    n_kv = k_RSKH.shape[2]
    # Heads first, and a group's queries one after another: then both products are plain matrix products per key/value
    # head, and no transposed copy is made of the scores, which are by far the largest array here.
    q_RKGTH = q_RTNH.reshape(rows, n_queries, n_kv, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_RKQH = q_RKGTH.reshape(rows, n_kv, -1, head_dim)
    k_RKSH, v_RKSH = k_RSKH.swapaxes(1, 2), v_RSKH.swapaxes(1, 2)
    if n_queries == 1 and sharding.platform() == "cpu":
        # A product of so few rows is cut into a call for each head of each row there; a token-step of 32 rows takes
        # 0.86x as long without it, one of 8 rows as long.
        k_RKHS = k_RKSH.swapaxes(2, 3).astype(jnp.float32)
        scores_RKQS = (q_RKQH[..., None] * k_RKHS[:, :, None]).sum(axis=-2)
    else:
        scores_RKQS = jnp.einsum("RKQH,RKSH->RKQS", q_RKQH, k_RKSH, preferred_element_type=jnp.float32)
    scores_RKGTS = scores_RKQS.reshape(rows, n_kv, -1, *mask.shape[-2:])
    mask_R11TS = mask[None, None, None] if mask.ndim == 2 else mask[:, None, None]
    scores_RKGTS = jnp.where(mask_R11TS, scores_RKGTS * lax.rsqrt(jnp.float32(head_dim)), MASKED)
    weights_RKQS = jax.nn.softmax(scores_RKGTS, axis=-1).astype(v_RSKH.dtype).reshape(scores_RKQS.shape)
    out_RKQH = jnp.einsum("RKQS,RKSH->RKQH", weights_RKQS, v_RKSH)
    out_RTNH = out_RKQH.reshape(rows, n_kv, -1, n_queries, head_dim).transpose(0, 3, 1, 2, 4).reshape(q_RTNH.shape)
    return sharding.constrain(out_RTNH, sharding.ROWS, None, HEADS, None)
