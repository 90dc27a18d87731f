"""Tokenized examples, memory-mapped."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxalign.data.formats import KINDS, LEFT_OUT, Messages, read
from jaxalign.data.rows import digest

ARRAYS = ("tokens", "mask", "offsets", "prompt_lengths", "rows", "prompt_hashes", "values", "order", "text_offsets")
"""The arrays that a folder holds. Of every stored sequence: its tokens [n] int32 and mask [n] bool, from one of
`offsets` to the next; of every example: prompt_lengths int32, rows (of the source) int64, prompt_hashes uint64, values
[N, columns] float32; `order`: the examples as they are numbered [N] int64; text_offsets [rows + 1] into texts.jsonl."""


@dataclass(frozen=True)
class Prepared:
    """Tokenized examples of one kind; or a selection of them. Example i of N is `width` token sequences that begin with
    the same prompt (see `formats.KINDS`).

    Of `labelled` examples the second sequence is the prompt with the completion of the example before it in this
    selection (the first one gets the last one's): KTO estimates its KL term from such mismatched pairs, and TRL's
    rotation with the whole data as one block gives these.

    Attributes:
        index: [N] int64, places of these examples in the cached arrays.
        fingerprint: hash of the tokens, masks and values of these examples in this order, and of the rows of `prompts`,
            which rewards see; equal for equal ones wherever they came from.
        meta: of the whole cached set: label, kind, format, transform (the user's function, or None), rows, kept
            (examples), dropped {reason: rows}, truncated (examples with a sequence that was cut), unfinished (sequences
            that were not cut and hold no eos after the prompt), max_length, columns, values (names of their columns),
            vocab_size (the tokenizer's).
        pad_id: what batches are filled up with.
        folder: where the arrays, `texts.jsonl` and `dropped.jsonl` lie.
        kept_in: the folder of the cache that holds all that was prepared: above `folder`, or in a bucket.
    """

    folder: Path
    kept_in: epath.Path
    meta: Mapping[str, Any]
    fingerprint: str
    pad_id: int
    index: np.ndarray = field(repr=False)
    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def kind(self) -> str:
        """What an example is: a name in `formats.KINDS`."""
        return self.meta["kind"]

    @property
    def width(self) -> int:
        """Sequences of an example."""
        return KINDS[self.kind]

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N, width] int32: tokens of each sequence."""
        stored = np.diff(self.arrays["offsets"]).reshape(-1, stored_width(self.kind))[self.index]
        if self.kind == "labelled":
            prompts = self.prompt_lengths[:, None]
            stored = np.concatenate([stored, prompts + np.roll(stored - prompts, 1, axis=0)], axis=1)
        return np.minimum(stored, self.meta["max_length"]).astype(np.int32)

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """[N] int32: tokens of the prompt, which all sequences of the example begin with and which are not scored; of
        `chats`, what comes before the last answer, scored or not."""
        return np.asarray(self.arrays["prompt_lengths"])[self.index]

    @cached_property
    def values(self) -> Mapping[str, np.ndarray]:
        """What the rows say of the examples, float32: `margin` [N], `label` [N] (1 desirable, 0 not), `scores` [N, K],
        `weight` [N], those that there are."""
        names = np.asarray(self.meta["values"], str)
        columns = self.arrays["values"][self.index]
        found = {str(name): columns[:, names == name] for name in dict.fromkeys(self.meta["values"])}
        return {name: block if name == "scores" else block[:, 0] for name, block in found.items()}

    def sequence(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], mask bool [n]) of sequence j of example i. Mask True: this token is scored."""
        if self.kind == "labelled" and j == 1:
            ids, mask = self._stored(i, 0)
            prompt, (other, scored) = int(self.prompt_lengths[i]), self._stored((i - 1) % len(self), 0)
            border = int(self.prompt_lengths[(i - 1) % len(self)])
            ids = np.concatenate([ids[:prompt], other[border:]])
            mask = np.concatenate([mask[:prompt], scored[border:]])
        else:
            ids, mask = self._stored(i, j)
        return ids[: self.meta["max_length"]], mask[: self.meta["max_length"]]

    def _stored(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask as they are kept: of `labelled` examples the completion is longer than what fits behind its own
        prompt, for it may stand behind a shorter one."""
        at = stored_width(self.kind) * int(self.index[i]) + j
        start, end = (int(offset) for offset in self.arrays["offsets"][at : at + 2])
        return self.arrays["tokens"][start:end], self.arrays["mask"][start:end]

    def prompt(self, i: int) -> np.ndarray:
        """Ids of example i's prompt [P] int32, to generate from."""
        return self._stored(i, 0)[0][: int(self.prompt_lengths[i])]

    def source_row(self, i: int) -> int:
        """The number of example i's row in the source, from 0."""
        return int(self.arrays["rows"][self.index[i]])

    def text(self, i: int) -> Any:
        """Example i's row as it stood in the source, or as the user's transform gave it."""
        return self.source_text(self.source_row(i))

    def asked(self, i: int) -> str | Messages:
        """Example i's prompt before its tokenization: text, or messages where the row is a chat."""
        return read(self.text(i), self.meta["format"], "prompts")[0].prompt

    def columns(self, examples: Sequence[int] | np.ndarray) -> dict[str, list[Any]]:
        """{column: its value of each of these examples} of all columns but `prompt`, as rewards take them; None where a
        row lacks a column that another of them, or one of `column_names`, has."""
        rows = [self.text(int(i)) for i in examples]
        names = dict.fromkeys((*self.column_names, *_columns_of(rows)))
        return {name: [row.get(name) for row in rows] for name in names}

    @cached_property
    def column_names(self) -> tuple[str, ...]:
        """The columns that any of the first hundred examples has: what a reward can ask for."""
        return tuple(_columns_of(self.text(i) for i in range(min(len(self), 100))))

    def source_text(self, row: int) -> Any:
        """Row `row` of the source, kept or dropped."""
        start, end = self.arrays["text_offsets"][row : row + 2]
        with open(self.folder / "texts.jsonl", "rb") as stream:
            stream.seek(int(start))
            return json.loads(stream.read(int(end - start)))

    @property
    def unusable(self) -> int:
        """Rows of the source that could not be used; those that a format or the user's function has left out could."""
        reasons: Mapping[str, int] = self.meta["dropped"]
        return sum(count for reason, count in reasons.items() if not reason.startswith(LEFT_OUT))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """{row, reason, detail} of each row of the source that was left out."""
        with open(self.folder / "dropped.jsonl", "rb") as stream:
            yield from map(json.loads, stream)

    def select(self, places: np.ndarray) -> "Prepared":
        """The examples at these places (into this selection), in their order."""
        index = self.index[np.asarray(places, np.int64)]
        fingerprint = self.fingerprint
        if not np.array_equal(index, self.index):
            fingerprint = digest(self.meta["fingerprint"], hashlib.sha256(index.tobytes()).hexdigest())
        return replace(self, index=index, fingerprint=fingerprint)


def _columns_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    return dict.fromkeys(name for row in rows for name in row if name != "prompt")


def stored_width(kind: str) -> int:
    """Sequences of an example that are kept: a mismatched completion is not."""
    return 1 if kind == "labelled" else KINDS[kind]


def split_by_hash(prepared: Prepared, fraction: float) -> tuple[Prepared, Prepared]:
    """(train, held out): a prompt goes by its hash, so it is never in both, and where it goes depends on it alone.

    About `fraction` of the prompts are held out. Raises ValueError if either part is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"data.eval.fraction must lie between 0 and 1, got {fraction}")
    held_out = np.asarray(prepared.arrays["prompt_hashes"])[prepared.index] < np.uint64(int(fraction * 2**64))
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"data.eval.fraction={fraction} puts {int(held_out.sum())} of {len(prepared)} examples into the held-out "
            "part: take another fraction, or give data.eval.path a file of its own"
        )
    return prepared.select(np.flatnonzero(~held_out)), prepared.select(np.flatnonzero(held_out))


def open_prepared(folder: Path, kept_in: epath.Path, pad_id: int) -> Prepared | None:
    """The prepared data of a cache folder, or None if there is none or a file is not as long as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return None
        arrays = {key: _load(folder / f"{key}.npy") for key in ARRAYS}
    except (OSError, ValueError, KeyError):
        return None
    return Prepared(folder, kept_in, meta, meta["fingerprint"], pad_id, np.asarray(arrays["order"]), arrays)


def _load(file: Path) -> np.ndarray:
    """An array, mapped unless it is empty (which cannot be)."""
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(file, allow_pickle=False)
