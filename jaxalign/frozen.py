"""The base of a LoRA run as it is kept: in the compute dtype or quantised, made leaf by leaf while it is read."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import lora, models, quantize, sharding
from jaxalign.models.config import ModelConfig


def keeper(
    cfg: ModelConfig, spec: lora.Spec, mesh: jax.sharding.Mesh, kind: str | None = None
) -> Callable[[lora.Path, jax.Array], Any]:
    """A function (path, leaf in float32) -> that leaf as it is kept, placed on `mesh`; the leaf is given up to it.

    Modules that are trained whole keep the compute dtype, so that what is trained begins as what the reference has.

    Args:
      kind: None or one of quantize.KINDS.

    Raises:
      ValueError: an unknown kind.
    """
    placed = lora.flat(abstract(cfg, spec, mesh, kind).base)

    def keep(path: lora.Path, leaf: jax.Array) -> Any:
        shardings = jax.tree.map(lambda x: x.sharding, placed[path])
        convert = jax.jit(functools.partial(_kept, cfg, spec, kind, path), out_shardings=shardings)
        kept = jax.block_until_ready(convert(leaf))
        leaf.delete()  # the next one is read when this one has gone
        return kept

    return keep


def abstract(cfg: ModelConfig, spec: lora.Spec, mesh: jax.sharding.Mesh, kind: str | None = None) -> lora.Frozen:
    """The frozen tree as ShapeDtypeStructs with their shardings.

    Codes and scales of a kernel are split alike, where its blocks divide; where they do not, they stay whole.
    """
    if kind not in (None, *quantize.KINDS):
        raise ValueError(f"model.quantize is {kind!r}, expected one of {', '.join(quantize.KINDS)}")
    base = {}
    for path, weight in lora.flat(models.declare(cfg)).items():
        whole = jax.ShapeDtypeStruct(weight.shape, jnp.float32)
        kept = jax.eval_shape(functools.partial(_kept, cfg, spec, kind, path), whole)
        split = sharding.partition(weight.shape, weight.axes, mesh, "/".join(path))
        if isinstance(kept, quantize.Quantized):
            split = PartitionSpec(*map(functools.partial(sharding.fit, mesh=mesh), kept.scales.shape, split))
        place = NamedSharding(mesh, split)
        base[path] = jax.tree.map(lambda x, place=place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), kept)
    return lora.Frozen(lora.nest(base), spec)


def _kept(cfg: ModelConfig, spec: lora.Spec, kind: str | None, path: lora.Path, leaf: jax.Array) -> Any:
    if kind is not None and path[-2] not in spec.modules_to_save:
        if path[0] == "layers" and path[-1] == "kernel":
            return jax.lax.map(functools.partial(quantize.quantize, kind=kind), leaf)  # a layer's float32 at a time
        if path[-1] == "embedding":
            return quantize.quantize_table(leaf)
    return jnp.copy(models.as_used(cfg, {path[-1]: leaf})[path[-1]])
