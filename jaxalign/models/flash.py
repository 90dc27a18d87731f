"""Attention that never holds the scores: JAX's splash kernel on TPU, cuDNN's on GPU. Causal, of whole rows.

On a mesh each device attends with its own rows and heads; with a sequence axis, time is exchanged for heads before and
heads for time after (all-to-all): DeepSpeed-Ulysses (Jacobs et al. 2023).

Letters: R rows, T time, N query heads, K key/value heads, H head size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxalign import sharding
from jaxalign.models import attention

LANES = 128  # of a TPU's vector unit: the kernel's blocks are multiples of it

# Largest block of queries and of keys, in tokens: float32 scores of a block, 1 MB, leave a core's memory to the
# kernel's own double buffers. Not tuned: no TPU was at hand.
BLOCK = 512


def attend(
    name: str,
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    segment_ids_RT: jax.Array | None,
    *,
    window: int | None,
) -> jax.Array:
    """Causal softmax attention within segments and within `window` slots (own one included). Returns [R, T, N, H].

    Args:
      name: a key of KERNELS.
      segment_ids_RT: int32; None means one segment a row.
    """
    kernel = functools.partial(KERNELS[name], window=window)
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(q_RTNH, k_RTKH, v_RTKH, segment_ids_RT)
    q_RTNH, k_RTKH, v_RTKH = attention.split_heads(q_RTNH, k_RTKH, v_RTKH)
    rows = sharding.fit(q_RTNH.shape[0], sharding.ROWS)
    spec = PartitionSpec(rows, None, attention.HEADS)
    # No collective happens inside, so there is nothing that the check of replication could find.
    specs = (spec, spec, spec, PartitionSpec(rows))
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(q_RTNH, k_RTKH, v_RTKH, segment_ids_RT)


def splash(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    segment_ids_RT: jax.Array | None,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """JAX's block-sparse TPU kernel on one device (jax.experimental.pallas.ops.tpu.splash_attention).

    It takes any head size and grouped queries as they are; time is padded here to equal blocks of at most BLOCK.
    `interpret` runs it without a TPU, slowly.
    """
    # Pallas takes a while to import, and nobody else needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    time, head_dim = q_RTNH.shape[1], q_RTNH.shape[3]
    n_blocks = -(-time // BLOCK)
    block = -(-time // (n_blocks * LANES)) * LANES
    padded = n_blocks * block
    # One head's mask stands for all of them.
    whole = (padded, padded)
    one = kernels.CausalMask(whole) if window is None else kernels.LocalMask(whole, (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([one]),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q_RTNH = (q_RTNH.astype(jnp.float32) * lax.rsqrt(jnp.float32(head_dim))).astype(q_RTNH.dtype)
    heads_first = [_pad_time(x, padded).swapaxes(1, 2) for x in (q_RTNH, k_RTKH, v_RTKH)]
    segments = None
    if segment_ids_RT is not None:
        segments_RT = _pad_time(segment_ids_RT, padded)
        segments = kernels.SegmentIds(segments_RT, segments_RT)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)[:, :time]


def cudnn(
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    segment_ids_RT: jax.Array | None,
    *,
    window: int | None,
) -> jax.Array:
    """cuDNN's flash attention on one device.

    It has no segment ids: packed rows bring their mask as a bias, [R, 1, T, T] in the compute dtype, of which the
    backward pass makes a gradient that nobody asked for (jax #39512, mended after jax 0.10.2). So that is on request
    only, until it was measured.
    """
    flash = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    time = q_RTNH.shape[1]
    even = time + time % 2  # there is no gradient for odd lengths
    q_RTNH, k_RTKH, v_RTKH = (_pad_time(x, even) for x in (q_RTNH, k_RTKH, v_RTKH))
    if segment_ids_RT is None:
        local = None if window is None else (window - 1, 0)
        return flash(q_RTNH, k_RTKH, v_RTKH, local_window_size=local)[:, :time]
    segments_RT = _pad_time(segment_ids_RT, even)
    mask_RTT = attention.attention_mask(attention.distance(even, even), segments_RT, segments_RT, window=window)
    return flash(q_RTNH, k_RTKH, v_RTKH, mask=mask_RTT[:, None])[:, :time]


KERNELS = {"splash": splash, "cudnn": cudnn}


def _pad_time(x: jax.Array, length: int) -> jax.Array:
    """Zeros after the end of axis 1. No real query sees them: attention is causal."""
    return jnp.pad(x, [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)])
