"""Reward models: losses by formula, TRL's numbers through our own model, and several attributes with a head each."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FIRST_FAMILY, GOLDEN, GRADIENT_NORM, LOSS, REWARD, case, packed, positions
from programs import hf_norms

from jaxalign import hf, logprobs, losses, metrics, models, objectives, sharding, step
from jaxalign.losses import reward
from jaxalign.objectives import batches

CASES = ("reward_bt", "reward_margin", "reward_center")
ROWS, TIME = 12, 68  # of every golden case


# The losses


@pytest.mark.parametrize("center", [0.0, 0.03])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_equals_its_formula(center, with_margin):
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.normal(0, 2, (3, 9)).astype(np.float32)
    got = losses.bradley_terry(chosen, rejected, margin if with_margin else None, center_rewards_coefficient=center)
    want = [
        math.log1p(math.exp(-(c - r - (m if with_margin else 0)))) + center * (c + r) ** 2
        for c, r, m in np.float64([chosen, rejected, margin]).T
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    low = losses.bradley_terry(jnp.bfloat16(chosen), jnp.bfloat16(rejected), center_rewards_coefficient=center)
    assert low.dtype == jnp.float32
    far = losses.bradley_terry(np.float32([1e4, -1e4]), np.float32([-1e4, 1e4]))
    np.testing.assert_allclose(far, [0, 2e4])


def test_attributes_that_were_not_scored_have_no_error_and_no_gradient():
    values, scores = np.float32([[1, 2, 3], [4, 5, 6]]), np.float32([[2, np.nan, 3], [np.nan, 5.5, 4]])
    np.testing.assert_allclose(losses.attributes(values, scores), [[1, 0, 0], [0, 0.25, 4]])
    gradient = jax.grad(lambda v: losses.attributes(v, scores).sum())(values)
    np.testing.assert_allclose(gradient, [[-2, 0, 0], [0, -1, 4]])


def test_a_reward_is_the_weighted_sum_of_its_attributes():
    values = np.float32([[4, 3, 2], [4, 3, 5]])
    np.testing.assert_allclose(reward.compose(values, (1.0, 0.5, -2.0)), [1.5, -4.5])  # the third is harmfulness
    np.testing.assert_allclose(reward.compose(values, None), [3, 4])


# The objectives: TRL's numbers


@functools.cache
def reward_model(family):
    return hf.load(GOLDEN / "models" / family / "reward", head="score")


@functools.cache
def hidden_and_pullback(cfg):
    """(params, batch, cotangent) -> (hidden states, gradients): one program for all losses of a model."""

    def both(params, batch, cotangent):
        hidden, pullback = jax.vjp(lambda params: HIDDEN(cfg, params, batch), params)
        return hidden, pullback(cotangent)[0]

    return jax.jit(both)


HIDDEN = logprobs.hidden


def in_two_programs(objective, params, batch, monkeypatch):
    """(loss, metrics, gradients, examples): the decoder's program apart from the loss, which needs no compilation."""
    decoder = {name: batch[name] for name in ("tokens", "positions")}
    both = functools.partial(hidden_and_pullback(objective.cfg), params, decoder)
    nothing = np.zeros((*batch["tokens"].shape, objective.cfg.hidden_size), np.float32)
    hidden, _ = both(nothing)

    with monkeypatch.context() as patch:
        patch.setattr(logprobs, "hidden", lambda cfg, params, batch: hidden + params["moved"])
        probe = {"score": params["score"], "moved": nothing}
        (loss, found), gradients = jax.value_and_grad(objective, has_aux=True)(probe, None, batch, {}, None)
        examples = objective.examples(probe, None, batch)
    gradients = {**both(gradients["moved"])[1], "score": gradients["score"]}
    return jax.device_get((loss, found, gradients, examples))


def golden_batch(family, name):
    golden, a = case(family, name)
    order = np.arange(ROWS).reshape(2, -1).T.reshape(-1)
    tokens, attended = (a[f"in.{x}"][order] for x in ("input_ids", "attention_mask"))
    pad = [(0, 0), (0, TIME - tokens.shape[1])]
    tokens, lengths = np.pad(tokens, pad), attended.sum(axis=1).astype(np.int32)
    batch = {"tokens": tokens, "positions": positions(tokens), "mask": np.pad(attended, pad).astype(bool)}
    batch |= {"lengths": lengths, "ends": lengths[:, None] - 1}
    if "in.margin" in a:
        batch["margin"] = np.repeat(a["in.margin"], 2)[:, None]
    return golden, a, batch


def objective_of(cfg, golden):
    return objectives.make(
        cfg, "reward", center_rewards_coefficient=golden["effective_config"]["center_rewards_coefficient"]
    )


