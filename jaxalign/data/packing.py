"""Where the sequences of a batch stand: one a row, or packed, several examples in a row.

A packed row holds whole examples, an example's sequences as neighbours. Each sequence is a segment whose positions
start anew; `shared` lets the sequences of an example have their prompt once:

    tokens        p p p p | P a a a | P b b | ...     the prompt's last token P begins each response
    positions     0 1 2 3   4 5 6 7   4 5 6
    segment_ids   S+1 ...   1 ...     2 ...           S+1, S+2, ...: the prompts of the row's examples
    prefix_ids    0 ...     S+1 ...   S+1 ...         what a token sees besides its own segment

so that a segment's first token, of which nothing before it in the segment tells, is never one that is scored.

Letters: R rows, T tokens of a row, S sequences that a row can hold, N examples.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxalign.data.sources import Prepared

Batch = dict[str, np.ndarray]

FILLER = -1


class Layout(NamedTuple):
    """Where each sequence of a batch stands; arrays [R, S].

    examples: int64, places in `Prepared`, -1 where there is none. sequences: which of the example's. starts: its first
    place in the row. counts: tokens there, which are its last ones; those that are missing stand once, before the
    example's first sequence. length: T. packed: rows have segments. shared: their prompts stand once.
    """

    examples: np.ndarray
    sequences: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    length: int
    packed: bool = False
    shared: bool = False

    @property
    def ends(self) -> np.ndarray:
        """[R, S] int32: the place of each sequence's last token, -1 where there is none."""
        return np.where(self.examples == FILLER, -1, self.starts + self.counts - 1).astype(np.int32)


def one_a_row(prepared: Prepared, examples: np.ndarray, length: int) -> Layout:
    """Row width * e + j is sequence j of the e-th of `examples` (-1: filler); S is 1."""
    width = prepared.width
    rows = np.repeat(np.asarray(examples, np.int64), width)[:, None]
    sequences = np.arange(len(rows))[:, None] % width
    counts = np.where(rows == FILLER, 0, prepared.lengths[rows, sequences])
    return Layout(rows, sequences, np.zeros_like(counts), counts, length)


