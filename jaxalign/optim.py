"""Learning-rate schedules, optimizers on stacked layers, and where an optimizer's state lives on a mesh.

Every optimizer is optax's and is the same chain: a direction, decoupled weight decay, the learning rate. Clipping
belongs to the step, which looks at the gradient before it reaches the optimizer.

Layers are stacked on axis 0 of the leaves under `layers`. Most optimizers look at single numbers and can't tell. Those
that look at a whole matrix (adafactor's row and column statistics and its clipping, lamb's norms, muon's
orthogonalisation) are told, so that the update is the one of separate layers.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

DECAYED = {"kernel": True, "embedding": True, "lora_a": True, "lora_b": True, "bias": False, "scale": False}
"""Whether weight decay pulls a leaf to 0, by the leaf's own name: never by its rank, which stacking changes."""

Transform: TypeAlias = optax.GradientTransformation

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    steps: int,
    warmup_steps: int = 0,
    warmup_ratio: float | None = None,
    final_ratio: float = 0.0,
) -> optax.Schedule:
    """The learning rate of the update number `count` (0 is the first), with the values of transformers' schedules.

    It climbs from 0 at count 0 to `learning_rate` at count `warmup_steps`; then it stays there (constant), or falls in
    a straight line (linear) or half a cosine (cosine) to `final_ratio * learning_rate` at count `steps` and stays.

    Args:
      name: one of SCHEDULES.
      learning_rate: the highest value, above 0.
      steps: updates of the whole run.
      warmup_steps: updates below the highest value; the first of them changes nothing.
      warmup_ratio: the same as a share of `steps`, rounded up; give one or the other.
      final_ratio: share of the highest value that is left at the end, in [0, 1]; constant has none.

    Returns:
      A function of an integer, of Python's or traced, to a float32 scalar.

    Raises:
      ValueError: a name or number that makes no schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; there are: {', '.join(SCHEDULES)}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate is {learning_rate}, expected a finite number above 0")
    if warmup_ratio is not None:
        if warmup_steps:
            raise ValueError(f"warmup_steps={warmup_steps} and warmup_ratio={warmup_ratio} are both set; keep one")
        if not 0 <= warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {warmup_ratio}, expected a share of the run in [0, 1]")
        warmup_steps = math.ceil(steps * warmup_ratio)
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, expected 0 to steps={steps}")
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio is {final_ratio}, expected a share of the learning rate in [0, 1]")
    if name == "constant" and final_ratio:
        raise ValueError(f"final_ratio={final_ratio} has no effect on a constant schedule; use linear or cosine")

    falling = max(1, steps - warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, final_ratio * learning_rate, falling),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, falling, alpha=final_ratio),
    }[name]()
    if warmup_steps:
        after = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])
    return lambda count: jnp.asarray(after(count), jnp.float32)


def decay_mask(params: Any) -> Any:
    """A tree of bools as `params`: True where weight decay applies, by the leaf's name alone.

    Raises:
      ValueError: a leaf's name is not in DECAYED.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: DECAYED[_leaf_name(path)], params)


def make_optimizer(
    name: str,
    *,
    schedule: optax.Schedule,
    weight_decay: float = 0.0,
    b1: float | None = None,
    b2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    moments_dtype: DTypeLike | None = None,
) -> Transform:
    """An optimizer of OPTIMIZERS for a parameter tree whose `layers` are stacked.

    The update is `-schedule(count) * (direction(gradient) + weight_decay * parameter)`, the decay on kernels and
    embeddings alone (DECAYED). None takes the optimizer's own default, shown by `options(name)`.

    Args:
      name: one of OPTIMIZERS.
      schedule: learning rate of the update `count`, from 0 (`make_schedule`).
      weight_decay: decoupled decay as in AdamW, multiplied by the learning rate; 0 is off.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to a denominator.
      momentum: decay rate of sgd's and muon's accumulated gradient.
      moments_dtype: dtype that the first moment (or momentum) is stored in; "bfloat16" halves it. The second moment
        stays in the parameter's dtype: with b2 near 1 its small changes would be lost to rounding.

    Returns:
      optax's pair of functions: `init(params)`, `update(gradients, state, params)`.

    Raises:
      ValueError: an unknown optimizer, an option that it hasn't got, or a number out of range.
    """
    defaults = options(name)
    given: dict[str, Any] = {"b1": b1, "b2": b2, "eps": eps, "momentum": momentum, "moments_dtype": moments_dtype}
    chosen = {option: value for option, value in given.items() if value is not None}
    for option, value in chosen.items():
        if option not in defaults:
            raise ValueError(
                f"{option}={value} has no effect on {name}, whose options are: {', '.join(defaults) or 'none'}"
            )
    for option in ("b1", "b2", "momentum"):
        if option in chosen and not 0 <= chosen[option] < 1:
            raise ValueError(f"{option} is {chosen[option]}, expected a decay rate in [0, 1)")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps is {eps}, expected a number from 0 up")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay is {weight_decay}, expected a finite number from 0 up")
    if weight_decay and name == "adam":
        raise ValueError(f"weight_decay={weight_decay} has no effect on adam; adamw is Adam with weight decay")
    if "moments_dtype" in chosen:
        chosen["moments_dtype"] = _float_dtype(moments_dtype)
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask) if weight_decay else optax.identity()
    return optax.chain(OPTIMIZERS[name](decay, **chosen), optax.scale_by_learning_rate(schedule))