@pytest.mark.parametrize("family", FIRST_FAMILY)
@pytest.mark.parametrize("name", CASES)
def test_loss_metrics_and_gradients_equal_trl(name, family, monkeypatch):
    golden, a, batch = golden_batch(family, name)
    cfg, params = reward_model(family)
    objective = objective_of(cfg, golden)
    loss, found, gradients, examples = in_two_programs(objective, params, batch, monkeypatch)
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    np.testing.assert_allclose(objective.total(examples), golden["loss"], **LOSS)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(examples[f"rewards/{side}"], a[f"out.rewards.{side}"], **REWARD)
    values = metrics.reduce(found)
    for key, want in golden["metrics"].items():
        if key != "num_tokens":  # counted by the step
            np.testing.assert_allclose(values[key], want, **REWARD, err_msg=key)
    assert len(values) == len(golden["metrics"]) - 1
    norms = hf_norms(gradients, cfg)
    norms["score.weight"] = float(np.linalg.norm(gradients["score"]["kernel"]))
    for key, want in golden["grad_norms"].items():
        np.testing.assert_allclose(norms[key], want, **GRADIENT_NORM, err_msg=key)
    want = a["out.grad.model.norm.weight"]
    np.testing.assert_allclose(gradients["norm"]["scale"], want, atol=2e-4 * np.abs(want).max(), rtol=0)


# On a model whose hidden state is a row of a table: what may not matter

VOCAB, HEADS = 7, 3


def table_cfg(heads):
    return dataclasses.replace(reward_model("llama")[0], num_labels=heads)


@pytest.fixture
def of_table(monkeypatch):
    """Weights of a model whose hidden state counts, token by token, what it has seen of its sequence."""

    def hidden(cfg, params, batch):
        seen = jnp.cumsum(params["table"][batch["tokens"]], axis=1)
        if "segment_ids" in batch:
            before = jax.lax.cummax(jnp.where(batches.follows(batch), -1, jnp.arange(seen.shape[1]) - 1), axis=1)[
                ..., None
            ]
            seen -= jnp.where(before >= 0, jnp.take_along_axis(seen, jnp.maximum(before, 0), axis=1), 0)
        return jnp.tanh(seen)

    monkeypatch.setattr(logprobs, "hidden", hidden)
    rng = np.random.default_rng(3)
    return lambda heads: {
        "table": jnp.asarray(rng.normal(0, 0.3, (VOCAB, 4)), jnp.float32),
        "score": {"kernel": jnp.asarray(rng.normal(0, 1, (4, heads)), jnp.float32)},
    }


def random_batch(kind, examples=6, seed=0):
    rng, width = np.random.default_rng(seed), batches.WIDTHS[kind]
    rows, time = examples * width, 9
    lengths = rng.integers(3, time + 1, rows).astype(np.int32)
    tokens = np.where(np.arange(time) < lengths[:, None], rng.integers(0, VOCAB, (rows, time)), 0).astype(np.int32)
    each = lambda x: np.repeat(np.asarray(x, np.float32), width, axis=0)[:, None]  # noqa: E731
    batch = {"tokens": tokens, "positions": positions(tokens), "lengths": lengths, "ends": lengths[:, None] - 1}
    batch |= {"mask": np.arange(time) < lengths[:, None], "weight": each(rng.uniform(0.2, 2, examples))}
    if kind == "pairs":
        return batch | {"margin": each(rng.uniform(0, 1, examples))}
    scores = rng.uniform(1, 5, (examples, HEADS))
    return batch | {"scores": each(np.where(rng.random(scores.shape) < 0.3, np.nan, scores))}


def by_hand(name, params, batch, options):
    """The loss of a whole unpacked batch in float64, from the rewards."""
    table, kernel = np.float64(params["table"]), np.float64(params["score"]["kernel"])
    last = [np.tanh(table[t[:n]].sum(axis=0)) @ kernel for t, n in zip(batch["tokens"], batch["lengths"], strict=True)]
    if name == "attributes":
        errors = (np.array(last) - batch["scores"][:, 0]) ** 2
        weights = np.where(np.isnan(errors), 0, batch["weight"])
        return (weights * np.nan_to_num(errors)).sum() / weights.sum()
    pairs = np.array(last).reshape(-1, 2)
    margin, weight = batch["margin"][::2, 0], np.float64(batch["weight"][::2, 0])
    values = (
        np.log1p(np.exp(-(pairs[:, 0] - pairs[:, 1] - margin)))
        + options["center_rewards_coefficient"] * pairs.sum(1) ** 2
    )
    return (weight * values).sum() / weight.sum()


KINDS = [
    ("reward", "pairs", 1, {"center_rewards_coefficient": 0.1}),
    ("attributes", "scored", HEADS, {"reward_weights": (1.0, 0.5, -2.0)}),
]


