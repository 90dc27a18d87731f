"""What several test modules share: golden files and tiny models."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign import hf

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("llama", "qwen2", "qwen3")

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


def pair_batch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """TRL's batch (all chosen rows, then all rejected ones) in our layout (rows 2i and 2i + 1 are a pair)."""
    pairs = len(arrays["in.input_ids"]) // 2
    order = np.arange(2 * pairs).reshape(2, pairs).T.reshape(-1)
    tokens = arrays["in.input_ids"][order]
    return {
        "tokens": tokens,
        "positions": positions(tokens),
        "mask": arrays["in.completion_mask"][order].astype(bool),
        "lengths": arrays["in.attention_mask"][order].sum(axis=1).astype(np.int32),
    }
