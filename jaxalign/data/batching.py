"""Prepared pairs -> batches. Batch n depends on (pairs, batch size, buckets, seed, n) alone: a run resumes by number.

Letters: R rows of the global batch, two a pair (2i chosen, 2i + 1 rejected); T tokens of the longest row's bucket.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from jaxalign.data.sources import Prepared

Batch = dict[str, np.ndarray]

FILLER = -1


def default_buckets(max_length: int, multiple: int | None = None) -> tuple[int, ...]:
    """Row lengths to compile for: 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple`, up to the first that holds
    `max_length`. Without `multiple`: 128 from 1,024 tokens on (TPU kernels need it), below that finer."""
    if multiple is None:
        multiple = 128 if max_length >= 1024 else 64 if max_length >= 256 else 16
    buckets, factor = [multiple], 1
    while buckets[-1] < max_length:
        factor += max(1, 2 ** (factor.bit_length() - 2))
        buckets.append(factor * multiple)
    # The last one is no longer than it must be: a batch that holds a cut row is the usual case.
    buckets[-1] = min(buckets[-1], math.ceil(max_length / multiple) * multiple)
    return tuple(buckets)


def prefix_of(prompt_lengths: np.ndarray, prefixes: Sequence[int]) -> int:
    """The longest of `prefixes` that every prompt of a batch reaches; 0 if none."""
    return max((n for n in prefixes if n <= int(prompt_lengths.min())), default=0)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a row of `length` tokens."""
    return next(bucket for bucket in buckets if bucket >= length)


class PairSource:
    """The training source: `source(step)` is the batch of that step, whichever were asked for before.

    Sample k of the endless stream is pair k mod N of epoch k // N, and every epoch is shuffled anew; batch n holds
    samples n * B to n * B + B - 1. T is the bucket of the longest row in the whole batch, so every process has the
    same, also where `rows` says which rows of the global [R] this process feeds.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        prefixes: Sequence[int] = (),
        rows: Sequence[int] | np.ndarray | None = None,
        shuffle: bool = True,
    ):
        """`batch_size`: pairs a batch over all processes, B. Raises ValueError if it is not positive, there are no
        pairs, or a pair is longer than the last bucket."""
        import grain

        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, expected at least 1 pair")
        if not len(prepared):
            raise ValueError("there are no pairs to train on")
        self.prepared = prepared
        self.batch_size = batch_size
        self.buckets = _checked_buckets(prepared, buckets)
        self.rows = _checked_rows(rows, 2 * batch_size)
        self.prefixes = tuple(prefixes)
        self._longest = prepared.lengths.max(axis=1)
        order = grain.MapDataset.range(len(prepared))
        self._order = (order.shuffle(seed=seed % 2**32) if shuffle else order).repeat(None)

    def pairs_of(self, step: int) -> np.ndarray:
        """[B] int64: the pairs (of `prepared`) in this step's batch."""
        first = step * self.batch_size
        return np.asarray([self._order[first + i] for i in range(self.batch_size)], np.int64)

    def __call__(self, step: int, view: Any = None) -> Batch:
        """Leaves: see `make_batch`. `view` (parameters, for sources that sample) is not used."""
        pairs = self.pairs_of(step)
        prefix = prefix_of(self.prepared.prompt_lengths[pairs], self.prefixes)
        return make_batch(self.prepared, pairs, self.length_of(pairs), self.rows, prefix=prefix)

    def length_of(self, pairs: np.ndarray) -> int:
        """T of the batch of these pairs."""
        return bucket_of(int(self._longest[pairs].max()), self.buckets)

    def steps(self, epochs: float) -> int:
        """Batches that hold every pair `epochs` times; the last may reach into the next epoch."""
        return math.ceil(round(epochs * len(self.prepared), 6) / self.batch_size)


class EvalBatches:
    """The first `limit` pairs as a fixed list of batches, `batches[0]` to `batches[len - 1]`, each with R rows.

    Pairs are grouped by bucket, within one in their own order, to save padding; a short last batch is filled up with
    pairs that count for nothing (mask all False, lengths 0, row_ids -1).
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        batch_size: int,
        limit: int | None = None,
        buckets: Sequence[int] | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}, expected at least 1 pair")
        self.prepared = prepared
        self.batch_size = batch_size
        self.buckets = _checked_buckets(prepared, buckets)
        self.rows = _checked_rows(rows, 2 * batch_size)
        size = len(prepared) if limit is None else min(limit, len(prepared))
        if size < 1:
            raise ValueError("there are no pairs to evaluate on")
        longest = prepared.lengths[:size].max(axis=1)
        self._lengths = np.asarray([bucket_of(int(length), self.buckets) for length in longest])
        order = np.argsort(self._lengths, kind="stable")
        fill = np.full(-size % batch_size, FILLER)
        self.pairs = np.concatenate([order, fill]).reshape(-1, batch_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, n: int) -> Batch:
        pairs = self.pairs[n]
        return make_batch(self.prepared, pairs, int(self._lengths[pairs[pairs >= 0]].max()), self.rows)

    def __call__(self, n: int, view: Any = None) -> Batch:
        return self[n]

    def __iter__(self) -> Iterator[Batch]:
        return (self[n] for n in range(len(self)))


def make_batch(
    prepared: Prepared, pairs: np.ndarray, length: int, rows: np.ndarray | None = None, *, prefix: int = 0
) -> Batch:
    """The batch of the given pairs (-1: filler), T = `length`, or only its rows `rows`.

    Leaves: tokens [R, T] int32, padded on the right; mask [R, T] bool, True on response tokens; positions [R, T]
    int32; lengths [R] int32, tokens that are no padding; row_ids [R] int64, the pair in `prepared` or -1; and
    with `prefix` shared_prefix [R, prefix] int32, the first tokens of the prompt.
    """
    if rows is None:
        rows = np.arange(2 * len(pairs))
    row_ids = np.asarray(pairs, np.int64)[rows // 2]
    tokens = np.full((len(rows), length), prepared.pad_id, np.int32)
    prompts = np.zeros(len(rows), np.int32)
    lengths = np.zeros(len(rows), np.int32)
    for at, (row, pair) in enumerate(zip(rows, row_ids, strict=True)):
        if pair == FILLER:
            continue
        *sides, prompts[at] = prepared.pair(int(pair))
        ids = sides[row % 2]
        lengths[at] = len(ids)
        tokens[at, : len(ids)] = ids
    places = np.arange(length, dtype=np.int32)
    batch = {
        "tokens": tokens,
        "mask": (places >= prompts[:, None]) & (places < lengths[:, None]),
        "positions": np.tile(places, (len(rows), 1)),
        "lengths": lengths,
        "row_ids": row_ids,
    }
    return batch | ({"shared_prefix": tokens[:, :prefix]} if prefix else {})


def prefetch(
    source: Callable[..., Batch], start: int, stop: int, *, view: Any = None, depth: int = 2
) -> Generator[Batch, None, None]:
    """source(start), ..., source(stop - 1), made in other threads up to `depth` batches ahead.

    An error in the source is raised where the consumer takes that batch. Closing the iterator (or letting it go) ends
    the threads.
    """
    import grain

    steps = grain.MapDataset.range(start, stop).map(lambda step: source(int(step), view))
    options = grain.ReadOptions(num_threads=min(2, depth), prefetch_buffer_size=depth)
    batches = iter(steps.to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()


def _checked_buckets(prepared: Prepared, buckets: Sequence[int] | None) -> tuple[int, ...]:
    checked = tuple(sorted(buckets)) if buckets else default_buckets(prepared.meta["max_length"])
    longest = int(prepared.lengths.max(initial=0))
    if checked[-1] < longest:
        raise ValueError(f"buckets {checked} end before the longest row ({longest} tokens); add one that holds it")
    return checked


def _checked_rows(rows: Sequence[int] | np.ndarray | None, total: int) -> np.ndarray | None:
    if rows is None:
        return None
    checked = np.asarray(rows, np.int64)
    if checked.size and not (0 <= checked.min() and checked.max() < total):
        raise ValueError(f"rows reach from {checked.min()} to {checked.max()}, expected rows of 0 to {total - 1}")
    return checked