class Packer:
    """Packs examples of one `Prepared`: T and S are the same for all that it packs.

    Attributes:
      sizes: [N] int64, tokens that each example takes.
      length: T.
      slots: examples that a row can hold at most; S = width * slots. About twice as many as fit on average: a row of
        many more short ones would make every batch's leaves as wide.
      multiple: rows of a batch are a multiple of it.
    """

    def __init__(self, prepared: Prepared, *, shared: bool = False, length: int | None = None, multiple: int = 1):
        """`shared`: prompts stand once. `length`: T; None: max_length or the longest example, rounded up.

        Raises:
          ValueError: an example is longer than `length`.
        """
        self.prepared, self.multiple = prepared, multiple
        self.shared = shared and prepared.width > 1  # or there is nobody to share with
        # What each sequence of an example leaves out. Its prompt's last token stays: it is the first that is followed
        # by a scored one.
        once = np.maximum(prepared.prompt_lengths.astype(np.int64) - 1, 0)
        self._skipped = once if self.shared else np.zeros_like(once)
        self.sizes = prepared.lengths.sum(axis=1, dtype=np.int64) - (prepared.width - 1) * self._skipped
        longest = int(self.sizes.max())
        needed = max(longest, prepared.meta["max_length"])
        self.length = length or round_up(needed, row_multiple(needed))
        if longest > self.length:
            raise ValueError(
                f"data.packed_length is {length}, but the longest example takes {longest} tokens ({prepared.width} "
                f"sequence(s), which stay in one row): give it at least {longest}, or None; or lower max_length"
            )
        slots = min(math.ceil(2 * self.length / self.sizes.mean()), self.length // int(self.sizes.min()))
        # What is sampled has other lengths each time: few values, so that few programs are compiled.
        self.slots = 1 << (slots - 1).bit_length() if prepared.kind == "prompts" else slots

    def layout(self, examples: np.ndarray) -> Layout:
        """A batch of these examples."""
        bins = self.bins(examples)
        return self.place(bins, self.rows_for(len(bins)))

    def bins(self, examples: np.ndarray) -> list[np.ndarray]:
        """The examples of each row, in as few rows as best fit decreasing finds."""
        return [examples[places] for places in best_fit(self.sizes[examples], self.length, self.slots)]

    def rows_for(self, bins: int) -> int:
        """R of a batch of so many bins: a multiple of `multiple`, 8 values at most from each power of two to the next.

        So a run compiles for few shapes, and less than an eighth of the rows are fillers (or as the multiple asks).
        """
        units = -(-bins // self.multiple)
        return round_up(units, 1 << max(units.bit_length() - 4, 0)) * self.multiple

    def place(self, bins: list[np.ndarray], rows: int) -> Layout:
        """One row for each array of examples, in its order; the rows after them are fillers."""
        width = self.prepared.width
        examples = np.full((rows, self.slots), FILLER, np.int64)
        for row, members in enumerate(bins):
            examples[row, : len(members)] = members
        is_real = examples != FILLER
        skipped = np.where(is_real, self._skipped[examples], 0)
        counts = np.where(is_real[..., None], self.prepared.lengths[examples] - skipped[..., None], 0)
        # An example takes the prompt that stands once, then its sequences one after another.
        sizes = skipped + counts.sum(axis=2)
        first = np.cumsum(sizes, axis=1) - sizes + skipped
        starts = first[..., None] + np.cumsum(counts, axis=2) - counts
        return Layout(
            np.repeat(examples, width, axis=1),
            np.tile(np.arange(width), (rows, self.slots)),
            starts.reshape(rows, -1),
            counts.reshape(rows, -1),
            self.length,
            packed=True,
            shared=self.shared,
        )


def row_multiple(longest: int) -> int:
    """What row lengths are multiples of: 128 from 1,024 tokens on (TPU kernels need it), below that finer."""
    return 128 if longest >= 1024 else 64 if longest >= 256 else 16


def round_up(x: int, multiple: int) -> int:
    """The first multiple that is not below x."""
    return -(-x // multiple) * multiple


def best_fit(sizes: np.ndarray, capacity: int, most: int) -> list[list[int]]:
    """Bins of places into `sizes`: largest first, each into the fullest bin that holds it, `most` in a bin.

    Best fit decreasing (Johnson 1973): at most 11/9 of the fewest bins, and far less above it for sizes such as these.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins that take more, by the space that is left
    spaces = 0  # bit n is set where by_space[n] has any: the smallest that is large enough is one shift away
    for place in np.argsort(-sizes, kind="stable"):
        size = int(sizes[place])
        if large_enough := spaces >> size:
            space = size + (large_enough & -large_enough).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(int(place))
        space -= size
        if space and len(bins[chosen]) < most:
            by_space[space].append(chosen)
            spaces |= 1 << space
    return bins


def fill(
    prepared: Prepared,
    layout: Layout,
    rows: np.ndarray | None = None,
    *,
    weights: Mapping[int, float] | None = None,
) -> Batch:
    """The batch of a layout, or only its rows `rows`.

    Leaves: tokens [R, T] int32, filled up with pad_id; mask [R, T] bool, True on scored tokens; positions [R, T] int32
    in the sequence; lengths [R] int32, tokens of the row that are no padding; row_ids [R, S] int64, the example or -1;
    ends [R, S] int32, the place of the sequence's last token or -1; one leaf [R, S] or [R, S, K] float32 for each of
    `prepared.values`, and `weight` where the examples' `weights` are given; where it is packed segment_ids [R, T]
    int32, 1..S and 0 for padding, and where prompts stand once prefix_ids [R, T] int32.
    """
    if rows is not None:
        layout = layout._replace(**{name: x[rows] for name, x in layout._asdict().items() if np.ndim(x)})
    n_rows, n_sequences = layout.examples.shape
    shape = n_rows, layout.length
    tokens = np.full(shape, prepared.pad_id, np.int32)
    mask = np.zeros(shape, bool)
    positions = np.tile(np.arange(layout.length, dtype=np.int32), (n_rows, 1))
    segments, prefixes = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    lengths = np.zeros(n_rows, np.int32)
    for row, slot in np.argwhere(layout.examples != FILLER):
        start, count = int(layout.starts[row, slot]), int(layout.counts[row, slot])
        sequence = int(layout.sequences[row, slot])
        ids, scored = prepared.sequence(int(layout.examples[row, slot]), sequence)
        skipped = len(ids) - count
        here = slice(start, start + count)
        tokens[row, here], mask[row, here] = ids[skipped:], scored[skipped:]
        positions[row, here] = np.arange(skipped, len(ids))
        segments[row, here] = slot + 1
        lengths[row] = start + count
        if skipped:
            prompt = n_sequences + 1 + slot // prepared.width
            prefixes[row, here] = prompt
            if sequence == 0:
                before = slice(start - skipped, start)
                tokens[row, before], positions[row, before] = ids[:skipped], np.arange(skipped)
                segments[row, before] = prompt
    batch = {
        "tokens": tokens,
        "mask": mask,
        "positions": positions,
        "lengths": lengths,
        "row_ids": layout.examples,
        "ends": layout.ends,
    }
    columns = {name: np.asarray(values, np.float32)[layout.examples] for name, values in prepared.values.items()}
    if weights is not None:
        found = [weights.get(int(example), 0.0) for example in layout.examples.flat]
        columns["weight"] = np.asarray(found, np.float32).reshape(layout.examples.shape)
    for column in columns.values():
        column[layout.examples == FILLER] = 0
    batch |= columns
    if layout.packed:
        batch["segment_ids"] = segments
    if layout.shared:
        batch["prefix_ids"] = prefixes
    return batch
