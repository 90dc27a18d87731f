"""What several test modules share: golden files and tiny models."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign import hf

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "qwen2", "qwen3")
FIRST_FAMILY = ("llama", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:]))
"""For what looks at a loss: families differ in the forward pass, which test_models and test_logprobs do for all."""

# Suggested by tests/golden/README.md, section 3, for float32 JAX on CPU.
LOGPS = dict(rtol=0, atol=1e-4)
SEQUENCE_LOGPS = dict(rtol=0, atol=5e-4)
LOSS = dict(rtol=1e-4, atol=2e-5)
REWARD = dict(rtol=0, atol=1e-4)
GRADIENT_NORM = dict(rtol=2e-4, atol=0)

LAYOUTS = (
    {"data": 8},
    {"fsdp": 8},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "sequence": 2},
)


def policy(family: str) -> Path:
    """The folder of a golden policy."""
    return GOLDEN / "models" / family / "policy"


def load_tokenizer(family: str) -> Any:
    """A new tokenizer of a golden policy, which a test may change."""
    return hf.load_tokenizer(policy(family))


@functools.cache
def model(family: str, role: str = "policy") -> tuple[Any, Any]:
    """(ModelConfig, params) of a golden model."""
    return hf.load(GOLDEN / "models" / family / role)


@functools.cache
def case(family: str, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(JSON, arrays) of a golden case."""
    stem = GOLDEN / "cases" / family / name
    arrays = dict(np.load(f"{stem}.npz")) if Path(f"{stem}.npz").exists() else {}
    return json.loads(Path(f"{stem}.json").read_text()), arrays


def positions(tokens: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... in every row."""
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def pair_batch(arrays: dict[str, np.ndarray], width: int = 2) -> dict[str, np.ndarray]:
    """TRL's batch (all chosen rows, all rejected ones, all gold ones) in our layout (an example's are neighbours)."""
    examples = len(arrays["in.input_ids"]) // width
    order = np.arange(width * examples).reshape(width, examples).T.reshape(-1)
    tokens = arrays["in.input_ids"][order]
    return {
        "tokens": tokens,
        "positions": positions(tokens),
        "mask": arrays["in.completion_mask"][order].astype(bool),
        "lengths": arrays["in.attention_mask"][order].sum(axis=1).astype(np.int32),
    }


def packed(
    batch: dict[str, np.ndarray], width: int, *, per_row: int = 2, shared: bool = False
) -> dict[str, np.ndarray]:
    """The examples of an unpacked batch, `per_row` in a row, and a row of fillers: data/packing.py's layout by loops.

    Args:
      batch: leaves [R, T], `lengths` [R] (of a filler 0), and others [R, 1, ...].
      width: rows of an example.
      per_row: examples in a row.
      shared: all before the last token of an example's prompt stands once, in a segment of its own.
    """
    examples = np.flatnonzero(batch["lengths"].reshape(-1, width).any(axis=1))
    rows, slots = -(-len(examples) // per_row) + 1, width * per_row
    time = per_row * width * int(batch["lengths"].max())
    tokens_like = [name for name, x in batch.items() if x.ndim == 2 and x.shape == batch["tokens"].shape]
    out = {name: np.zeros((rows, time), batch[name].dtype) for name in tokens_like}
    for name in batch.keys() - {*tokens_like, "lengths"}:
        out[name] = np.zeros((rows, slots, *batch[name].shape[2:]), batch[name].dtype)
    out |= {"segment_ids": np.zeros((rows, time), np.int32), "ends": np.full((rows, slots), -1, np.int32)}
    out["lengths"] = np.zeros(rows, np.int32)
    if shared:
        out["prefix_ids"] = np.zeros((rows, time), np.int32)

    def put(row: int, source: int, taken: slice, segment: int, prefix: int) -> int:
        start, count = out["lengths"][row], taken.stop - taken.start
        place = slice(start, start + count)
        for name in tokens_like:
            out[name][row, place] = batch[name][source, taken]
        out["segment_ids"][row, place] = segment
        if shared:
            out["prefix_ids"][row, place] = prefix
        out["lengths"][row] += count
        return start + count - 1

    for n, example in enumerate(examples):
        row, nth = divmod(n, per_row)
        first = width * example
        once = int(np.argmax(batch["mask"][first])) - 1 if shared else 0
        if once:
            put(row, first, slice(0, once), slots + 1 + nth, 0)
        for j in range(width):
            slot, source = width * nth + j, first + j
            rest = slice(once, int(batch["lengths"][source]))
            out["ends"][row, slot] = put(row, source, rest, slot + 1, slots + 1 + nth)
            for name in batch.keys() - {*tokens_like, "lengths"}:
                out[name][row, slot] = batch[name][source, 0]
    return out
