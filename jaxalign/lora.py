"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) beside frozen weights.

A projection's kernel W [in, out] is frozen, and y = x W + scale * (x a) b is trained by a [in, r] and b [r, out] alone.
The trainable tree of a LoRA run holds nothing but `lora_a` and `lora_b`, each stacked over the layers, and the whole
copies of the modules that are trained as they are (`modules_to_save`); the base is `Frozen` beside it. `attach` puts
the two together for the decoder, which knows an adapter by its leaves.

Not every layer has to have an adapter, nor one of the same rank: what a layer lacks is zero in a and in b, where no
gradient ever reaches it.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import models, sharding
from jaxalign.messages import did_you_mean, listed
from jaxalign.models.config import ModelConfig

ALL_LINEAR = "all-linear"

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Which adapters there are. The defaults are PEFT's for the families here, but for `targets`.

    Attributes:
      rank, alpha: an adapter's output is scaled by alpha / rank.
      targets: each a projection's name or the end of its path ("q_proj", "self_attn.q_proj"), a regular expression for
        its whole path ("model.layers.[0-3].mlp.up_proj"), or "all-linear": all seven of every layer, never a head.
      dropout: share of an adapter's inputs that is dropped in training.
      rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
      modules_to_save: modules by name (embed_tokens, lm_head, norm, input_layernorm, ...) that are trained whole. A
        score head is, named or not. Where the head is tied, embed_tokens is both.
      layers: the layers that get adapters; None: all.
      rank_pattern, alpha_pattern: (end of a path, or expression for it; value) where a projection has its own.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0
    rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            if not (isinstance(rank, int) and rank >= 1):
                raise ValueError(f"an adapter's rank is {rank!r}, expected an integer from 1 up")
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            if not (alpha > 0 and math.isfinite(alpha)):
                raise ValueError(f"an adapter's alpha is {alpha!r}, expected a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"an adapter's dropout is {self.dropout!r}, expected a share in [0, 1)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a LoRA run trains beside and never changes: a pytree of the base's arrays, with the spec as static data.

    base: the tree of `models.declare`, in the compute dtype; or kernels and tables of it quantised (quantize.py).
    """

    base: models.Params
    spec: Spec = dataclasses.field(metadata={"static": True})


class Target(NamedTuple):
    """A projection with adapters: its path in the tree, and of each layer the rank (0: it has none) and the scale."""

    path: Path
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


def attach(frozen: Any, adapters: models.Params | None) -> models.Params:
    """The tree that the decoder computes with: the base with its adapters, `lora_b` scaled.

    Args:
      frozen: a `Frozen`; None where the trainable tree is the whole model, which is returned as it is.
      adapters: the trainable tree; without any ({} or None) it is the bare base.

    Raises:
      ValueError: an adapter's leaf is missing, foreign or of another shape; all of them are named.
    """
    if frozen is None:
        assert adapters is not None, "without a frozen base the trainable tree is the model"
        return adapters
    if not adapters:
        base: models.Params = frozen.base
        return base
    check(frozen.base, frozen.spec, adapters)
    leaves = flat(frozen.base) | flat(adapters)
    for target in targets(frozen.base, frozen.spec):
        scales_L11 = jnp.array(target.scales, jnp.float32)[:, None, None]
        leaves[*target.path, "lora_b"] = leaves[*target.path, "lora_b"] * scales_L11
        if frozen.spec.dropout:
            leaves[*target.path, "lora_dropout"] = jnp.full(len(target.ranks), frozen.spec.dropout, jnp.float32)
    return nest(leaves)


def merge(base: models.Params, adapters: models.Params, spec: Spec) -> models.Params:
    """The whole model: kernel + scale * a b, computed in float32, and what was trained whole; in the base's dtypes.

    Raises:
      ValueError: the adapters are not those of `spec` (see `attach`).
    """
    check(base, spec, adapters)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: merge_leaf(tuple(entry.key for entry in path), leaf, adapters, base, spec), base
    )


def merge_leaf(path: Path, leaf: jax.Array, adapters: models.Params, base: Any, spec: Spec) -> jax.Array:
    """One leaf of `merge`, for weights that are not in memory at once.

    Args:
      path: of the leaf in the base.
      leaf: the base's, unquantised.
      base: the base or its declaration (`models.declare`), for the names of its modules.
    """
    trained = flat(adapters)
    if path in trained:
        return trained[path].astype(leaf.dtype)
    for target in targets(base, spec):
        if (*target.path, "kernel") == path:
            a_LIr, b_LrO = trained[*target.path, "lora_a"], trained[*target.path, "lora_b"]
            scales_L11 = jnp.array(target.scales, jnp.float32)[:, None, None]
            product_LIO = jnp.einsum("LIr,LrO->LIO", a_LIr, b_LrO * scales_L11, precision="highest")
            return (leaf.astype(jnp.float32) + product_LIO).astype(leaf.dtype)
    return leaf


def declare(cfg: ModelConfig, spec: Spec) -> models.Params:
    """Every leaf of the trainable tree as models.Weight: a is split as its kernel's inputs, b as its outputs.

    Raises:
      ValueError: a target or module that the model has not.
    """
    declared = models.declare(cfg)
    leaves = flat(declared)
    axes = {path: weight.axes for path, weight in leaves.items()}
    for target in targets(declared, spec):
        layers, n_in, n_out = axes[*target.path, "kernel"]
        axes[*target.path, "lora_a"] = (layers, n_in, "rank")
        axes[*target.path, "lora_b"] = (layers, "rank", n_out)
    return nest({path: models.Weight(shape, axes[path]) for path, shape in _shapes(declared, spec).items()})


def shardings(cfg: ModelConfig, spec: Spec, mesh: jax.sharding.Mesh) -> models.Params:
    """NamedSharding of every leaf of the trainable tree."""
    tree: models.Params = sharding.param_shardings(mesh, declare(cfg, spec))
    return tree


def abstract(cfg: ModelConfig, spec: Spec, mesh: jax.sharding.Mesh) -> models.Params:
    """The trainable tree as float32 ShapeDtypeStructs with their shardings."""
    tree: models.Params = jax.tree.map(
        lambda weight, placed: jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=placed),
        declare(cfg, spec),
        shardings(cfg, spec, mesh),
        is_leaf=lambda x: isinstance(x, models.Weight),
    )
    return tree


def init(cfg: ModelConfig, key: jax.Array, spec: Spec, base: models.Params | None = None) -> models.Params:
    """New adapters in float32, which change nothing: a uniform in +-1/sqrt(in), b zero. Jit it, with out_shardings.

    That is torch's default for a Linear (kaiming uniform with a = sqrt(5)), which PEFT takes for a.

    Args:
      base: the frozen weights, of which modules_to_save are copied. Needed only where there are such modules.
    """
    declared = models.declare(cfg)
    source = {} if base is None else flat(base)
    leaves = {}
    for path, shape in _shapes(declared, spec).items():
        if path[-1] == "lora_a":
            bound = 1 / math.sqrt(shape[1])
            own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
            leaves[path] = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
        elif path[-1] == "lora_b":
            leaves[path] = jnp.zeros(shape, jnp.float32)
        else:
            if path not in source:
                raise ValueError(f"{'/'.join(path)} is trained whole and begins as the base's: give init the base")
            leaves[path] = jnp.array(source[path], jnp.float32)
    for target in targets(declared, spec):
        path = (*target.path, "lora_a")
        ranks_L11 = jnp.array(target.ranks)[:, None, None]
        leaves[path] = jnp.where(jnp.arange(leaves[path].shape[2]) < ranks_L11, leaves[path], 0)
    return nest(leaves)


def check(base: models.Params, spec: Spec, adapters: models.Params) -> None:
    """Raises ValueError where `adapters` are not exactly the leaves that `spec` says for this base; names all."""
    expected = _shapes(base, spec)
    given = {path: tuple(leaf.shape) for path, leaf in flat(adapters).items()}
    missing = ["/".join(path) for path in expected if path not in given]
    foreign = [
        "/".join(path) + did_you_mean("/".join(path), ["/".join(one) for one in expected])
        for path in given
        if path not in expected
    ]
    misshapen = [
        f"{'/'.join(path)} is {list(given[path])}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in given and given[path] != shape
    ]
    if missing or foreign or misshapen:
        raise ValueError(
            f"these are not the adapters of {spec}. Missing: {listed(missing) or 'none'}. Unexpected: "
            f"{listed(foreign) or 'none'}. Misshapen: {listed(misshapen) or 'none'}"
        )


def check_base(expected: str | None, found: str, *, what: str = "the adapter") -> None:
    """Raises ValueError if adapters that were trained beside one base are put beside another.

    Args:
      expected: `hf.fingerprint` of the base that was trained with; None: not known (an adapter made elsewhere).
      found: that of the base at hand.
    """
    if expected is not None and expected != found:
        raise ValueError(
            f"{what} was trained beside another base: its hash is {expected[:16]}..., that of the base given here is "
            f"{found[:16]}.... Give the model that the adapter was trained with (model.path)"
        )


def targets(tree: Any, spec: Spec) -> list[Target]:
    """The projections of a tree (base or declaration) that get adapters.

    Raises:
      ValueError: an entry of targets or of a pattern that fits nothing, or something that can't have an adapter.
    """
    kernels = {path[:-1]: leaf for path, leaf in flat(tree).items() if path[0] == "layers" and path[-1] == "kernel"}
    names = {path: module_names(path, kernel.shape[0]) for path, kernel in kernels.items()}
    every = [name for own in names.values() for name in own]
    others = [name for path in modules(tree) if path not in kernels for name in module_names(path, 1)]
    n_layers = max(len(own) for own in names.values())
    for entry in spec.targets:
        if entry == ALL_LINEAR or any(_fits(entry, name) for name in every):
            continue
        if any(_fits(entry, name) for name in others):
            raise ValueError(
                f"lora.targets: {entry!r} can't have an adapter (the seven projections of a layer can); name it in "
                "lora.modules_to_save to train it whole"
            )
        known = sorted({name.rpartition(".")[2] for name in every})
        raise ValueError(
            f"lora.targets: {entry!r} fits no projection of the model{did_you_mean(entry, known)}. There are "
            f"{', '.join(known)}, regular expressions for paths such as {every[0]}, and {ALL_LINEAR}"
        )
    for layer in spec.layers or ():
        if not 0 <= layer < n_layers:
            raise ValueError(f"layers_to_transform has layer {layer}, and the model has layers 0 to {n_layers - 1}")
    for entry in [*dict(spec.rank_pattern), *dict(spec.alpha_pattern)]:
        if not any(_fits_pattern(entry, name) for name in every):
            raise ValueError(f"rank_pattern or alpha_pattern: {entry!r} fits no projection, such as {every[0]}")
    found: list[Target] = []
    for path, own in names.items():
        if path[-1] in spec.modules_to_save:  # as in PEFT, a module that is trained whole gets no adapter
            continue
        ranks, scales = zip(*(_rank_and_scale(layer, name, spec) for layer, name in enumerate(own)), strict=True)
        if any(ranks):
            found.append(Target(path, ranks, scales))
    if not found:
        raise ValueError(f"lora.targets is {spec.targets!r}: no projection of any layer would get an adapter")
    return found


def _rank_and_scale(layer: int, name: str, spec: Spec) -> tuple[int, float]:
    wanted = any(entry == ALL_LINEAR or _fits(entry, name) for entry in spec.targets)
    if not wanted or (spec.layers is not None and layer not in spec.layers):
        return 0, 0.0
    rank = next((value for entry, value in spec.rank_pattern if _fits_pattern(entry, name)), spec.rank)
    alpha = next((value for entry, value in spec.alpha_pattern if _fits_pattern(entry, name)), spec.alpha)
    return rank, alpha / (math.sqrt(rank) if spec.rslora else rank)


def saved(tree: Any, spec: Spec) -> list[Path]:
    """The paths of the modules that are trained whole.

    Raises:
      ValueError: a name that no module has; or the head of a model that has none of its own.
    """
    known = modules(tree)
    names = sorted({path[-1] for path in known})
    for name in spec.modules_to_save:
        if name == "lm_head" and name not in names and "embed_tokens" in names:
            raise ValueError(
                "lora.modules_to_save: the lm_head is tied to embed_tokens; name embed_tokens, which trains both"
            )
        if name not in names:
            raise ValueError(
                f"lora.modules_to_save: the model has no module {name!r}{did_you_mean(name, names)}. "
                f"There are {', '.join(names)}"
            )
    return [path for path in known if path[-1] in (*spec.modules_to_save, "score")]


def modules(tree: Any) -> list[Path]:
    """The paths of what holds weights: ("embed_tokens",), ("layers", "self_attn", "q_proj"), ..."""
    return list(dict.fromkeys(path[:-1] for path in flat(tree)))


def module_names(path: Path, layers: int) -> list[str]:
    """The names of a module in Hugging Face's models: one a layer, or just one."""
    if path[0] == "layers":
        return [f"model.layers.{layer}.{'.'.join(path[1:])}" for layer in range(layers)]
    return [".".join(path) if path[0] in ("lm_head", "score") else "model." + ".".join(path)]


def _fits(entry: str, name: str) -> bool:
    """Whether a target is a module's name, the end of it, or an expression for the whole."""
    if name == entry or name.endswith(f".{entry}"):
        return True
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise ValueError(f"lora.targets: {entry!r} is no regular expression: {error}") from error


def _fits_pattern(entry: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is meant for a module (PEFT's rule)."""
    return re.match(rf"(.*\.)?({entry})$", name) is not None


def _shapes(tree: Any, spec: Spec) -> dict[Path, tuple[int, ...]]:
    """The leaves of the trainable tree beside a base or its declaration."""
    leaves = flat(tree)
    shapes = {}
    for target in targets(tree, spec):
        layers, n_in, n_out = leaves[*target.path, "kernel"].shape
        shapes[*target.path, "lora_a"] = (layers, n_in, max(target.ranks))
        shapes[*target.path, "lora_b"] = (layers, max(target.ranks), n_out)
    whole = saved(tree, spec)
    return shapes | {path: tuple(leaf.shape) for path, leaf in leaves.items() if path[:-1] in whole}


def flat(tree: Any) -> dict[Path, Any]:
    """A nested dict as {path: leaf}; whatever is no dict is a leaf, a quantised weight too."""
    leaves: dict[Path, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= {(key, *path): leaf for path, leaf in flat(value).items()}
        else:
            leaves[key,] = value
    return leaves


def nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
