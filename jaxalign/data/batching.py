"""Prepared examples -> batches. Batch n depends on (examples, batch size, buckets, seed, n) alone: a run resumes by
number.

Letters: R rows of the global batch, T tokens of a row, S sequences that a row can hold, B examples of a batch.
"""

import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.data import packing as packing_lib
from jaxalign.data.packing import FILLER, Batch, Layout, Packer
from jaxalign.data.sources import Prepared

PACKING = ("off", "on", "shared")

Rows = Callable[[int], np.ndarray]  # the number of rows of a global batch -> those that this process feeds


def default_buckets(max_length: int, multiple: int | None = None) -> tuple[int, ...]:
    """Row lengths to compile for: 1, 2, 3, 4, 6, 8, 12, 16, ... times `multiple`, up to the first that holds
    `max_length`. Without `multiple`: `packing.row_multiple`."""
    multiple = multiple or packing_lib.row_multiple(max_length)
    buckets, factor = [multiple], 1
    while buckets[-1] < max_length:
        factor += max(1, 2 ** (factor.bit_length() - 2))
        buckets.append(factor * multiple)
    # The last one is no longer than it must be: a batch that holds a cut row is the usual case.
    buckets[-1] = min(buckets[-1], packing_lib.round_up(max_length, multiple))
    return tuple(buckets)


def prefix_of(prompt_lengths: np.ndarray, prefixes: Sequence[int]) -> int:
    """The longest of `prefixes` that every prompt of a batch reaches; 0 if none."""
    return max((n for n in prefixes if n <= int(prompt_lengths.min())), default=0)


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds a row of `length` tokens."""
    return next(bucket for bucket in buckets if bucket >= length)


class ExampleSource:
    """The training source: `source(step)` is the batch of that step, whichever were asked for before.

    Sample k of the endless stream is example k mod N of epoch k // N, and every epoch is shuffled anew; batch n holds
    samples n * B to n * B + B - 1, packed or not. Every process finds the same T and R, also where `rows` says which
    rows it feeds: unpacked, T is the bucket of the longest row in the whole batch and R is width * B; packed, T and S
    are the same in all batches and R is one of few values (`packing.Packer`).
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        batch_size: int,
        seed: int,
        buckets: Sequence[int] | None = None,
        prefixes: Sequence[int] = (),
        packing: str = "off",
        packed_length: int | None = None,
        row_multiple: int = 1,
        weigh: Callable[[np.ndarray, int], np.ndarray] | None = None,
        rows: Rows | None = None,
        shuffle: bool = True,
    ):
        """Args:
          batch_size: examples a batch over all processes, B.
          buckets: values of T where nothing is packed.
          prefixes: lengths of a prompt that may be shared by two rows, where nothing is packed.
          packing: "off", "on", or "shared" (an example's prompt stands once).
          packed_length: T of packed rows; None: as few as hold max_length and the longest example.
          row_multiple: R of packed batches is a multiple of it: devices along the rows x micro-batches.
          weigh: (the batch's examples [B] int64, step) -> their weights [B], the leaf `weight`.
          rows: see Rows; None: all of them.

        Raises:
          ValueError: an argument can't be used, there are no examples, or one is longer than a row can be.
        """
        import grain

        _check(batch_size, packing)
        if not len(prepared):
            raise ValueError("there are no examples to train on")
        if prefixes and (prepared.width != 2 or packing != "off"):
            raise ValueError(
                f"data.prefixes is {tuple(prefixes)}, which is for two rows with one prompt; here an example has "
                f"{prepared.width} row(s) and data.packing is {packing!r}: set data.prefixes to () (data.packing "
                "'shared' lets the prompts of packed rows stand once)"
            )
        self.prepared, self.batch_size, self.prefixes = prepared, batch_size, tuple(prefixes)
        self.buckets = _checked_buckets(prepared, buckets)
        self.packer = _packer(prepared, packing, packed_length, row_multiple)
        self._weigh, self._rows = weigh, _checked_rows(rows)
        self._longest = prepared.lengths.max(axis=1)
        order = grain.MapDataset.range(len(prepared))
        self._order = (order.shuffle(seed=seed % 2**32) if shuffle else order).repeat(None)

    def examples_of(self, step: int) -> np.ndarray:
        """[B] int64: the examples (of `prepared`) in this step's batch."""
        first = step * self.batch_size
        return np.asarray([self._order[first + i] for i in range(self.batch_size)], np.int64)

    def slots_of(self, step: int) -> np.ndarray:
        """[E] int64: the same in the order in which an objective's `examples` has them, -1 where it has a filler."""
        examples = self.examples_of(step)
        if self.packer is None:
            return examples
        return self.packer.layout(examples).examples.reshape(-1, self.prepared.width)[:, 0]

    def __call__(self, step: int, view: Any = None) -> Batch:
        """Leaves: see `packing.fill` and `make_batch`. `view` (parameters, for sources that sample) is not used."""
        examples = self.examples_of(step)
        weights = None
        if self._weigh is not None:
            weights = dict(zip(examples.tolist(), self._weigh(examples, step).tolist(), strict=True))
        if self.packer is not None:
            layout = self.packer.layout(examples)
            return packing_lib.fill(self.prepared, layout, self._rows(len(layout.examples)), weights=weights)
        prefix = prefix_of(self.prepared.prompt_lengths[examples], self.prefixes)
        rows = self._rows(self.prepared.width * self.batch_size)
        return make_batch(self.prepared, examples, self.length_of(examples), rows, prefix=prefix, weights=weights)

    def length_of(self, examples: np.ndarray) -> int:
        """T of the batch of these examples."""
        if self.packer is not None:
            return self.packer.length
        return bucket_of(int(self._longest[examples].max()), self.buckets)

    def steps(self, epochs: float) -> int:
        """Batches that hold every example `epochs` times; the last may reach into the next epoch."""
        return math.ceil(round(epochs * len(self.prepared), 6) / self.batch_size)


