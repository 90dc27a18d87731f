"""What a request asks of its tokens, and the distribution that they are drawn from.

No sort of the vocabulary: top-k, top-p and min-p each keep the tokens down to some depth below the likeliest one, and
that depth is found by bisection.

Letters: B requests, V vocabulary, S stop ids, W banned ids.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NO_ID = -1  # fills rows of stop_ids and bad_ids; equal to no token
_COLUMNS = 16  # ids are this wide, or twice, four times ...: models with 1 and with 9 stop ids share a program

Number = float | Sequence[float] | np.ndarray
"""One for all requests, or one each."""

# What `marks` say of a token, a bit each.
SEEN, STOP, BANNED = 1, 2, 4

_INFINITE_BITS = np.int32(np.float32(np.inf).view(np.int32))


class Limits(NamedTuple):
    """What each request asks for, one entry a row (see `make_limits`). All of it is data, so it compiles nothing anew
    (but for more than 16 stop or banned ids, then for more than 32, and so on).

    temperature, top_p, min_p, repetition_penalty [B] float32; top_k, max_new, min_new [B] int32; stop_ids [B, S] and
    bad_ids [B, W] int32, filled up with -1.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    max_new: Any
    min_new: Any
    stop_ids: Any
    bad_ids: Any


def make_limits(
    rows: int,
    *,
    max_new: Number,
    min_new: Number = 0,
    temperature: Number = 0.0,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    repetition_penalty: Number = 1.0,
    stop_ids: Sequence[int] = (),
    bad_ids: Sequence[int] = (),
) -> Limits:
    """`Limits` of `rows` requests: numbers for all of them, or one a row; the ids are common.

    Args:
      max_new: tokens at most, a stop id included; 0 asks for nothing.
      min_new: a stop id can't come before so many tokens.
      temperature: 0 is greedy: the likeliest token, whatever top_k, top_p and min_p say.
      top_k: the k likeliest tokens and those as likely as the last of them; 0 is all.
      top_p: the fewest likeliest tokens that hold this probability; 1 is all.
      min_p: tokens at least this share as likely as the likeliest; 0 is all.
      repetition_penalty: positive logits of tokens that the prompt or the completion holds are divided by it, negative
        ones multiplied (Keskar et al. 2019); 1 is none.
      stop_ids: tokens that end a completion, and are part of it.
      bad_ids: tokens that never come.

    Raises:
      ValueError: a number out of its range, a negative id, or another number of entries than rows.
    """
    ranges = {
        "max_new": (max_new, np.int32, 0, np.inf),
        "min_new": (min_new, np.int32, 0, np.inf),
        "temperature": (temperature, np.float32, 0, np.inf),
        "top_k": (top_k, np.int32, 0, np.inf),
        "top_p": (top_p, np.float32, 0, 1),
        "min_p": (min_p, np.float32, 0, 1),
        "repetition_penalty": (repetition_penalty, np.float32, 0, np.inf),
    }
    numbers = {}
    for name, (given, dtype, low, high) in ranges.items():
        values = np.asarray(given, dtype)
        if values.shape not in ((), (rows,)):
            raise ValueError(f"{name} has shape {values.shape}, expected one number or one for each of {rows} rows")
        above = values > low if name in ("top_p", "repetition_penalty") else values >= low
        if not np.all(np.isfinite(values) & above & (values <= high)):
            least = "above 0" if name in ("top_p", "repetition_penalty") else "of at least 0"
            most = "" if high == np.inf else f" and at most {high}"
            raise ValueError(f"{name} is {values.tolist()}, expected finite numbers {least}{most}")
        numbers[name] = np.broadcast_to(values, (rows,))
    return Limits(**numbers, stop_ids=_ids("stop", stop_ids, rows), bad_ids=_ids("bad", bad_ids, rows))


def _ids(name: str, given: Sequence[int], rows: int) -> np.ndarray:
    ids = sorted(set(given))
    if ids and ids[0] < 0:
        raise ValueError(f"{name} ids are {ids}, expected token ids, which are at least 0")
    width = _COLUMNS
    while width < len(ids):
        width *= 2
    table = np.full((rows, width), NO_ID, np.int32)
    table[:, : len(ids)] = ids
    return table


def marks(limits: Limits, seen_BV: jax.Array) -> jax.Array:
    """uint8 [B, V]: which tokens a prompt holds (`seen_BV` bool), which stop, and which are banned."""
    n_vocab = seen_BV.shape[1]
    stops_BV, banned_BV = (members(ids, n_vocab) for ids in (limits.stop_ids, limits.bad_ids))
    return (seen_BV * SEEN + stops_BV * STOP + banned_BV * BANNED).astype(jnp.uint8)


