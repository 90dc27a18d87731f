"""Prompts -> sampled tokens, by the trainer's own weights and code: the host's side of it (`decoding.py` the devices').

Slots decode together in segments of some tokens; between two of them the host collects what has ended and gives its
slots to the prompts that wait, so a batch does not wait for its slowest row. What a request asks for (`make_limits`),
its key and its prompt are data: changing them compiles nothing anew. There is one program to decode, and one to read
prompts for each bucket of their lengths.

Letters: B requests, N new tokens at most, R slots, F prompts that are read at once, P their width.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import decoding, sharding
from jaxalign.filters import NO_ID, Limits, make_limits
from jaxalign.models import ModelConfig, Params

__all__ = ["Limits", "Program", "Samples", "bucket", "make_limits", "programs", "request_keys", "sample"]

SEGMENT = 32  # tokens between two looks of the host
PROMPT_MULTIPLE = 32  # lengths of prompts are padded to buckets of this
# Tokens that one program reads into the cache at once, by platform, on each group of devices that shares rows. What
# waits on the shelf costs its place there and no time, so these are enough to use the devices well.
PREFILL_TOKENS = {"cpu": 256, "gpu": 2048, "tpu": 2048}
REFILL_SHARE = 8  # while requests wait, the host looks when one slot in so many is free

_NOBODY = -1  # whose slot is free


class Samples(NamedTuple):
    """What `sample` returns, NumPy arrays [B, N], in every process the same.

    tokens int32: the completion, its stop id included, then padding (cfg.pad_token_id or 0). mask bool: True on the
    completion. Log-probabilities of its tokens, float32, 0 where mask is False:

    logps: under the model, at temperature 1. `logprobs.score` of the same tokens gives the same.
    sampling_logps: under what it was drawn from, with temperature, penalty and filters; 0 where that is greedy: it
      was certain. vLLM's "processed" log-probs, from which TRL's `sampling/sampling_logp_difference` is taken.
    scaled_logps: under the model at the request's temperature (at 1 where that is greedy), unfiltered.
      `logprobs.token_stats(temperature=...)` gives the same, so this is what a policy loss's own log-probs compare
      with, whatever the filters. All three agree where the temperature is 1 and nothing is filtered.
    """

    tokens: np.ndarray
    mask: np.ndarray
    logps: np.ndarray
    sampling_logps: np.ndarray
    scaled_logps: np.ndarray


def request_keys(seed: int, requests: Sequence[int] | np.ndarray) -> jax.Array:
    """One PRNG key a request [B], from the seed and the request's own number, whatever else is asked for."""
    return _fold_in(jax.random.key(seed), np.asarray(requests, np.uint32))


_fold_in = jax.jit(jax.vmap(jax.random.fold_in, in_axes=(None, 0)))


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


