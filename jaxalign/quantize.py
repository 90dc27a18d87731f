"""Frozen weights in 8 or 4 bits, decoded where they are used: int8, and NF4 (Dettmers et al. 2023, QLoRA).

A kernel [.., in, out] is cut along `in` into blocks of (at most) 64 weights. Each block keeps its largest absolute
value as a bfloat16 scale and its weights as codes: multiples of scale / 127, or the nearest of NF4's 16 values, two of
them to a byte. A table [V, D] is cut along its rows and keeps 8 bits a weight, under nf4 too: rows are looked up, and
the head is the last thing that a quantised model's error should come from.

Two codes to a byte and not `jnp.uint4`, of which some backends keep one to a byte: what is counted is what is there. A
block's codes lie together in its shard, so that a kernel that is split over devices is decoded where it lies.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("int8", "nf4")
BLOCK = 64

# Quantiles of the normal distribution, scaled to [-1, 1], with an exact 0: QLoRA (https://arxiv.org/abs/2305.14314),
# appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight as codes and scales; in the tree it stands where the weight stood.

    Attributes:
      codes: int8 of the weight's shape; or uint8 [.., in / 2, out], in each block the codes of its first half in the
        low four bits.
      scales: bfloat16 [.., in / block, out]; of a table [V, D / block].
      kind: "int8" or "nf4".
    """

    codes: jax.Array
    scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        *outer, n_in, n_out = self.codes.shape
        return (*outer, 2 * n_in if self.kind == "nf4" else n_in, n_out)


def quantize(weight: jax.Array, kind: str) -> Quantized:
    """A kernel [.., in, out] in blocks.

    Raises:
      ValueError: nf4 of an odd number of inputs.
    """
    *outer, n_in, n_out = weight.shape
    block = math.gcd(n_in, BLOCK)
    if kind == "nf4" and block == 1:
        raise ValueError(f"nf4 keeps two weights of an input side in a byte, and it has {n_in}; use int8")
    blocks = weight.astype(jnp.float32).reshape(*outer, n_in // block, block, n_out)
    scales = jnp.abs(blocks).max(axis=-2).astype(jnp.bfloat16)
    units = blocks / _safe(scales)[..., None, :]
    if kind == "int8":
        codes = jnp.round(jnp.clip(units, -1, 1) * 127).astype(jnp.int8)
        return Quantized(codes.reshape(weight.shape), scales, kind)
    # The code is the number of midpoints between neighbouring values that the weight exceeds.
    codes = jnp.zeros(units.shape, jnp.uint8)
    for below, above in zip(NF4[:-1], NF4[1:], strict=True):
        codes += (units > (below + above) / 2).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=-2)
    return Quantized((low | (high << 4)).reshape(*outer, n_in // 2, n_out), scales, kind)


def quantize_table(table_VD: jax.Array) -> Quantized:
    """A table in 8 bits, in blocks of a row."""
    turned = quantize(table_VD.T, "int8")
    return Quantized(turned.codes.T, turned.scales.T, "int8")


def _safe(scales: jax.Array) -> jax.Array:
    """Scales to divide by."""
    return jnp.where(scales == 0, 1, scales).astype(jnp.float32)


def dequantize(weight: Quantized, dtype: Any) -> jax.Array:
    """The weight in `dtype`."""
    *outer, n_in, n_out = weight.shape
    scales = weight.scales.astype(jnp.float32)
    if scales.shape[-1] != n_out:  # a table's
        return rows(weight.codes, scales, dtype)
    n_blocks = scales.shape[-2]
    codes = weight.codes.reshape(*outer, n_blocks, -1, n_out)
    if weight.kind == "nf4":
        units = jnp.concatenate([_values(codes & 15), _values(codes >> 4)], axis=-2)
    else:
        units = codes.astype(jnp.float32) / 127
    return (units * scales[..., None, :]).astype(dtype).reshape(weight.shape)


def rows(codes_VD: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Some rows of a table from their codes [.., D] and scales [.., D / block]."""
    blocks = codes_VD.reshape(*scales.shape, -1).astype(jnp.float32) / 127
    return (blocks * scales[..., None].astype(jnp.float32)).astype(dtype).reshape(codes_VD.shape)


def _values(codes: jax.Array) -> jax.Array:
    """NF4's values by a choice a bit, which fuses with what comes after it; a gather from a table would not."""
    values: list[Any] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 != 0
        values = [
            jnp.where(is_set, jnp.float32(high), jnp.float32(low))
            for low, high in zip(values[0::2], values[1::2], strict=True)
        ]
    return values[0]


@jax.custom_vjp
def product(x: jax.Array, kernel: Quantized) -> jax.Array:
    """x [.., in] @ kernel [in, out]. The backward pass decodes again: between the two only the codes are kept."""
    return x @ dequantize(kernel, x.dtype)


def _forward(x: jax.Array, kernel: Quantized) -> tuple[jax.Array, Quantized]:
    return product(x, kernel), kernel


def _backward(kernel: Quantized, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient @ dequantize(kernel, gradient.dtype).T, None


product.defvjp(_forward, _backward)