def members(ids_BW: jax.Array, n_vocab: int) -> jax.Array:
    """bool [B, V]: the tokens that are among each row's ids; negative ids are none."""
    rows_B1 = jnp.arange(ids_BW.shape[0])[:, None]
    ids_BW = jnp.where(ids_BW < 0, n_vocab, ids_BW)  # past the end: dropped
    return jnp.zeros((ids_BW.shape[0], n_vocab), bool).at[rows_B1, ids_BW].set(True, mode="drop")


def changes(limits: Limits, counts_B: jax.Array) -> jax.Array:
    """Whether any row's distribution is another than the softmax at its temperature: bool scalar."""
    filtered_B = (limits.top_k > 0) | (limits.top_p < 1) | (limits.min_p > 0)
    marked_B = (limits.repetition_penalty != 1) | (counts_B < limits.min_new) | jnp.any(limits.bad_ids >= 0, axis=1)
    return jnp.any((filtered_B & (limits.temperature > 0)) | marked_B)


def depths(logits_BV: jax.Array, limits: Limits) -> jax.Array:
    """How far each token lies below the likeliest one, at the row's temperature (1 where that is 0): float32 [B, V].

    So that no temperature overflows: what is sampled from is the softmax of minus this.
    """
    temperature_B = jnp.where(limits.temperature > 0, limits.temperature, 1.0)
    return (jnp.max(logits_BV, axis=-1, keepdims=True) - logits_BV) / temperature_B[:, None]


def filter_logits(logits_BV: jax.Array, marks_BV: jax.Array, counts_B: jax.Array, limits: Limits) -> jax.Array:
    """The logits of the distribution that is sampled from, and of which a greedy row takes the maximum.

    As transformers' `generate` has them, in its order: repetition penalty, banned and stop ids, temperature, top-k,
    top-p, min-p. Where tokens are exactly as likely as the last one that is kept, all of them are: top-p keeps as few
    as its sort happens to put first there.

    Args:
      logits_BV: float32, the model's.
      marks_BV: uint8, see `marks`; a completion's own tokens are SEEN too.
      counts_B: new tokens so far, int32.

    Returns:
      float32 [B, V], up to a constant a row: the maximum is 0, and -inf is removed.
    """

    def penalised() -> jax.Array:
        by_B1 = limits.repetition_penalty[:, None]
        seen_BV = marks_BV & SEEN != 0
        return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / by_B1, logits_BV * by_B1), logits_BV)

    logits_BV = lax.cond(jnp.any(limits.repetition_penalty != 1), penalised, lambda: logits_BV)
    removed_B1 = jnp.where(counts_B < limits.min_new, STOP | BANNED, BANNED).astype(jnp.uint8)[:, None]
    depth_BV = depths(jnp.where(marks_BV & removed_B1 != 0, -jnp.inf, logits_BV), limits)

    drawn_B = limits.temperature > 0
    deepest_B = jnp.where(drawn_B & (limits.min_p > 0), -jnp.log(limits.min_p), jnp.inf)
    k_B, p_B = (limits.top_k > 0) & drawn_B, (limits.top_p < 1) & drawn_B
    infinite_B = jnp.full_like(deepest_B, jnp.inf)
    # Of what top-k keeps top-p takes its share.
    top_k_B = lax.cond(jnp.any(k_B), lambda: _depth_of(depth_BV, None, limits.top_k, k_B), lambda: infinite_B)

    def nucleus() -> jax.Array:
        mass_BV = jnp.where(depth_BV <= top_k_B[:, None], jnp.exp(-depth_BV), 0)
        return _depth_of(depth_BV, mass_BV, limits.top_p * mass_BV.sum(axis=-1), p_B)

    top_p_B = lax.cond(jnp.any(p_B), nucleus, lambda: infinite_B)
    deepest_B = jnp.minimum(deepest_B, jnp.minimum(top_k_B, top_p_B))
    return jnp.where(depth_BV <= deepest_B[:, None], -depth_BV, -jnp.inf)


