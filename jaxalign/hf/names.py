"""The names that a model's tensors have in Hugging Face's files, derived from the declared tree."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxalign import models
from jaxalign.models.config import ModelConfig


class Leaf(NamedTuple):
    """One leaf of the declared tree and its tensors in HF's spelling: one a layer, or just one."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of its tensors in HF's layout."""
        own = self.shape[1:] if self.stacked else self.shape
        return own[::-1] if self.transposed else own


def leaves(cfg: ModelConfig) -> list[Leaf]:
    """The name table of a model, from its declared tree."""
    kinds = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

    def walk(tree: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Leaf]:
        for key, value in tree.items():
            here = (*path, key)
            if isinstance(value, Mapping):
                yield from walk(value, here)
                continue
            stacked = here[0] == "layers"
            stem = ".".join(here[1:-1] if stacked else here[:-1]) + "." + kinds[key]
            if stacked:
                names = tuple(f"model.layers.{layer}.{stem}" for layer in range(value.shape[0]))
            else:
                names = (stem if here[0] in ("lm_head", "score") else "model." + stem,)
            yield Leaf(here, tuple(value.shape), names, stacked)

    return list(walk(models.declare(cfg), ()))


def get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def nest(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
