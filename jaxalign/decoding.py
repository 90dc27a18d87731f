"""The sampler's programs: `prefill` reads prompts, `fill` puts them into slots, `segment` decodes all slots together.

The cache is a ring of S places that all slots write at the same index, so that one slice is updated in place at every
token. What a slot holds ends just before that index: a prompt that takes over a slot is put there, and how many places
back a row may look is its own length. Places that precede it are padding, on the left, which happens nowhere else in
this project.

Letters: R slots, F prompts on the shelf, P their width, S places of the ring, K tokens of a segment, V vocabulary,
L layers, H head size.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxalign import filters, models, sharding
from jaxalign.filters import Limits
from jaxalign.models import ModelConfig, Params
from jaxalign.models.attention import HEADS
from jaxalign.models.embedding import vocab_axes

# Where a loop over stacked layers would copy each layer's weights at every token (see `models.unstacked`): measured on
# CPU. On a TPU a slice of a stack is part of the product, and compiling does not grow with depth.
UNSTACKED = ("cpu", "gpu")

PLACES = {"k": -1, "v": -2}  # the axis of the places in `models.init_cache`'s


class Slots(NamedTuple):
    """What is being decoded, a slot a row; donated from program to program.

    cache: see `models.init_cache`. tokens [R] int32: the last of each, not yet in the cache. counts [R] int32: new
    tokens so far. keys [R, ..] uint32: the requests' key data. limits: theirs. marks [R, V] uint8: see `filters.marks`.
    """

    cache: Params
    tokens: Any
    counts: Any
    keys: Any
    limits: Limits
    marks: Any


class Shelf(NamedTuple):
    """Prompts without their last token, as the cache has them: k [L, F, heads, H, P] and v [L, F, heads, P, H] (or
    tuples of [F, ...]).

    They end at P. tokens [F, P] int32 are theirs, from 0 on and then -1.
    """

    k: Any
    v: Any
    tokens: Any


class Filling(NamedTuple):
    """Which slots get which prompts.

    source [R] int32: the prompt on the shelf, -1 where a slot keeps what it has (and the rest is not looked at).
    tokens [R] int32: the prompt's last token. lengths [R] int32: of the prompt without it. keys and limits: the
    request's.
    """

    source: Any
    tokens: Any
    lengths: Any
    keys: Any
    limits: Limits


class Drawn(NamedTuple):
    """What a segment has drawn, on every device whole.

    tokens [R, K] int32 and their log-probs [R, K] float32 (see `sampling.Samples`); counts [R] int32: how many of the K
    are a row's; live [R] bool: which rows go on.
    """

    tokens: Any
    logps: Any
    sampling_logps: Any
    scaled_logps: Any
    counts: Any
    live: Any


@functools.partial(jax.jit, static_argnames=("cfg",))
def view(cfg: ModelConfig, params: Params) -> Params:
    """The weights as decoding reads them: in the compute dtype, and one layer after the other where that is faster."""
    params = models.as_used(cfg, params)
    return models.unstacked(params) if sharding.platform() in UNSTACKED else params


def is_view(params: Params) -> bool:
    """Whether `view` has unstacked these weights."""
    return isinstance(params["layers"], tuple)


@functools.partial(jax.jit, static_argnames=("cfg", "rows", "places", "stacked"))
def empty(cfg: ModelConfig, rows: int, places: int, *, stacked: bool, keys: Any, limits: Limits) -> Slots:
    """Slots without anything in them.

    Args:
      keys, limits: any, for the shapes of one row of theirs.
    """
    cache = models.init_cache(cfg, rows, places, stacked=stacked)
    keys, limits = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), (keys, limits))
    ones = jnp.ones(rows, jnp.float32)  # what asks for nothing, so that filters which no request wants are left out
    limits = limits._replace(top_p=ones, repetition_penalty=ones, bad_ids=limits.bad_ids + filters.NO_ID)
    zeros = jnp.zeros(rows, jnp.int32)
    marks = jnp.zeros((rows, cfg.vocab_size), jnp.uint8)
    return _placed(Slots(cache, zeros, zeros, keys, limits, marks))


def _placed(slots: Slots) -> Slots:
    """Slots where every program takes and leaves them, so that none is compiled for another's layout."""

    def row(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, *(None,) * x.ndim)

    def heads(x: jax.Array) -> jax.Array:
        return sharding.constrain(x, *(None,) * (x.ndim - 4), sharding.ROWS, HEADS, None, None)

    cache = {name: jax.tree.map(heads if name in ("k", "v") else row, x) for name, x in slots.cache.items()}
    keys, limits = jax.tree.map(row, (slots.keys, slots.limits))
    return Slots(cache, row(slots.tokens), row(slots.counts), keys, limits, _by_vocabulary(slots.marks))


