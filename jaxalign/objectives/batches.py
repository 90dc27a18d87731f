"""What every objective asks of a batch: its sequences, who is real, what each weighs, sums over tokens, TRL's metrics.

An example is `width` sequences. Unpacked they are neighbouring rows; packed they are neighbouring segments of one row
(`segment_ids` 1..S). So per-sequence values [R, S] are [E, width] after a reshape in both layouts. Without the leaf
`ends` a row holds one sequence.

Letters: R rows, T time, S sequences that a row can hold, E examples, W their width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxalign import logprobs, lora, models
from jaxalign.metrics import Mean, Metrics

Batch = Mapping[str, Any]

WIDTHS = {"pairs": 2, "labelled": 2, "singles": 1, "chats": 1, "triples": 3, "scored": 1, "prompts": 1}
"""Kinds of examples, and the sequences that one of them has."""

TOKEN_STATISTICS = ("logps", "entropy", "mean_logit", "correct")


class Stateless:
    """The part of an objective that keeps nothing from one step to the next."""

    def init_aux(self) -> dict[str, jax.Array]:
        """No leaf of `TrainState.aux`."""
        return {}

    def next_aux(self, aux: Mapping[str, Any], metrics: Metrics) -> dict[str, jax.Array]:
        """No leaf of `TrainState.aux` is another after a step."""
        del aux, metrics
        return {}


class Uncoupled(Stateless):
    """The part of an objective whose examples have nothing to do with each other: no first pass is needed."""

    couples: ClassVar[bool] = False

    def first_pass(self, params: models.Params, frozen: lora.Frozen | None, batch: Batch) -> dict[str, jax.Array]:
        """No leaf: nothing must be known of the rows."""
        del params, frozen, batch
        return {}

    def couple(self, batch: Batch) -> dict[str, jax.Array]:
        """No leaf: nothing ties the examples together."""
        del batch
        return {}


def weights_of(params: models.Params, frozen: lora.Frozen | None) -> models.Params:
    """The model's whole weights: `params` themselves, or the frozen base with the adapters `params` beside it."""
    return lora.attach(frozen, params)


def rows_together(batch: Batch, width: int) -> int:
    """Rows that must stay together when a batch is split: an example's when unpacked, any one when packed."""
    return 1 if "segment_ids" in batch else width


def by_example(x_RS: jax.Array, width: int) -> jax.Array:
    """Per-sequence values [R, S, ...] as [E, W, ...]."""
    return x_RS.reshape(-1, width, *x_RS.shape[2:])


def by_row(x_EW: jax.Array, batch: Batch) -> jax.Array:
    """The inverse of `by_example`: [E, W] as [R, S]."""
    return x_EW.reshape(batch["tokens"].shape[0], slots(batch))


def per_sequence(x_RT: jax.Array, mask_RT: jax.Array, batch: Batch) -> jax.Array:
    """Sums of x over the masked tokens of each sequence: [R, S], see `logprobs.per_sequence`."""
    return logprobs.per_sequence(x_RT, mask_RT, batch.get("segment_ids"), num_segments=slots(batch))


def sums(x_RT: jax.Array, mask_RT: jax.Array, batch: Batch, width: int) -> jax.Array:
    """Sums of x over the masked tokens of each sequence of each example: [E, W]; of bools their count in float32."""
    return by_example(per_sequence(x_RT, mask_RT, batch), width)


def follows(batch: Batch) -> jax.Array:
    """[R, T] bool: the tokens with one before them in their sequence; the others have no log-prob."""
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        return jnp.broadcast_to(jnp.arange(batch["tokens"].shape[1]) > 0, batch["tokens"].shape)
    return jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))


def scored(batch: Batch) -> jax.Array:
    """[R, T] bool: the tokens whose log-probs count."""
    return batch["mask"] & follows(batch)


def inside(batch: Batch) -> jax.Array:
    """[R, T] bool: the tokens of sequences: no padding, and no prompt that stands once for several sequences."""
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        return jnp.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
    return (segment_ids > 0) & (segment_ids <= slots(batch))


def place(batch: Batch, width: int) -> jax.Array:
    """[R, T], or [R, 1] unpacked: which of its example's sequences a token is in, from 0; outside of any, anything."""
    segment_ids = batch.get("segment_ids")
    if segment_ids is None:
        return (jnp.arange(batch["tokens"].shape[0]) % width)[:, None]
    return (segment_ids - 1) % width


def ordinal(mask_RT: jax.Array, batch: Batch) -> jax.Array:
    """[R, T] int32: how many masked tokens its sequence has up to and including a token."""
    total = jnp.cumsum(mask_RT, axis=1, dtype=jnp.int32)
    if "segment_ids" not in batch:
        return total
    # What was counted before a sequence began never falls along a row.
    return total - jax.lax.cummax(jnp.where(follows(batch), 0, total - mask_RT), axis=1)


def valid(batch: Batch, width: int) -> jax.Array:
    """[E] bool: the examples that are no fillers: something of them is scored."""
    mask = scored(batch)
    return (sums(mask, mask, batch, width) > 0).any(axis=1)


def of_example(name: str, batch: Batch, width: int) -> jax.Array:
    """A leaf that an example has once and that all its sequences carry: [E, ...]."""
    return by_example(batch[name], width)[:, 0]


def weights(batch: Batch, width: int) -> jax.Array:
    """[E] float32: what each example counts: the leaf `weight`, or 1; a filler's is 0."""
    real = valid(batch, width)
    return jnp.where(real, of_example("weight", batch, width) if "weight" in batch else 1.0, 0.0)


def denominator(total: jax.Array) -> jax.Array:
    """A sum of weights to divide by, float32: 1 where nothing has a weight, as nothing is divided then."""
    return jnp.where(total > 0, total, 1).astype(jnp.float32)


def mean(x: jax.Array, mask: jax.Array) -> Mean:
    """The metric that is the mean of x over what is masked, both of one shape (or broadcast)."""
    return Mean(jnp.where(mask, x, 0).sum(), mask.sum().astype(jnp.float32))


def slots(batch: Batch) -> int:
    """S, the sequences that a row can hold."""
    return batch["ends"].shape[1] if "ends" in batch else 1
