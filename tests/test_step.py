"""One step: the same update for any mesh, split, padding and device order; guarded; and donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import LAYOUTS, case, model, pair_batch

from jaxalign import metrics, models, objectives, optim, reference, sharding, step

PAIRS = 8  # 16 rows, for 8 devices


@functools.cache
def batch():
    """A golden batch with 8 pairs and ref_logps, on the host."""
    rows = pair_batch(case("llama", "dpo_sigmoid")[1])
    rows = {name: np.concatenate([x, x[:4]]) for name, x in rows.items()}
    rows = {name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, -x.shape[1] % 4))) for name, x in rows.items()}
    cfg, params = model("llama", "ref")
    return {**rows, "ref_logps": np.asarray(jax.jit(reference.make_score(cfg))(params, rows))}


OBJECTIVE = {"sigmoid": 1.0, "sft": 0.5}  # two terms with different denominators


def gradients(rows, *, layout=None, devices=None, accumulation=1):
    """(loss, gradients) on the host."""
    cfg, params = model("llama")
    objective = objectives.pairwise(cfg, OBJECTIVE, beta=0.1)
    mesh = sharding.make_mesh(**layout, devices=devices) if layout else None
    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        placed = sharding.place_batch(mesh, rows, len(rows["tokens"]))
        both = step.make_gradients(objective, gradient_accumulation_steps=accumulation)
        loss, _, gradient = jax.jit(both)(params, None, placed, {})
    return jax.device_get((loss, gradient))


@functools.cache
def expected():
    return gradients(batch())


def assert_same(got):
    loss, gradient = got
    want_loss, want_gradient = expected()
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    for g, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(g, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(
    "layout", [*(pytest.param(x, marks=pytest.mark.slow) for x in LAYOUTS[:3]), *LAYOUTS[3:]], ids=str
)
def test_every_layout_gives_the_loss_and_gradients_of_one_device(layout):
    assert_same(gradients(batch(), layout=layout))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing(accumulation):
    assert_same(gradients(batch(), accumulation=accumulation))


def test_accumulation_on_a_mesh_changes_nothing():
    assert_same(gradients(batch(), layout={"data": 2, "fsdp": 2, "tensor": 2}, accumulation=2))


def test_more_padding_changes_nothing():
    wider = {name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 28))) for name, x in batch().items()}
    filler = {name: np.zeros_like(x[:4]) for name, x in wider.items()}
    assert_same(gradients({name: np.concatenate([x, filler[name]]) for name, x in wider.items()}))


def test_the_order_of_devices_changes_nothing():
    order = [3, 6, 0, 5, 1, 7, 2, 4]
    devices = [jax.devices()[i] for i in order]
    assert_same(gradients(batch(), layout={"fsdp": 4, "tensor": 2}, devices=devices))


def test_pairs_in_another_order_change_nothing():
    order = np.array([5, 0, 7, 2, 1, 6, 3, 4])
    rows = np.stack([2 * order, 2 * order + 1], axis=1).reshape(-1)
    assert_same(gradients({name: x[rows] for name, x in batch().items()}))


def test_split_and_join_are_inverse_and_keep_pairs_together():
    rows = np.arange(24)
    micros = step.split_batch({"rows": jnp.asarray(rows)}, 3, 2)["rows"]
    assert micros.shape == (3, 8)
    assert all(a % 2 == 0 and b == a + 1 for micro in np.asarray(micros) for a, b in micro.reshape(-1, 2))
    np.testing.assert_array_equal(step.join_batch(micros[..., None], 2)[:, 0], rows)
    with pytest.raises(ValueError, match="12 examples does not split into 5"):
        step.split_batch({"rows": jnp.asarray(rows)}, 5, 2)


# The guard, on an objective that is a formula


class Line:
    """Loss = mean of w * x over the batch."""

    couples = False

    def group(self, rows):
        return 1

    def denominators(self, rows):
        return {"rows": jnp.float32(rows["x"].shape[0])}

    def next_aux(self, aux, metrics):
        return {}

    def __call__(self, params, frozen, rows, aux, key):
        denominator = rows["denominators"]["rows"]
        return (params["kernel"] * rows["x"]).sum() / denominator, {"x": metrics.Mean(rows["x"].sum(), denominator)}


def line_step(**options):
    tx = optim.make_optimizer("sgd", schedule=optax.constant_schedule(0.5))
    state = step.init_state({"kernel": jnp.float32(1.0)}, tx)
    return jax.jit(step.make_train_step(Line(), tx, **options), donate_argnums=0), state


def rows_of(*x):
    return {"x": jnp.array(x, jnp.float32), "lengths": jnp.ones(len(x), jnp.int32)}


def test_clipping_scales_to_the_global_norm_and_reports_the_norm_before():
    train_step, state = line_step(max_grad_norm=1.0)
    state, found = train_step(state, None, rows_of(4.0, 4.0))
    assert metrics.reduce(found)["grad_norm"] == 4.0
    np.testing.assert_allclose(state.params["kernel"], 1 - 0.5, rtol=1e-6)
    train_step, state = line_step(max_grad_norm=None)
    np.testing.assert_allclose(train_step(state, None, rows_of(4.0, 4.0))[0].params["kernel"], 1 - 0.5 * 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_stop_leaves_the_state_as_it_was_and_every_later_step_too(bad):
    train_step, state = line_step(nonfinite="stop", gradient_accumulation_steps=2)
    state, _ = train_step(state, None, rows_of(1.0, 1.0))
    before = float(state.params["kernel"])
    for x in (bad, 1.0):
        state, found = train_step(state, None, rows_of(1.0, x))
        assert metrics.reduce(found)["halted"] == 1
        assert float(state.params["kernel"]) == before and int(state.step) == 1


def test_skip_passes_over_the_batch_and_counts_it():
    train_step, state = line_step(nonfinite="skip", max_grad_norm=None)
    for x in (1.0, np.nan, 1.0):
        state, found = train_step(state, None, rows_of(x))
    assert float(state.params["kernel"]) == 0.0 and int(state.step) == 3
    assert metrics.reduce(found)["skipped"] == 1 and metrics.reduce(found)["halted"] == 0


def test_a_nan_on_one_device_of_a_mesh_stops_all():
    mesh = sharding.make_mesh(data=8)
    train_step, state = line_step(nonfinite="stop")
    with sharding.use_mesh(mesh):
        x = np.ones(8, np.float32)
        x[5] = np.nan
        rows = sharding.place_batch(mesh, {"x": x, "lengths": np.ones(8, np.int32)}, 8)
        state, found = train_step(jax.device_put(state, sharding.replicated(mesh)), None, rows)
    assert metrics.reduce(found)["halted"] == 1 and float(state.params["kernel"]) == 1.0


def test_metrics_of_micro_batches_are_merged():
    train_step, state = line_step(gradient_accumulation_steps=4)
    _, found = train_step(state, None, rows_of(1.0, 2.0, 3.0, 6.0))
    values = metrics.reduce(found)
    assert values["loss"] == 3.0 and values["num_tokens"] == 4


def test_the_state_is_donated():
    train_step, state = line_step()
    held = state.params["kernel"]
    train_step(state, None, rows_of(1.0))
    assert held.is_deleted()


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="'ignore'.*'stop' or 'skip'"):
        line_step(nonfinite="ignore")