def _by_vocabulary(x_RV: jax.Array) -> jax.Array:
    """Split as the head is."""
    mesh = sharding.current_mesh()
    table = jax.ShapeDtypeStruct((x_RV.shape[1], 1), x_RV.dtype)
    return sharding.constrain(x_RV, "data", () if mesh is None else vocab_axes(table, mesh))


@functools.partial(jax.jit, static_argnames=("cfg",))
def prefill(cfg: ModelConfig, params: Params, tokens_FP: jax.Array, lengths_F: jax.Array) -> Shelf:
    """Prompts without their last token -> their keys and values. Plainly causal, so any attention kernel does.

    Args:
      params: a `view`.
      tokens_FP: int32, padded on the right with -1.
    """
    rows, width = tokens_FP.shape
    positions_FP = jnp.broadcast_to(jnp.arange(width), (rows, width))
    cache: Any = models.init_cache(cfg, rows, width, stacked=not is_view(params))
    _, cache = models.apply(cfg, params, jnp.maximum(tokens_FP, 0), positions_FP, cache=cache)

    def shelved(x: jax.Array, axis: int) -> jax.Array:
        layers, prompt = (None,) * (x.ndim - 4), x.ndim - 4
        x = sharding.constrain(x, *layers, sharding.ROWS, HEADS, None, None)
        end = jax.vmap(lambda x, length: jnp.roll(x, width - length, axis), (prompt, 0), prompt)
        return sharding.constrain(end(x, lengths_F), *layers, sharding.ROWS, HEADS, None, None)

    k, v = (jax.tree.map(functools.partial(shelved, axis=axis), cache[name]) for name, axis in PLACES.items())
    return Shelf(k, v, tokens_FP)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("slots",))
