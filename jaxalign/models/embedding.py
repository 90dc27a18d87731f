"""Look-up in a table that is split by vocabulary, without ever gathering the table.

Letters: R rows, T time, V vocabulary, D model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxalign import sharding

# What a group's states may take at once in float32, which they are on the way back. Long rows are looked up in parts.
GROUP_BYTES = 256 * 2**20


def vocab_axes(table_VD: Any, mesh: Any) -> tuple[str, ...]:
    """The mesh axes that a table [V, D] is split over, by the one rule in `sharding.RULES`."""
    axes = sharding.partition(table_VD.shape, ("vocab", None), mesh)[0] or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)  # PartitionSpec makes a name of a tuple of one


def lookup(table_VD: jax.Array, tokens_RT: jax.Array, dtype: Any) -> jax.Array:
    """table[tokens] as [R, T, D] in `dtype`.

    On a mesh each device looks the tokens of its whole fsdp (and sequence) group up in its own slice of the
    vocabulary, and the sum over the group (all terms but one are zero, so it is exact) returns to the tokens' owners.
    What travels is the batch's activations, in the forward and in the backward pass, instead of the table.
    """
    mesh = sharding.current_mesh()
    axes = () if mesh is None else vocab_axes(table_VD, mesh)
    if sharding.axis_size(axes, mesh) == 1:
        return table_VD.astype(dtype)[tokens_RT] if table_VD.dtype == dtype else table_VD[tokens_RT].astype(dtype)
    rows = sharding.fit(tokens_RT.shape[0], sharding.ROWS, mesh)
    time = sharding.fit(tokens_RT.shape[1], "sequence", mesh)
    # Axes that split both tokens and vocabulary, with the dimension of the tokens.
    shared = {axis: dim for axis, dim, split in (("fsdp", 0, rows), ("sequence", 1, time)) if split and axis in axes}
    others = tuple(axis for axis in axes if axis not in shared)

    def look(table: jax.Array, tokens: jax.Array) -> jax.Array:
        for axis, dim in shared.items():
            tokens = lax.all_gather(tokens, axis, axis=dim, tiled=True)
        index = tokens - lax.axis_index(axes) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        found = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0).astype(dtype)
        if others:
            found = lax.psum(found, others)
        for axis, dim in shared.items():
            found = sharding.sum_scatter(found, axis, dim)
        return found

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        rows, time = tokens.shape
        group_bytes = tokens.size * sharding.axis_size(tuple(shared), mesh) * table.shape[1] * 4
        n = min(-(-group_bytes // GROUP_BYTES), time)
        if n == 1:
            return look(table, tokens)
        length = -(-time // n)
        chunks = jnp.pad(tokens, ((0, 0), (0, n * length - time))).reshape(rows, n, length).swapaxes(0, 1)
        # Recomputed, so that the backward pass keeps tokens and not a [.., D] mask of what was found.
        found = lax.map(jax.checkpoint(functools.partial(look, table), prevent_cse=False), chunks)
        return found.swapaxes(0, 1).reshape(rows, n * length, -1)[:, :time]

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(axes), PartitionSpec(rows, time)),
        out_specs=PartitionSpec(rows, time),
    )(table_VD, tokens_RT)
