"""Look-up in a table that is split by vocabulary, without ever gathering the table.

Letters: R rows, T time, V vocabulary, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxalign import sharding


def vocab_axes(table_VD: Any, mesh: Any) -> tuple[str, ...]:
    """The mesh axes that a table [V, D] is split over, by the one rule in `sharding.RULES`."""
    spec = sharding.partition(table_VD.shape, ("vocab", None), mesh)
    return tuple(spec[0] or ())


def lookup(table_VD: jax.Array, tokens_RT: jax.Array, dtype: Any) -> jax.Array:
    """table[tokens] as [R, T, D] in `dtype`.

    On a mesh each device looks the tokens of its whole fsdp group up in its own slice of the vocabulary, and the sum
    over the group (all terms but one are zero, so it is exact) returns to the rows' owners. What travels is the
    batch's activations, in the forward and in the backward pass, instead of the table.
    """
    mesh = sharding.current_mesh()
    axes = () if mesh is None else vocab_axes(table_VD, mesh)
    if sharding.axis_size(axes, mesh) == 1:
        return table_VD.astype(dtype)[tokens_RT] if table_VD.dtype == dtype else table_VD[tokens_RT].astype(dtype)
    rows = sharding.fit(tokens_RT.shape[0], sharding.ROWS, mesh)
    time = sharding.fit(tokens_RT.shape[1], "sequence", mesh)
    gathers = rows is not None and "fsdp" in axes

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if gathers:
            tokens = lax.all_gather(tokens, "fsdp", axis=0, tiled=True)
        index = tokens - lax.axis_index(axes) * table.shape[0]
        here = (index >= 0) & (index < table.shape[0])
        found = jnp.where(here[..., None], table[jnp.where(here, index, 0)], 0).astype(dtype)
        if not gathers:
            return lax.psum(found, axes)
        if "tensor" in axes:
            found = lax.psum(found, "tensor")
        return lax.psum_scatter(found, "fsdp", scatter_dimension=0, tiled=True)

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(axes), PartitionSpec(rows, time)),
        out_specs=PartitionSpec(rows, time),
    )(table_VD, tokens_RT)