def _depth_of(depth_BV: jax.Array, mass_BV: jax.Array | None, target_B: jax.Array, asked_B: jax.Array) -> jax.Array:
    """The least depth [B] down to which tokens have a mass (None: 1 each) of `target`; infinite where not asked for.

    The bits of floats from 0 on are ordered as integers are, so they are bisected: exact after 31 rounds, and after
    fewer where the bounds have but one token between them.
    """

    def halve(carry: Any) -> Any:
        low_B, high_B, n_low_B, n_high_B = carry
        middle_B = low_B + (high_B - low_B) // 2
        within_BV = depth_BV <= lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        n_B = within_BV.sum(axis=-1, dtype=jnp.int32)
        reached_B = (n_B if mass_BV is None else jnp.where(within_BV, mass_BV, 0).sum(axis=-1)) >= target_B
        return (
            jnp.where(reached_B, low_B, middle_B),
            jnp.where(reached_B, middle_B, high_B),
            jnp.where(reached_B, n_low_B, n_B),
            jnp.where(reached_B, n_B, n_high_B),
        )

    def is_open(carry: Any) -> jax.Array:
        low_B, high_B, n_low_B, n_high_B = carry
        return jnp.any((high_B - low_B > 1) & (n_high_B - n_low_B > 1))

    high_B = jnp.full(asked_B.shape, _INFINITE_BITS)
    counts = jnp.zeros_like(high_B), jnp.full_like(high_B, depth_BV.shape[1])
    _, bits_B, *_ = lax.while_loop(is_open, halve, (jnp.where(asked_B, -1, high_B), high_B, *counts))
    return lax.bitcast_convert_type(bits_B, jnp.float32)


def draw(
    filtered_BV: jax.Array, weights_BN: jax.Array, keys_B: jax.Array, counts_B: jax.Array, limits: Limits
) -> jax.Array:
    """One token id a row [B] int32; greedy rows take the likeliest. `weights_BN` are `block_weights` of the logits.

    A block of the vocabulary is drawn by what its tokens weigh together, then one of its tokens, each as the largest
    sum of a logit and Gumbel noise from fold_in(key, count): the same distribution without noise for every token, which
    takes most of the time. Where a block is one token this is `jax.random.categorical`.
    """
    n_rows, n_vocab = filtered_BV.shape
    width = block_width(n_vocab)

    def drawn() -> jax.Array:
        folded_B = jax.vmap(jax.random.fold_in)(keys_B, counts_B)
        block_B = _noisy_top(folded_B, weights_BN)
        if width == 1:
            return block_B
        is_its_BN1 = (jnp.arange(n_vocab // width) == block_B[:, None])[..., None]
        # Not by a gather, for which a split vocabulary would be put together.
        tokens_BW = jnp.where(is_its_BN1, filtered_BV.reshape(n_rows, -1, width), 0).sum(axis=1)
        return block_B * width + _noisy_top(jax.vmap(jax.random.fold_in, (0, None))(folded_B, 0), tokens_BW)

    is_drawn_B = limits.temperature > 0
    nothing_B = jnp.zeros(n_rows, jnp.int32)
    drawn_B = lax.cond(jnp.any(is_drawn_B), drawn, lambda: nothing_B)
    likeliest_B = lax.cond(jnp.all(is_drawn_B), lambda: nothing_B, lambda: _top(filtered_BV))
    return jnp.where(is_drawn_B, drawn_B, likeliest_B)


def block_weights(logits_BV: jax.Array) -> jax.Array:
    """The logarithm of what the tokens of each block weigh together, float32 [B, N]."""
    width = block_width(logits_BV.shape[1])
    return jax.nn.logsumexp(logits_BV.reshape(len(logits_BV), -1, width), axis=-1) if width > 1 else logits_BV


def block_width(n_vocab: int) -> int:
    """Tokens of a block that `draw` draws first: a power of two, so that a vocabulary which is split among up to 16
    devices is split between blocks."""
    return max(math.gcd(n_vocab, 4096) // 16, 1)


def _noisy_top(keys_B: jax.Array, logits_BN: jax.Array) -> jax.Array:
    """A draw from the softmax of each row, int32 [B]."""
    return _top(logits_BN + jax.vmap(lambda key: jax.random.gumbel(key, logits_BN.shape[1:]))(keys_B))


def _top(x_BN: jax.Array) -> jax.Array:
    """The first place of each row's maximum.

    Not by argmax: where N is split, its indices would travel in full, at every token (XLA on TPU).
    """
    is_top_BN = x_BN == x_BN.max(axis=-1, keepdims=True)
    return jnp.where(is_top_BN, jnp.arange(x_BN.shape[1], dtype=jnp.int32), x_BN.shape[1]).min(axis=-1)


def logp(logits_BV: jax.Array, tokens_B: jax.Array, weights_BN: jax.Array | None = None) -> jax.Array:
    """Log-probability of one token a row under a softmax: float32 [B]. `block_weights` that are there spare a pass."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV if weights_BN is None else weights_BN, axis=-1)