def sample(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int] | np.ndarray],
    keys_B: jax.Array,
    limits: Limits,
    *,
    max_new_tokens: int,
    n: int = 1,
    slots: int | None = None,
    max_prompt_tokens: int | None = None,
    segment_tokens: int = SEGMENT,
    stop: Callable[[Sequence[int]], int | None] | None = None,
    on_tokens: Callable[[int, list[int]], object] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> Samples:
    """Samples n completions of each prompt; request p * n + j is completion j of prompt p, and B is all of them.

    On a mesh call this under `sharding.use_mesh`, in every process alike and with the same arguments. What a request
    gets depends on its prompt, key and limits: for one number of slots, what shares them changes no more than the last
    bits of log-probs (its sums begin elsewhere in the ring).

    Args:
      cfg: static.
      params: as `models.apply` takes them, or what `decoding.view` has made of them (for many calls with the same).
      prompts: token ids, at least one each. A prompt is read once for its n completions.
      keys_B: one typed key a request. Its token i is drawn with fold_in(key, i); a greedy row draws nothing.
      limits: B entries. A completion ends with a stop id or after min(max_new, max_new_tokens) tokens.
      max_new_tokens: N, static.
      slots: rows that decode at once, rounded up to what the mesh divides; None: all B.
      max_prompt_tokens: the longest prompt that any call will have, so that all calls share their programs; None: the
        longest of this one.
      segment_tokens: between two looks of the host, static. What `stop` ends has run on for fewer than these.
      stop: gets a completion's tokens so far and says how many of them are kept if it ends there, otherwise None.
      on_tokens: gets a request's number and its new tokens, after every segment.
      on_progress: gets the number of finished requests and of sampled tokens, after every segment; it may raise.

    Raises:
      ValueError: the model has a score head in place of its language-model head; an empty prompt, or one longer than
        max_prompt_tokens; keys or limits of another number; a number below 1.
    """
    n_requests = len(prompts) * n
    limits = jax.tree.map(np.asarray, limits)
    longest = max_prompt_tokens or max(map(len, prompts), default=1)
    numbers = {
        "max_new_tokens": max_new_tokens,
        "n": n,
        "segment_tokens": segment_tokens,
        "slots": 1 if slots is None else slots,
    }
    _check(cfg, prompts, longest, {"keys": len(keys_B), "limits": len(limits.max_new)}, n_requests, numbers)
    limits = limits._replace(max_new=np.minimum(limits.max_new, max_new_tokens))
    # The shortest prompts first: those that are read together are of a length, and little of what is read is padding.
    asked = np.flatnonzero(limits.max_new > 0).tolist()
    waiting = collections.deque(sorted(asked, key=lambda request: len(prompts[request // n])))
    finished = n_requests - len(waiting)
    out = Samples(*(np.zeros((n_requests, max_new_tokens), dtype) for dtype in (np.int32, bool, *(np.float32,) * 3)))
    lengths_B = np.zeros(n_requests, np.int64)

    rows, places = _shape(n_requests, slots, longest, max_new_tokens)
    owner_R = np.full(rows, _NOBODY)
    if waiting:
        key_data_B = np.asarray(jax.random.key_data(keys_B))
        if not decoding.is_view(params):
            params = decoding.view(cfg, params)
        stacked = not decoding.is_view(params)
        state = decoding.empty(cfg, rows, places, stacked=stacked, keys=key_data_B[:1], limits=_take(limits, [0]))
    shelf: Any = None  # prompts that were read,
    shelved: dict[int, int] = {}  # and where each lies there

    while waiting or np.any(owner_R != _NOBODY):
        while waiting and np.any(owner_R == _NOBODY):
            if waiting[0] // n not in shelved:
                shelved, *read = _next_prompts(prompts, waiting, n)
                shelf = decoding.prefill(cfg, params, *read)
            source_R = np.full(rows, _NOBODY, np.int32)
            for row in np.flatnonzero(owner_R == _NOBODY):
                if not waiting or waiting[0] // n not in shelved:
                    break
                owner_R[row] = waiting.popleft()
                source_R[row] = shelved[owner_R[row] // n]
            requests_R = np.maximum(owner_R, 0)
            owners = [prompts[request // n] for request in requests_R]
            filling = decoding.Filling(
                source_R,
                np.array([prompt[-1] for prompt in owners], np.int32),
                np.array([len(prompt) - 1 for prompt in owners], np.int32),
                key_data_B[requests_R],
                _take(limits, requests_R),
            )
            state = decoding.fill(cfg, state, shelf, filling)

        live_R = owner_R != _NOBODY
        # While requests wait, a few free slots are worth a look; otherwise the last row ends the segment.
        floor = max(int(live_R.sum()) - max(rows // REFILL_SHARE, 1), 0) if waiting else 0
        state, drawn = decoding.segment(
            cfg, params, state, live_R, np.int32(floor), length=min(segment_tokens, max_new_tokens)
        )
        drawn = jax.tree.map(np.asarray, drawn)
        for row in np.flatnonzero(live_R):
            request, count = owner_R[row], drawn.counts[row]
            start, end = lengths_B[request], lengths_B[request] + count
            for collected, new in zip((out.tokens, *out[2:]), drawn[:4], strict=True):
                collected[request, start:end] = new[row, :count]
            keep = stop(out.tokens[request, :end].tolist()) if stop is not None else None
            if keep is not None:
                end = min(keep, end)
            lengths_B[request] = end
            if on_tokens is not None and end > start:
                on_tokens(int(request), out.tokens[request, start:end].tolist())
            if keep is not None or not drawn.live[row]:
                owner_R[row] = _NOBODY
                finished += 1
        if on_progress is not None:
            on_progress(finished, int(lengths_B.sum()))
    out.mask[:] = np.arange(max_new_tokens) < lengths_B[:, None]
    for values, filler in zip((out.tokens, *out[2:]), (cfg.pad_token_id or 0, 0, 0, 0), strict=True):
        values[~out.mask] = filler
    return out


def _check(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    longest: int,
    entries: Mapping[str, int],
    n_requests: int,
    numbers: Mapping[str, int],
) -> None:
    if cfg.num_labels:
        raise ValueError(f"the model has a score head (num_labels={cfg.num_labels}); generation needs a language model")
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    for name, given in entries.items():
        if given != n_requests:
            raise ValueError(f"{name} has {given} entries, expected one for each of {n_requests} requests")
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens, expected 1 to max_prompt_tokens={longest}")


def _take(limits: Limits, requests: Any) -> Limits:
    taken: Limits = jax.tree.map(lambda x: x[requests], limits)
    return taken


def _shape(n_requests: int, slots: int | None, max_prompt_tokens: int, max_new_tokens: int) -> tuple[int, int]:
    """(rows that decode at once, places of the ring), on the current mesh."""
    rows = _round_up(min(n_requests if slots is None else slots, n_requests), sharding.axis_size(sharding.ROWS))
    return rows, bucket(max_prompt_tokens - 1, PROMPT_MULTIPLE) + max_new_tokens


def _read_at_once(width: int, n_prompts: int) -> int:
    """How many prompts of a bucket are read by one program, on the current mesh."""
    shards = sharding.axis_size(sharding.ROWS)
    fitting = max(PREFILL_TOKENS[sharding.platform()] // width, 1) * shards
    return min(fitting, _round_up(n_prompts, shards))


def _next_prompts(
    prompts: Sequence[Sequence[int] | np.ndarray], waiting: collections.deque[int], n: int
) -> tuple[dict[int, int], np.ndarray, np.ndarray]:
    """The prompts that are read next: ({prompt: its row}, tokens [F, P] padded with -1, lengths [F])."""
    rows: dict[int, int] = {}
    width = 0
    for prompt in dict.fromkeys(request // n for request in waiting):
        wider = max(width, bucket(len(prompts[prompt]) - 1, PROMPT_MULTIPLE))
        if rows and len(rows) >= _read_at_once(wider, len(prompts)):
            break
        rows[prompt], width = len(rows), wider
    n_rows = _read_at_once(width, len(prompts))
    tokens_FP, lengths_F = np.full((n_rows, width), NO_ID, np.int32), np.zeros(n_rows, np.int32)
    for prompt, row in rows.items():
        ids = prompts[prompt][:-1]  # the last one is what decoding begins with
        tokens_FP[row, : len(ids)], lengths_F[row] = ids, len(ids)
    return rows, tokens_FP, lengths_F


class Program(NamedTuple):
    """One of the programs that a call of `sample` would run, for those who only compile it."""

    rows: tuple[int, int]
    arguments: Any
    lower: Callable[[], Any]


def programs(
    cfg: ModelConfig,
    params: Params,
    *,
    n_prompts: int,
    max_prompt_tokens: int,
    max_new_tokens: int,
    n: int = 1,
    slots: int | None = None,
    segment_tokens: int = SEGMENT,
) -> dict[str, Program]:
    """What `sample` would run, by name, with abstract arguments: "prefill" of the longest prompts, and "decode".

    Args:
      params: abstract, with shardings. Weights stay beside those of the view that are not the same arrays.
    """
    rows, places = _shape(n_prompts * n, slots, max_prompt_tokens, max_new_tokens)
    width = places - max_new_tokens
    weights = _abstract(decoding.view, cfg, params)
    stacked = not decoding.is_view(weights)
    keys = jax.eval_shape(lambda: jax.random.key_data(request_keys(0, [0])))
    limits = make_limits(1, max_new=1)
    state = _abstract(decoding.empty, cfg, rows, places, stacked=stacked, keys=keys, limits=limits)
    read = _read_at_once(width, n_prompts)
    prompts = weights, np.zeros((read, width), np.int32), np.zeros(read, np.int32)
    decode = weights, state, np.zeros(rows, bool), np.int32(0)
    length = min(segment_tokens, max_new_tokens)
    return {
        "prefill": Program((read, width), prompts, lambda: decoding.prefill.lower(cfg, *prompts)),
        "decode": Program((rows, places), decode, lambda: decoding.segment.lower(cfg, *decode, length=length)),
    }


def _abstract(program: Any, *arguments: Any, **static: Any) -> Any:
    """What a program returns, as ShapeDtypeStructs with their shardings."""
    lowered = program.lower(*arguments, **static)
    placed = lowered.compile().output_shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info, placed)