def options(name: str) -> dict[str, Any]:
    """The options of make_optimizer that an optimizer has, with its own defaults.

    Raises:
      ValueError: an unknown optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; there are: {', '.join(sorted(OPTIMIZERS))}")
    parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def state_shardings(tx: Transform, params: Any) -> Any:
    """Where each leaf of `tx.init(params)` lives: a moment beside its parameter, all else on every device.

    A state leaf belongs to the parameter whose path ends its own path. When it has that parameter's shape too, it takes
    its sharding exactly; counts, and adafactor's statistics of rows and columns, are small and are replicated.

    Args:
      tx: an optimizer of make_optimizer, or any of optax whose state holds trees like the parameters.
      params: tree of arrays or `jax.ShapeDtypeStruct`, each with a NamedSharding, all of one mesh.

    Returns:
      A tree as `tx.init(params)` with a NamedSharding for each leaf; give it to jit as out_shardings.

    Raises:
      ValueError: a parameter without a NamedSharding.
    """
    owners = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf.sharding, NamedSharding):
            raise ValueError(f"parameter {_spell(path)} has sharding {leaf.sharding}, expected a NamedSharding")
        owners[_keys(path)] = leaf
    replicated = NamedSharding(next(iter(owners.values())).sharding.mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        keys = _keys(path)
        # The longest ending that names a parameter: `norm/scale` also ends the path of a norm inside the layers.
        owner = next((owners[keys[i:]] for i in range(len(keys)) if keys[i:] in owners), None)
        return owner.sharding if owner is not None and owner.shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def _per_layer(tx: Transform) -> Transform:
    """`tx` as if the layers were separate trees, for a transformation that looks at a leaf as a whole.

    Its state under "layers" keeps the parameters' full paths, by which state_shardings finds their owners.
    """

    def split(tree: Any) -> tuple[Any, Any]:
        return {"layers": tree["layers"]}, {key: value for key, value in tree.items() if key != "layers"}

    def init(params: Any) -> dict[str, Any]:
        layers, rest = split(params)
        return {"stacked": jax.vmap(tx.init)(layers), "rest": tx.init(rest)}

    def update(updates: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        layer_updates, rest_updates = split(updates)
        layers, rest = split(params)
        layer_updates, layer_state = jax.vmap(tx.update)(layer_updates, state["stacked"], layers)
        rest_updates, rest_state = tx.update(rest_updates, state["rest"], rest)
        return rest_updates | layer_updates, {"stacked": layer_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def _adam(
    decay: Transform, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, moments_dtype: DTypeLike | None = None
) -> Transform:
    """Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps, mu_dtype=moments_dtype), decay)


def _nadamw(
    decay: Transform, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, moments_dtype: DTypeLike | None = None
) -> Transform:
    """AdamW with Nesterov's momentum: Dozat 2016, https://openreview.net/pdf?id=OM0jvwB8jIp57ZJjtNEZ."""
    return optax.chain(optax.scale_by_adam(b1, b2, eps, mu_dtype=moments_dtype, nesterov=True), decay)


