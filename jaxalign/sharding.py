"""The mesh, and where every array lies on it.

A mesh always has four axes; size 1 switches one off:

    data      rows of the batch; weights are replicated
    fsdp      rows of the batch; weights are split and gathered layer by layer
    tensor    heads, MLP columns and the vocabulary
    sequence  time steps of one row (all-to-all to heads inside attention, "Ulysses"); weights are split as by fsdp

Code below the entries never passes a mesh around: it runs under `jax.set_mesh(mesh)` and asks for the current one.
Without a mesh everything here is a no-op, so a function can be tried on one device as it stands.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")

# What a dimension of a weight is -> the mesh axes it may be split over, best first. Every logical name stands here
# (an unknown one raises); a dimension takes the first entry whose size divides it.
RULES: Mapping[str | None, tuple[tuple[str, ...], ...]] = {
    None: ((),),
    "layers": ((),),
    # One table serves look-up and head. It is split by vocabulary, so that neither ever gathers it; vocabularies that
    # the whole product does not divide fall back to a smaller split.
    "vocab": (("tensor", "fsdp", "sequence"), ("tensor", "fsdp"), ("fsdp",), ("tensor",), ()),
    "embed": (("fsdp", "sequence"), ("fsdp",)),
    "heads": (("tensor",),),
    "kv_heads": (("tensor",),),
    "mlp": (("tensor",),),
    "labels": ((),),
    "rank": ((),),
}


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over `devices` (all of this run's when None); one axis may be -1 for "all that is left".

    Given devices keep their order; otherwise JAX places neighbours of the mesh on neighbours of the chip network.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor, sequence), strict=True))
    n_devices = len(devices) if devices is not None else jax.device_count()
    shape = resolve_sizes(sizes, n_devices)
    if devices is not None:
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve_sizes(sizes: Mapping[str, int], n_devices: int) -> tuple[int, ...]:
    """Sizes of all four axes in the order of AXES, with -1 filled in.

    Raises:
      ValueError: two axes are -1, or the sizes do not multiply to `n_devices`.
    """
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1 or any(sizes[axis] < 1 and sizes[axis] != -1 for axis in AXES):
        raise ValueError(f"mesh {dict(sizes)}: sizes are positive, and at most one axis is -1 (all that is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if n_devices % fixed or (not free and fixed != n_devices):
        raise ValueError(
            f"mesh {dict(sizes)} needs a {'multiple' if free else 'total'} of {fixed} devices, but there are "
            f"{n_devices}. Set one of mesh.{{{','.join(AXES)}}} to -1 to take all that is left."
        )
    return tuple(n_devices // fixed if sizes[axis] == -1 else sizes[axis] for axis in AXES)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of the enclosing `jax.set_mesh`, None outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform(mesh: Any = None) -> str:
    """What the devices of the (current) mesh are: "cpu", "gpu" or "tpu"; the default backend's without a mesh."""
    mesh = mesh if mesh is not None else current_mesh()
    device = None if mesh is None else mesh.abstract_mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def axis_size(axes: str | Sequence[str] | None, mesh: Any = None) -> int:
    """Number of devices along `axes` of the (current) mesh; 1 without a mesh."""
    mesh = mesh if mesh is not None else current_mesh()
    if mesh is None or axes is None:
        return 1
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def fit(size: int, axes: str | Sequence[str] | None, mesh: Any = None) -> Any:
    """`axes` where a dimension of `size` divides evenly over them, else None (not split)."""
    return axes if axes and size % axis_size(axes, mesh) == 0 else None


def constrain(x: jax.Array, *axes: str | Sequence[str] | None) -> jax.Array:
    """Tells the partitioner how an activation lies; a dimension that does not divide stays whole. Values stay."""
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = PartitionSpec(*(fit(size, axis, mesh) for size, axis in zip(x.shape, axes, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def partition(shape: Sequence[int], logical: Sequence[str | None], mesh: Any, name: str = "?") -> PartitionSpec:
    """The partition of one weight from the logical names of its dimensions (RULES).

    Raises:
      ValueError: a logical name is not in RULES, or no rule's mesh axes divide the dimension.
    """
    spec: list[Any] = []
    for size, axis in zip(shape, logical, strict=True):
        if axis not in RULES:
            raise ValueError(f"weight {name}: dimension {axis!r} has no rule; sharding.RULES knows {list(RULES)}")
        for candidate in RULES[axis]:
            if size % axis_size(candidate, mesh) == 0:
                spec.append(tuple(a for a in candidate if axis_size(a, mesh) > 1) or None)
                break
        else:
            sizes = {a: axis_size(a, mesh) for a in RULES[axis][0]}
            raise ValueError(
                f"weight {name}: its dimension of {size} ({axis}) does not divide over mesh {sizes}. "
                f"Choose mesh sizes that divide {size}, and put the rest of the devices on mesh.data."
            )
    return PartitionSpec(*spec)


def sum_scatter(x: jax.Array, axes: str | tuple[str, ...], dimension: int) -> jax.Array:
    """Inside shard_map: the sum of x over mesh axes, each device keeping its own part of `dimension`.

    On CPU as a whole sum and a slice: between processes, gloo's reduce-scatter now and then loses data there (jaxlib
    0.10.2; a handful of blocks of a 2 GB array).
    """
    if platform() != "cpu":
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    size = x.shape[dimension] // axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, axes), jax.lax.axis_index(axes) * size, size, axis=dimension)


def param_shardings(mesh: jax.sharding.Mesh, declared: Any) -> Any:
    """NamedSharding of every weight of a declared tree (`models.declare`)."""

    def one(path: Any, weight: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(weight.shape, weight.axes, mesh, name))

    return jax.tree_util.tree_map_with_path(one, declared, is_leaf=lambda x: hasattr(x, "axes"))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of a batch leaf: rows over data and fsdp. (Time is split inside the step, where it is needed.)"""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def process_rows(mesh: jax.sharding.Mesh, n_rows: int) -> np.ndarray:
    """Which of the `n_rows` rows of a global batch this process feeds, ascending (int64).

    With tensor or sequence split across hosts, two processes feed the same rows.

    Raises:
      ValueError: the rows do not divide over data x fsdp.
    """
    groups = axis_size(ROWS, mesh)
    if n_rows % groups:
        raise ValueError(f"a batch of {n_rows} rows does not divide over data x fsdp = {groups} devices")
    indices = row_sharding(mesh).addressable_devices_indices_map((n_rows,))
    return np.unique(np.concatenate([np.arange(n_rows)[index] for index in indices.values()]))


def global_rows(mesh: jax.sharding.Mesh, n_rows: int) -> int:
    """The rows of the global batch of which this process feeds `n_rows`."""
    groups = axis_size(ROWS, mesh)
    return n_rows * groups // len(process_rows(mesh, groups))


def place_batch(mesh: jax.sharding.Mesh | None, batch: Mapping[str, np.ndarray], n_rows: int) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh; the result is the global batch of `n_rows` rows."""
    if mesh is None:
        return {name: jax.numpy.asarray(leaf) for name, leaf in batch.items()}
    sharding = row_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(leaf), (n_rows, *leaf.shape[1:]))
        for name, leaf in batch.items()
    }


def use_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """`jax.set_mesh(mesh)`, or nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
