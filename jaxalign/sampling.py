"""Prompts -> sampled tokens: one prefill, then a decode loop over a key/value cache that is updated in place.

The weights and the code are the trainer's own. Prompts are padded on the left, which happens nowhere else in this
project. What a request asks for (temperature, lengths, stop ids, key) is data: changing it compiles nothing anew.

Letters: B requests, P prompt slots, N new tokens, S stop ids, D model, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign import models, sharding
from jaxalign.models import ModelConfig, Params
from jaxalign.models.attention import HEADS
from jaxalign.models.embedding import vocab_axes

NO_STOP = -1  # fills rows of stop_ids; equal to no token
_STOP_COLUMNS = 4  # stop_ids are this wide, or a multiple, so that models with 1 and with 3 share a program


class Limits(NamedTuple):
    """What each request asks for, one entry a row (see `make_limits`).

    temperature [B] float32, 0 is greedy; max_new [B] int32, 0 makes a row a mere filler; stop_ids [B, S] int32, filled
    up with -1.
    """

    temperature: Any
    max_new: Any
    stop_ids: Any


class Samples(NamedTuple):
    """What `generate` returns, all [B, N].

    tokens int32: the completion, its stop id included, then padding. mask bool: True on the completion. logps float32:
    log-probability of each token under the model, at temperature 1. sampling_logps float32: under the distribution that
    it was drawn from (0 where that is greedy, for then it was certain). Both are 0 where mask is False.
    """

    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array
    sampling_logps: jax.Array


def make_limits(
    rows: int,
    *,
    temperature: float | Sequence[float] = 0.0,
    max_new: int | Sequence[int],
    stop_ids: Sequence[int] = (),
) -> Limits:
    """`Limits` of `rows` requests: numbers for all of them, or one a row; the stop ids are common.

    Raises:
      ValueError: a negative or non-finite temperature, a negative max_new or stop id, or another number of entries.
    """
    temperature_B = np.asarray(temperature, np.float32)
    max_new_B = np.asarray(max_new, np.int32)
    for name, values in (("temperature", temperature_B), ("max_new", max_new_B)):
        if values.shape not in ((), (rows,)):
            raise ValueError(f"{name} has shape {values.shape}, expected one number or one for each of {rows} rows")
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError(f"{name} is {values.tolist()}, expected finite numbers of at least 0")
    ids = sorted(set(stop_ids))
    if ids and ids[0] < 0:
        raise ValueError(f"stop ids are {ids}, expected token ids, which are at least 0")
    columns = max(_round_up(len(ids), _STOP_COLUMNS), _STOP_COLUMNS)
    stops = np.full((rows, columns), NO_STOP, np.int32)
    stops[:, : len(ids)] = ids
    return Limits(np.broadcast_to(temperature_B, (rows,)), np.broadcast_to(max_new_B, (rows,)), stops)


def request_keys(seed: int, requests: Sequence[int] | np.ndarray) -> jax.Array:
    """One PRNG key a request [B], from the seed and the request's own number, whatever else is asked for."""
    return _fold_in(jax.random.key(seed), np.asarray(requests, np.uint32))


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