def _radam(decay: Transform, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Adam that waits for its second moment's variance: Liu et al. 2020, https://arxiv.org/abs/1908.03265."""
    return optax.chain(optax.scale_by_radam(b1, b2, eps), decay)


def _adagrad(decay: Transform, *, eps: float = 1e-7) -> Transform:
    """Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html."""
    return optax.chain(optax.scale_by_rss(eps=eps), decay)


def _rmsprop(decay: Transform, *, b2: float = 0.99, eps: float = 1e-8) -> Transform:
    """PyTorch's RMSprop, which the DPO paper trained with (eps outside the root, no momentum)."""
    return optax.chain(optax.scale_by_rms(b2, eps, eps_in_sqrt=False), decay)


def _lion(decay: Transform, *, b1: float = 0.9, b2: float = 0.99, moments_dtype: DTypeLike | None = None) -> Transform:
    """Chen et al. 2023, https://arxiv.org/abs/2302.06675; its learning rate is about a tenth of AdamW's."""
    return optax.chain(optax.scale_by_lion(b1, b2, mu_dtype=moments_dtype), decay)


def _sgd(decay: Transform, *, momentum: float = 0.0, moments_dtype: DTypeLike | None = None) -> Transform:
    """Gradient descent, with heavy-ball momentum when it is above 0."""
    if momentum == 0:
        if moments_dtype is not None:
            raise ValueError(f"moments_dtype={moments_dtype} has no effect on sgd with momentum 0; set momentum")
        return decay
    return optax.chain(optax.trace(momentum, accumulator_dtype=moments_dtype), decay)


def _adafactor(decay: Transform, *, eps: float = 1e-30) -> Transform:
    """Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235: Adam's second moment from row and column means.

    Without scaling by the parameter's size and without momentum, as transformers' trainers call it, so that a learning
    rate of AdamW's size fits. Matrices with a side under 128 keep a full second moment.
    """
    return optax.chain(
        _per_layer(optax.chain(optax.scale_by_factored_rms(epsilon=eps), optax.clip_by_block_rms(1.0))), decay
    )


def _lamb(
    decay: Transform, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, moments_dtype: DTypeLike | None = None
) -> Transform:
    """AdamW's direction times |parameter| / |direction| of each matrix: You et al. 2020, https://arxiv.org/abs/1904.00962."""
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moments_dtype)
    return optax.chain(adam, decay, _per_layer(optax.scale_by_trust_ratio()))


def _muon(
    decay: Transform,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    moments_dtype: DTypeLike | None = None,
) -> Transform:
    """Orthogonalised momentum for the layers' kernels; Adam for embeddings, heads, norms and biases.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; with the scale 0.2 sqrt(max(in, out)) of Liu et al.
    2025, https://arxiv.org/abs/2502.16982, section 2.2, so that one learning rate of AdamW's size serves both parts.
    """

    def scale(kernels: Any, _: Any) -> Any:
        return jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape[1:])) * u, kernels)

    def dimensions(kernels: Any) -> Any:
        # optax orthogonalises the two named axes and treats the one that is left, the layers, as a batch.
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), kernels)

    def labels(params: Any) -> Any:
        def label(path: tuple[Any, ...], _: Any) -> str:
            leaf = _leaf_name(path)
            return "muon" if _keys(path)[0] == "layers" and leaf == "kernel" else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    orthogonal = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum, eps=eps, mu_dtype=moments_dtype, weight_dimension_numbers=dimensions
        ),
        optax.stateless(scale),
    )
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=moments_dtype)
    return optax.chain(optax.partition({"muon": orthogonal, "adam": adam}, labels), decay)


OPTIMIZERS: dict[str, Callable[..., Transform]] = {
    "adafactor": _adafactor,
    "adagrad": _adagrad,
    "adam": _adam,
    "adamw": _adam,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
    "nadamw": _nadamw,
    "radam": _radam,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
}


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dict keys of a tree path; what lies between them (fields of optax's states) names no parameter."""
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _spell(path: tuple[Any, ...]) -> str:
    return "/".join(_keys(path))


def _leaf_name(path: tuple[Any, ...]) -> str:
    """The last key of a parameter's path, one of DECAYED."""
    leaf = _keys(path)[-1]
    if leaf not in DECAYED:
        raise ValueError(
            f"parameter {_spell(path)} ends in {leaf!r}, expected one of {', '.join(DECAYED)}; "
            "a new kind of leaf says in optim.DECAYED whether weight decay applies to it"
        )
    return leaf


def _float_dtype(dtype: DTypeLike | None) -> Any:
    """The named dtype, refused when it holds no real numbers."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"moments_dtype is {dtype!r}, expected a floating dtype such as 'float32' or 'bfloat16'")
    return found