def fill(cfg: ModelConfig, slots: Slots, shelf: Shelf, filling: Filling) -> Slots:
    """Slots with new requests in some of them. A prompt on the shelf may go to several."""
    taken_R, source_R = filling.source >= 0, jnp.maximum(filling.source, 0)
    width = shelf.tokens.shape[1]
    places = jax.tree.leaves(slots.cache["k"])[0].shape[PLACES["k"]]
    # The place of the shelf that each place of the ring would get: its last one comes just before the index.
    from_S = (jnp.arange(places) - slots.cache["index"] + width) % places
    gets_RS = taken_R[:, None] & (from_S < width)

    def put(old: jax.Array, prompts: jax.Array, axis: int) -> jax.Array:
        prompts = sharding.constrain(prompts, None, HEADS, None, None)  # any may go to any slot
        new = jnp.take(jnp.take(prompts, source_R, axis=0), from_S, axis=axis, mode="clip")
        return jnp.where(jnp.expand_dims(gets_RS, (1, 2) if axis == -1 else (1, 3)), new, old)

    def put_layers(name: str) -> Any:
        """One layer after the other, so that no more than one is there twice."""
        old, new, axis = slots.cache[name], getattr(shelf, name), PLACES[name]
        if isinstance(old, tuple):
            return tuple(put(x, y, axis) for x, y in zip(old, new, strict=True))
        return lax.fori_loop(0, len(old), lambda n, all: all.at[n].set(put(all[n], new[n], axis)), old)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(taken_R.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    def prompts() -> jax.Array:
        shelf_FV = filters.members(shelf.tokens, cfg.vocab_size)
        last_R1 = filling.tokens[:, None]
        return shelf_FV[source_R] | (last_R1 == jnp.arange(cfg.vocab_size))

    k, v = put_layers("k"), put_layers("v")
    nothing = jnp.zeros(slots.marks.shape, bool)
    seen_RV = lax.cond(jnp.any(filling.limits.repetition_penalty != 1), prompts, lambda: nothing)
    cache = slots.cache | {"k": k, "v": v, "lengths": choose(filling.lengths, slots.cache["lengths"])}
    keys, limits = jax.tree.map(choose, (filling.keys, filling.limits), (slots.keys, slots.limits))
    return _placed(
        Slots(
            cache,
            choose(filling.tokens, slots.tokens),
            jnp.where(taken_R, 0, slots.counts),
            keys,
            limits,
            choose(filters.marks(filling.limits, seen_RV), slots.marks),
        )
    )


@functools.partial(jax.jit, static_argnames=("cfg", "length"), donate_argnames=("slots",))
def segment(
    cfg: ModelConfig, params: Params, slots: Slots, live_R: jax.Array, floor: jax.Array, *, length: int
) -> tuple[Slots, Drawn]:
    """Decodes until `length` tokens are drawn, or until no more than `floor` rows go on.

    Args:
      params: a `view`.
      live_R: bool, the rows that decode; the others pass time.
      floor: int32 scalar.
      length: static, K.
    """

    def step(carry: Any) -> Any:
        n, slots, drawn = carry
        lengths_R = slots.cache["lengths"]
        hidden_R1D, cache = models.apply(cfg, params, slots.tokens[:, None], lengths_R[:, None], cache=slots.cache)
        tokens_R, logps, marks = _choose(_logits(cfg, params, hidden_R1D), slots)
        counts_R = jnp.where(drawn.live, slots.counts + 1, slots.counts)
        stopped_R = jnp.any(tokens_R[:, None] == slots.limits.stop_ids, axis=1)
        columns = (tokens_R, *logps)
        written = {
            name: lax.dynamic_update_index_in_dim(getattr(drawn, name), new, n, 1)
            for name, new in zip(Drawn._fields[:4], columns, strict=True)
        }
        live_R = drawn.live & ~stopped_R & (counts_R < slots.limits.max_new)
        drawn = drawn._replace(**written, counts=drawn.counts + drawn.live, live=live_R)
        return n + 1, slots._replace(cache=cache, tokens=tokens_R, counts=counts_R, marks=marks), drawn

    rows = len(live_R)
    zeros = jnp.zeros((rows, length))
    drawn = Drawn(zeros.astype(jnp.int32), zeros, zeros, zeros, jnp.zeros(rows, jnp.int32), live_R)
    _, slots, drawn = lax.while_loop(
        lambda carry: (carry[0] < length) & (carry[2].live.sum() > floor), step, (jnp.int32(0), slots, drawn)
    )
    # What is drawn is small, and every process reads it.
    return _placed(slots), jax.tree.map(lambda x: sharding.constrain(x, *(None,) * x.ndim), drawn)


def _logits(cfg: ModelConfig, params: Params, hidden_R1D: jax.Array) -> jax.Array:
    """[R, V] float32. On a mesh the rows travel to the head's slices, not the head to the rows."""
    hidden_R1D = sharding.constrain(hidden_R1D, "data", None, None)
    return _by_vocabulary(models.unembed(cfg, params, hidden_R1D)[:, 0])


def _choose(logits_RV: jax.Array, slots: Slots) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """The next token of each row, its log-probs (of the model, as sampled, at the temperature), and the marks then.

    Each is a pass over the vocabulary, so what is equal by the limits is computed once.
    """
    limits = slots.limits
    filtered = filters.changes(limits, slots.counts)
    filtered_RV = lax.cond(
        filtered,
        lambda: filters.filter_logits(logits_RV, slots.marks, slots.counts, limits),
        lambda: -filters.depths(logits_RV, limits),
    )
    keys_R = jax.random.wrap_key_data(slots.keys)
    weights_RN = filters.block_weights(filtered_RV)
    tokens_R = filters.draw(filtered_RV, weights_RN, keys_R, slots.counts, limits)
    sampling_R = filters.logp(filtered_RV, tokens_R, weights_RN)
    scaled_R = lax.cond(
        filtered, lambda: filters.logp(-filters.depths(logits_RV, limits), tokens_R), lambda: sampling_R
    )
    tempered = jnp.any((limits.temperature > 0) & (limits.temperature != 1))
    logps_R = lax.cond(tempered, lambda: filters.logp(logits_RV, tokens_R), lambda: scaled_R)

    def seen() -> jax.Array:
        own_RV = tokens_R[:, None] == jnp.arange(logits_RV.shape[1])
        return slots.marks | jnp.where(own_RV, filters.SEEN, 0).astype(jnp.uint8)

    marks_RV = lax.cond(jnp.any(limits.repetition_penalty != 1), seen, lambda: slots.marks)
    sampling_R = jnp.where(limits.temperature == 0, 0.0, sampling_R)  # that it would be drawn was certain
    return tokens_R, (logps_R, sampling_R, scaled_R), marks_RV
