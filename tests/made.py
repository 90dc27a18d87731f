"""Prepared examples of any kind, made up without a tokenizer: what batching asks of `data.sources.Prepared`."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Made:
    """Example i has the token sequences `rows[i]` (ids, mask); the attributes are those of `Prepared`."""

    kind: str
    rows: list[list[tuple[np.ndarray, np.ndarray]]]
    prompt_lengths: np.ndarray
    values: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]
    pad_id: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0])

    @property
    def lengths(self) -> np.ndarray:
        return np.array([[len(ids) for ids, _ in example] for example in self.rows], np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(ids.tobytes() for example in self.rows for ids, _ in example)).hexdigest()

    def sequence(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        return self.rows[i][j]

    def select(self, places: np.ndarray) -> "Made":
        values = {name: x[places] for name, x in self.values.items()}
        rows, prompts = [self.rows[i] for i in places], self.prompt_lengths[places]
        return dataclasses.replace(self, rows=rows, prompt_lengths=prompts, values=values)


def make(
    width: int,
    n: int = 24,
    *,
    kind: str = "pairs",
    vocab: int = 384,
    max_length: int = 40,
    prompts: tuple[int, int] = (0, 12),
    responses: tuple[int, int] = (1, 20),
    seed: int = 0,
    **values: np.ndarray,
) -> Made:
    """n examples of `width` sequences: prompts and responses of so many tokens (at least, less than)."""
    random = np.random.default_rng(seed)
    rows, prompt_lengths = [], random.integers(*prompts, n).astype(np.int32)
    for length in prompt_lengths:
        prompt = random.integers(4, vocab, length)
        example = []
        for _ in range(width):
            ids = np.concatenate([prompt, random.integers(4, vocab, random.integers(*responses))]).astype(np.int32)
            example.append((ids, np.arange(len(ids)) >= length))
        rows.append(example)
    return Made(kind, rows, prompt_lengths, values, {"max_length": max_length})
