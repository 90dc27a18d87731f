"""One train step: scan over micro-batches, clip, finite guard, update. Knows no algorithm, no logging, no I/O."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxalign import metrics as metrics_lib
from jaxalign import sharding
from jaxalign.metrics import Max, Mean, Metrics, Min


class TrainState(NamedTuple):
    """What a step changes and a checkpoint keeps.

    step: int32, batches consumed. params: the trainable tree. opt_state: the optimizer's. aux: `halted` (bool) and
    `skipped` (int32) of the finite guard; a moving reference and running means stand here too.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    aux: dict[str, Any]


class Objective(Protocol):
    """What `make_train_step` asks of an objective (see `objectives`)."""

    @property
    def couples(self) -> bool: ...

    def group(self, batch: Any) -> int: ...

    def denominators(self, batch: Any) -> dict[str, jax.Array]: ...

    def first_pass(self, params: Any, frozen: Any, batch: Any) -> dict[str, jax.Array]: ...

    def couple(self, batch: Any) -> dict[str, jax.Array]: ...

    def next_aux(self, aux: Mapping[str, Any], metrics: Metrics) -> dict[str, jax.Array]: ...

    def __call__(self, params: Any, frozen: Any, batch: Any, aux: Any, key: Any) -> tuple[jax.Array, Metrics]: ...


Step = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]


def init_state(params: Any, tx: optax.GradientTransformation, **aux: Any) -> TrainState:
    """The state before the first step. Jit it with out_shardings to place the optimizer's state."""
    guard = {"halted": jnp.zeros((), bool), "skipped": jnp.zeros((), jnp.int32)}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), {**guard, **aux})


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = 1.0,
    nonfinite: str = "stop",
    schedule: optax.Schedule | None = None,
    dropout_seed: int | None = None,
) -> Step:
    """A function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients of the micro-batches are summed in float32 over the whole batch's denominators, so any
    `gradient_accumulation_steps` gives the same update. If the loss or the gradient's norm is not finite, on whatever
    device, nothing is updated: under "stop" every later step is a no-op too and `step` stays, until the host learns of
    it from the metric `halted`; under "skip" the batch is counted in `aux["skipped"]` and passed over.

    Args:
      objective: see `objectives`.
      tx: the optimizer, without clipping.
      gradient_accumulation_steps: micro-batches a batch is split into, whole examples each.
      max_grad_norm: the gradient is scaled down to this global L2 norm; None leaves it.
      nonfinite: "stop" or "skip".
      schedule: the optimizer's, for the metric `learning_rate`; updates count, not skipped steps.
      dropout_seed: gives the batch the leaf `dropout_keys` (see `dropout_keys`); None: nothing is dropped.
    """
    if nonfinite not in ("stop", "skip"):
        raise ValueError(f"nonfinite is {nonfinite!r}, expected 'stop' or 'skip'")
    gradients_of = make_gradients(objective, gradient_accumulation_steps=gradient_accumulation_steps)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        if dropout_seed is not None:
            batch = {**batch, "dropout_keys": dropout_keys(dropout_seed, state.step, batch["tokens"].shape[0])}
        loss, metrics, gradients = gradients_of(state.params, frozen, batch, state.aux)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        # As torch's clip_grad_norm_: its 1e-6 in the denominator is part of the published numbers.
        scale = 1.0 if max_grad_norm is None else jnp.minimum(1.0, max_grad_norm / (grad_norm + 1e-6))

        def update(gradients: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
            gradients = jax.tree.map(lambda g: g * scale, gradients)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        go = finite & ~state.aux["halted"]
        # A branch and not a choice between results: a choice keeps old and new state side by side, half of a small
        # model's memory (2.4 against 1.8 GB of temporaries for SmolLM2 at 1,024 tokens).
        params, opt_state = jax.lax.cond(
            go, update, lambda _, opt_state, params: (params, opt_state), gradients, state.opt_state, state.params
        )
        stop = nonfinite == "stop"
        learnt = objective.next_aux(state.aux, metrics)
        aux = {
            **state.aux,
            **{name: jnp.where(go, x, state.aux[name]) for name, x in learnt.items()},
            "halted": state.aux["halted"] | (~finite & stop),
            "skipped": state.aux["skipped"] + (~finite).astype(jnp.int32) * (not stop),
        }
        one = jnp.ones((), jnp.float32)
        metrics = {
            **metrics,
            "loss": Mean(loss, one),
            "grad_norm": Mean(grad_norm, one),
            "num_tokens": Mean(batch["lengths"].sum().astype(jnp.float32), one),
            "halted": Mean(aux["halted"].astype(jnp.float32), one),
            "skipped": Mean(aux["skipped"].astype(jnp.float32), one),
        }
        if schedule is not None:
            rate = schedule(state.step - state.aux["skipped"])
            metrics["learning_rate"] = Mean(jnp.asarray(rate, jnp.float32), one)
        return TrainState(state.step + (go | (not stop)).astype(jnp.int32), params, opt_state, aux), metrics

    return step


def make_gradients(
    objective: Objective, *, gradient_accumulation_steps: int = 1
) -> Callable[[Any, Any, Any, Any], tuple[jax.Array, Metrics, Any]]:
    """A function (params, frozen, batch, aux) -> (loss, metrics, gradients in float32) of a whole global batch."""
    value_and_grad = jax.value_and_grad(objective, has_aux=True)

    def gradients_of(params: Any, frozen: Any, batch: Any, aux: Any) -> tuple[jax.Array, Metrics, Any]:
        denominators = objective.denominators(batch)

        def micro_step(micro: Any) -> tuple[jax.Array, Metrics, Any]:
            (loss, metrics), gradients = value_and_grad(
                params, frozen, {**micro, "denominators": denominators}, aux, None
            )
            return loss, metrics, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

        if gradient_accumulation_steps == 1:
            return micro_step(batch)
        n, size = gradient_accumulation_steps, objective.group(batch)
        micros = split_batch(batch, n, size)
        if objective.couples:  # score all rows first, then tell each micro-batch what it must know of the others
            found = jax.lax.map(lambda micro: objective.first_pass(params, frozen, micro), micros)
            found = {name: join_batch(x, size) for name, x in found.items()}
            micros |= split_batch(objective.couple({**batch, **found}), n, size)

        def body(total: Any, micro: Any) -> tuple[Any, None]:
            loss, metrics, gradients = micro_step(micro)
            gradients = jax.tree.map(jnp.add, total[2], gradients)
            return (total[0] + loss, metrics_lib.merge(total[1], metrics), gradients), None

        loss, metrics, gradients = jax.eval_shape(micro_step, jax.tree.map(lambda x: x[0], micros))
        nothing = {name: _nothing(metric) for name, metric in metrics.items()}
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradients))
        total, _ = jax.lax.scan(body, (zeros[0], nothing, zeros[1]), micros)
        return total

    return gradients_of


