"""Sums over the sequences that lie in rows: one a row, or packed as segments 1..S of a row.

Letters: R rows, T time, S sequences that a row can hold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def per_sequence(
    x_RT: jax.Array, mask_RT: jax.Array, segment_ids_RT: jax.Array | None = None, *, num_segments: int = 1
) -> jax.Array:
    """Sums of x over the masked tokens of each segment: [R, S] in x's dtype (bools are counted as float32).

    Segments are numbered 1..S within a row; others (0: padding, above S: prompts that stand once) are no sequence's.
    None means one segment a row.
    """
    x_RT = x_RT.astype(jnp.float32) if x_RT.dtype == bool else x_RT
    x_RT = jnp.where(mask_RT, x_RT, 0)
    if segment_ids_RT is None:
        return x_RT.sum(axis=1, keepdims=True)
    return jnp.where(_members(segment_ids_RT, num_segments), x_RT[:, :, None], 0).sum(axis=1)


def per_token(x_RS: jax.Array, segment_ids_RT: jax.Array | None = None) -> jax.Array:
    """Each sequence's value at each of its tokens, 0 at tokens of none: [R, T], or [R, 1] without segments (S is 1).

    The transpose of `per_sequence`: sum over R, S of y * per_sequence(x, mask) = sum over R, T of per_token(y) * x *
    mask.
    """
    if segment_ids_RT is None:
        return x_RS
    return jnp.where(_members(segment_ids_RT, x_RS.shape[1]), x_RS[:, None, :], 0).sum(axis=2)


def _members(segment_ids_RT: jax.Array, num_segments: int) -> jax.Array:
    """Which sequence a token belongs to, bool [R, T, S]; XLA never holds it: it is made where it is summed."""
    return segment_ids_RT[:, :, None] == jnp.arange(1, num_segments + 1)


class Sequences(NamedTuple):
    """Which tokens count and which sequences they are of: sums and means of a sequence, at each of its tokens.

    mask [R, T] bool; segment_ids [R, T] int32, or None for one sequence a row; num_segments: S.
    """

    mask: jax.Array
    segment_ids: jax.Array | None = None
    num_segments: int = 1

    def sum(self, x_RT: jax.Array) -> jax.Array:
        """The sum over the masked tokens of a token's sequence: [R, T], or [R, 1] without segments."""
        x_RT = jnp.broadcast_to(x_RT, self.mask.shape)
        x_RS = per_sequence(x_RT, self.mask, self.segment_ids, num_segments=self.num_segments)
        return per_token(x_RS, self.segment_ids)

    def mean(self, x_RT: jax.Array) -> jax.Array:
        """The mean in place of the sum; 0 where nothing is masked."""
        return self.sum(x_RT) / jnp.maximum(self.sum(self.mask), 1)