class EvalBatches:
    """The first `limit` examples as a fixed list of batches, `batches[0]` to `batches[len - 1]`, all of R rows.

    Unpacked, R is width * batch_size, and examples are grouped by bucket, within one in their own order, to save
    padding. Packed, R rows hold about as many examples, and all are packed together. The last batch is filled up with
    rows that count for nothing (mask all False, lengths 0, row_ids -1).
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        batch_size: int,
        limit: int | None = None,
        buckets: Sequence[int] | None = None,
        packing: str = "off",
        packed_length: int | None = None,
        row_multiple: int = 1,
        rows: Rows | None = None,
    ):
        """As `ExampleSource`."""
        _check(batch_size, packing)
        self.prepared, self._rows = prepared, _checked_rows(rows)
        size = len(prepared) if limit is None else min(limit, len(prepared))
        if size < 1:
            raise ValueError("there are no examples to evaluate on")
        self.packer = _packer(prepared, packing, packed_length, row_multiple)
        if self.packer is None:
            self.n_rows = prepared.width * batch_size
            buckets = _checked_buckets(prepared, buckets)
            longest = prepared.lengths[:size].max(axis=1)
            self._lengths = np.asarray([bucket_of(int(length), buckets) for length in longest])
            order = np.argsort(self._lengths, kind="stable")
            self._examples = [order[at : at + batch_size] for at in range(0, size, batch_size)]
        else:
            self._bins = self.packer.bins(np.arange(size))
            wanted = math.ceil(len(self._bins) * min(batch_size / size, 1))
            self.n_rows = self.packer.rows_for(wanted)

    def __len__(self) -> int:
        if self.packer is None:
            return len(self._examples)
        return math.ceil(len(self._bins) / self.n_rows)

    def layout(self, n: int) -> Layout:
        """Where the sequences of batch n stand, over all processes."""
        if self.packer is not None:
            return self.packer.place(self._bins[n * self.n_rows : (n + 1) * self.n_rows], self.n_rows)
        examples = self._examples[n]
        filler = np.full(self.n_rows // self.prepared.width - len(examples), FILLER)
        length = int(self._lengths[examples].max())
        return packing_lib.one_a_row(self.prepared, np.concatenate([examples, filler]), length)

    def __getitem__(self, n: int) -> Batch:
        return packing_lib.fill(self.prepared, self.layout(n), self._rows(self.n_rows))

    def __call__(self, n: int, view: Any = None) -> Batch:
        return self[n]

    def __iter__(self) -> Iterator[Batch]:
        return (self[n] for n in range(len(self)))


def make_batch(
    prepared: Prepared,
    examples: np.ndarray,
    length: int,
    rows: np.ndarray | None = None,
    *,
    prefix: int = 0,
    weights: Mapping[int, float] | None = None,
) -> Batch:
    """The batch of the given examples (-1: filler) unpacked, T = `length`, or only its rows `rows`.

    Row width * e + j is sequence j of the e-th example. Leaves: see `packing.fill`, and with `prefix` shared_prefix
    [R, prefix] int32, the first tokens of the prompt.
    """
    batch = packing_lib.fill(prepared, packing_lib.one_a_row(prepared, examples, length), rows, weights=weights)
    return batch | ({"shared_prefix": batch["tokens"][:, :prefix]} if prefix else {})


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


def _check(batch_size: int, packing: str) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}, expected at least 1 example")
    if packing not in PACKING:
        raise ValueError(f"data.packing is {packing!r}, expected one of {', '.join(PACKING)}")


def _packer(prepared: Prepared, packing: str, length: int | None, multiple: int) -> Packer | None:
    if packing == "off":
        return None
    return Packer(prepared, shared=packing == "shared", length=length, multiple=multiple)


def _checked_buckets(prepared: Prepared, buckets: Sequence[int] | None) -> tuple[int, ...]:
    checked = tuple(sorted(buckets)) if buckets else default_buckets(prepared.meta["max_length"])
    longest = int(prepared.lengths.max(initial=0))
    if checked[-1] < longest:
        raise ValueError(f"buckets {checked} end before the longest row ({longest} tokens); add one that holds it")
    return checked


def _checked_rows(rows: Rows | None) -> Callable[[int], np.ndarray | None]:
    """`rows`, asked once for each number of rows and checked."""
    if rows is None:
        return lambda n_rows: None

    @functools.cache
    def own(n_rows: int) -> np.ndarray:
        checked = np.asarray(rows(n_rows), np.int64)
        if checked.size and not (0 <= checked.min() and checked.max() < n_rows):
            raise ValueError(f"rows reach from {checked.min()} to {checked.max()}, expected rows of 0 to {n_rows - 1}")
        return checked

    return own