def dropout_keys(seed: int, step: jax.Array | int, rows: int) -> jax.Array:
    """A key for each row of a global batch, [R]: what a row drops depends on the seed, the step and its place alone."""
    of_step = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(of_step, jnp.arange(rows))


def _nothing(metric: Mean | Min | Max) -> Mean | Min | Max:
    """The metric of no data, where a sum over micro-batches starts."""
    if isinstance(metric, Mean):
        return Mean(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return type(metric)(jnp.full((), jnp.inf if isinstance(metric, Min) else -jnp.inf, jnp.float32))


def split_batch(batch: Mapping[str, jax.Array], n: int, rows_per_example: int) -> dict[str, jax.Array]:
    """Every leaf [R, ...] as [n, R / n, ...], whole examples (of `rows_per_example` neighbouring rows) together.

    Micro-batch i takes every n-th example, so that each device splits its own rows and nothing travels.

    Raises:
      ValueError: the examples do not divide by n.
    """

    def split(x: jax.Array) -> jax.Array:
        examples = x.shape[0] // rows_per_example
        if examples % n:
            raise ValueError(f"a batch of {examples} examples does not split into {n} micro-batches")
        x = x.reshape(examples // n, n, rows_per_example, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(n, examples // n * rows_per_example, *x.shape[3:])
        return sharding.constrain(x, None, sharding.ROWS, *(None,) * (x.ndim - 2))

    return jax.tree.map(split, dict(batch))


def join_batch(x: jax.Array, rows_per_example: int) -> jax.Array:
    """The inverse of `split_batch` for one leaf: [n, R / n, ...] -> [R, ...] in the batch's order."""
    n, rows, *rest = x.shape
    x = x.reshape(n, rows // rows_per_example, rows_per_example, *rest).swapaxes(0, 1)
    return sharding.constrain(x.reshape(n * rows, *rest), sharding.ROWS, *(None,) * len(rest))