def gradients_of(objective, params, batch, accumulation=1):
    found = jax.jit(step.make_gradients(objective, gradient_accumulation_steps=accumulation))
    return jax.device_get(found(params, None, batch, {}))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for ours, theirs in zip(*(jax.tree.leaves(x[2]) for x in (got, want)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(np.abs(theirs).max(), 1))
    assert metrics.reduce(got[1]) == pytest.approx(metrics.reduce(want[1]), rel=1e-5)


@pytest.mark.parametrize(("name", "kind", "heads", "options"), KINDS, ids=[k[0] for k in KINDS])
def test_splits_fillers_and_packing_change_nothing(name, kind, heads, options, of_table):
    params, batch = of_table(heads), random_batch(kind)
    objective = objectives.make(table_cfg(heads), name, **options)
    assert objective.kind == kind and objective.head == "score" and not objective.couples
    want = gradients_of(objective, params, batch)
    np.testing.assert_allclose(want[0], by_hand(name, params, batch, options), rtol=1e-5)
    rows = packed({n: x for n, x in batch.items() if n != "ends"}, objective.width)  # the last one is of fillers
    assert_same(gradients_of(objective, params, rows, accumulation=2), want)
    ours, theirs = (jax.device_get(jax.jit(objective.examples)(params, None, x)) for x in (rows, batch))
    assert ours["valid"].tolist() == [True] * 6 + [False] * 2
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key][:6], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert objective.total(theirs) == pytest.approx(float(want[0]), rel=1e-6)


def test_the_composed_reward_and_missing_scores_are_in_what_is_logged(of_table):
    _, kind, heads, options = KINDS[1]
    params, batch = of_table(heads), random_batch(kind)
    objective = objectives.make(table_cfg(heads), "attributes", **options)
    examples = jax.device_get(objective.examples(params, None, batch))
    np.testing.assert_allclose(examples["rewards"], examples["values"] @ np.array([1.0, 0.5, -2.0]), rtol=1e-5)
    found = metrics.reduce(objective(params, None, batch, {}, None)[1])
    assert found["mean_reward"] == pytest.approx(examples["rewards"].mean(), rel=1e-5)
    assert found["max_reward"] == pytest.approx(examples["rewards"].max(), rel=1e-5)
    assert all(map(math.isfinite, found.values()))
    # Nothing at all was scored: no loss, no gradient, no NaN.
    loss, _, gradients = gradients_of(objective, params, {**batch, "scores": np.full_like(batch["scores"], np.nan)})
    assert loss == 0 and not any(x.any() for x in jax.tree.leaves(gradients))


def test_scores_are_what_the_heads_say_of_the_last_token(of_table):
    batch = random_batch("pairs")
    batch["ends"][3] = -1
    for heads in (1, HEADS):
        params = of_table(heads)
        table, kernel = params["table"], params["score"]["kernel"]
        want = np.stack(
            [np.tanh(table[t[:n]].sum(axis=0)) @ kernel for t, n in zip(batch["tokens"], batch["lengths"], strict=True)]
        )
        want[3] = 0
        got = objectives.score(table_cfg(heads), params, batch)
        np.testing.assert_allclose(got, want[:, None, :] if heads > 1 else want, rtol=1e-5, atol=1e-6)


def test_numbers_that_do_not_fit_are_refused():
    for heads, name, options, message in (
        (1, "reward", {"center_rewards_coefficient": -0.1}, "center_rewards_coefficient is -0.1"),
        (2, "reward", {}, "one score, the model has 2: use the loss attributes"),
        (2, "attributes", {"reward_weights": (1.0, 2.0, 3.0)}, "3 numbers .1.0, 2.0, 3.0., the model 2 score heads"),
        (1, "reward", {"reward_weights": (1.0,)}, "not .'reward_weights'."),
        (1, {"reward": 1.0, "sft": 0.1}, {}, "'reward' is no term of a sum"),
    ):
        with pytest.raises(ValueError, match=message):
            objectives.make(table_cfg(heads), name, **options)


@pytest.mark.slow
def test_devices_change_nothing_of_a_model():
    golden, _, batch = golden_batch("llama", "reward_margin")
    cfg, params = reward_model("llama")
    batch = {n: np.concatenate([x, x[:4]]) for n, x in batch.items()}  # 8 pairs
    objective = objective_of(cfg, golden)
    want = gradients_of(objective, params, batch)
    for layout, accumulation in (({"fsdp": 4, "sequence": 2}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)):
        mesh = sharding.make_mesh(**layout)
        with sharding.use_mesh(mesh):
            placed = sharding.place_batch(mesh, batch, len(batch["tokens"]))
            weights = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
            got = gradients_of(objective, weights, placed, accumulation)
        np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
        for ours, theirs in zip(*(jax.tree.leaves(x[2]) for x in (got, want)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_in_bfloat16_the_loss_stays_near_and_packed_rows_of_a_model_give_its_scores():
    golden, _, batch = golden_batch("llama", "reward_margin")
    cfg, params = reward_model("llama")
    low = dataclasses.replace(cfg, compute_dtype="bfloat16")
    loss, _, gradients = gradients_of(objective_of(low, golden), params, batch)
    assert loss.dtype == np.float32 and float(loss) == pytest.approx(golden["loss"], rel=0.03)
    assert {x.dtype.name for x in jax.tree.leaves(gradients)} == {"float32"}
    want = np.asarray(objectives.score(cfg, params, batch)).reshape(-1)
    rows = packed({n: x for n, x in batch.items() if n != "ends"}, 2)
    got = np.asarray(objectives.score(cfg, params, rows)).reshape(-1)
    np.testing.assert_allclose(got, [*want, 0, 0, 0, 0], rtol=0, atol=1e-5)