def left_pad(
    prompts: Sequence[Sequence[int] | np.ndarray], pad_id: int, multiple: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, padded on the left to a bucket (see `bucket`).

    Returns:
      prompts_BP int32 and prompt_mask_BP bool, True on real tokens. An empty prompt is a row of padding (a filler).
    """
    width = bucket(max(len(prompt) for prompt in prompts), multiple)
    prompts_BP = np.full((len(prompts), width), pad_id, np.int32)
    mask_BP = np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        prompts_BP[row, width - len(prompt) :] = prompt
        mask_BP[row, width - len(prompt) :] = True
    return prompts_BP, mask_BP


def bucket(length: int, multiple: int) -> int:
    """The smallest of multiple * (1, 2, 3, 4, 6, 8, 12, 16, 24, ...) that holds `length`.

    So lengths that double cost two compilations, and beyond the first bucket at most half of a row is padding.
    """
    blocks = max(-(-length // multiple), 1)
    size = 1
    while size < blocks:
        if size > 1 and size * 3 // 2 >= blocks:
            return size * 3 // 2 * multiple
        size *= 2
    return size * multiple


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def filter_logits(logits_BV: jax.Array, limits: Limits) -> jax.Array:
    """The logits of the distribution that is sampled from; a greedy row takes their maximum.

    Args:
      logits_BV: float32, the model's.

    Returns:
      float32 [B, V], up to a constant a row: the maximum is 0, so that no temperature overflows.
    """
    temperature_B = jnp.where(limits.temperature > 0, limits.temperature, 1.0)
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B[:, None]


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens"))
def generate(
    cfg: ModelConfig,
    params: Params,
    prompts_BP: jax.Array,
    prompt_mask_BP: jax.Array,
    keys_B: jax.Array,
    limits: Limits,
    *,
    max_new_tokens: int,
) -> Samples:
    """Samples a completion of each prompt. One program for the prefill and the loop, which ends when every row has.

    Args:
      cfg: static; cfg.pad_token_id (0 where there is none) fills finished rows.
      prompts_BP, prompt_mask_BP: int32 and bool, padded on the left (`left_pad`).
      keys_B: one typed PRNG key a request. Its token n is drawn with fold_in(key, n), so what shares its batch does not
        matter; a greedy row draws nothing.
      limits: one entry a row. A row ends with a stop id or after min(max_new, max_new_tokens) tokens.
      max_new_tokens: static, N.

    Raises:
      ValueError: the model has a score head in place of its language-model head.
    """
    if cfg.num_labels:
        raise ValueError(f"the model has a score head (num_labels={cfg.num_labels}); generation needs a language model")
    rows, width = prompts_BP.shape
    params = models.as_used(cfg, params)  # once instead of at every token
    pad_id = cfg.pad_token_id or 0

    segments_BP = prompt_mask_BP.astype(jnp.int32)
    lengths_B = segments_BP.sum(axis=1)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    # The last new token is never run through the model, so it needs no slot.
    empty = _init_cache(cfg, rows, width + max_new_tokens - 1)
    hidden_BPD, cache = models.apply(cfg, params, prompts_BP, positions_BP, segments_BP, cache=empty)

    def choose(n: Any, hidden_B1D: jax.Array, done_B: jax.Array, samples: Samples) -> tuple[Any, ...]:
        """Token n of every row: (tokens_B, done_B, samples with column n filled in)."""
        logits_BV = _logits(cfg, params, hidden_B1D)
        filtered_BV = filter_logits(logits_BV, limits)
        tokens_B = _draw(filtered_BV, keys_B, n, limits.temperature)
        column = Samples(
            jnp.where(done_B, pad_id, tokens_B),
            ~done_B,
            jnp.where(done_B, 0.0, _logp(logits_BV, tokens_B)),
            jnp.where(done_B | (limits.temperature == 0), 0.0, _logp(filtered_BV, tokens_B)),
        )
        samples = jax.tree.map(
            lambda all_BN, new_B: lax.dynamic_update_slice_in_dim(all_BN, new_B[:, None], n, axis=1), samples, column
        )
        stopped_B = jnp.any(column.tokens[:, None] == limits.stop_ids, axis=1)
        return column.tokens, done_B | stopped_B | (n + 1 >= limits.max_new), samples

    def step(carry: Any) -> Any:
        n, tokens_B, done_B, cache, samples = carry
        hidden_B1D, cache = models.apply(
            cfg,
            params,
            tokens_B[:, None],
            (lengths_B + n - 1)[:, None],
            (~done_B).astype(jnp.int32)[:, None],
            cache=cache,
        )
        tokens_B, done_B, samples = choose(n, hidden_B1D, done_B, samples)
        return n + 1, tokens_B, done_B, cache, samples

    shape = (rows, max_new_tokens)
    samples = Samples(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape), jnp.zeros(shape))
    done_B = limits.max_new <= 0
    tokens_B, done_B, samples = choose(jnp.int32(0), hidden_BPD[:, -1:], done_B, samples)
    *_, samples = lax.while_loop(
        lambda carry: (carry[0] < max_new_tokens) & ~jnp.all(carry[2]),
        step,
        (jnp.int32(1), tokens_B, done_B, cache, samples),
    )
    # Small, and every process reads them: each device gets them whole.
    return jax.tree.map(lambda x_BN: sharding.constrain(x_BN, None, None), samples)


def _init_cache(cfg: ModelConfig, rows: int, length: int) -> Params:
    cache = models.init_cache(cfg, rows, length)
    for name in ("k", "v"):
        cache[name] = sharding.constrain(cache[name], None, sharding.ROWS, None, HEADS, None)
    return cache


def _logits(cfg: ModelConfig, params: Params, hidden_B1D: jax.Array) -> jax.Array:
    """[B, V] float32. On a mesh the rows travel to the head's slices, not the head to the rows."""
    mesh = sharding.current_mesh()
    axes = () if mesh is None else vocab_axes(models.head_table(cfg, params), mesh)
    hidden_B1D = sharding.constrain(hidden_B1D, "data", None, None)
    return sharding.constrain(models.unembed(cfg, params, hidden_B1D), "data", None, axes)[:, 0]


def _draw(filtered_BV: jax.Array, keys_B: jax.Array, n: Any, temperature_B: jax.Array) -> jax.Array:
    """One token id a row [B] int32: greedy where the temperature is 0. All greedy draws no random numbers at all."""
    greedy_B = jnp.argmax(filtered_BV, axis=-1)

    def draw() -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, n)
        drawn_B = jax.vmap(jax.random.categorical)(keys, filtered_BV)
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    return lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B).astype(jnp.int32)


def _logp(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
