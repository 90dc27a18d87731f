"""Preference losses: by hand, against plain numpy and TRL, and as functions to batch, jit and differentiate."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FAMILIES, case
from jax.test_util import check_grads

from jaxalign.losses import LOSSES, Preference

LN2 = math.log(2)

# Every loss with its defaults and with each option away from its default, so that an ignored option fails.
VARIANTS = [
    ("sigmoid", {"beta": 0.1}),
    ("sigmoid", {"beta": 0.35, "label_smoothing": 0.2}),
    ("hinge", {"beta": 0.1}),
    ("hinge", {"beta": 0.02}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.4, "length_normalize": False}),
    ("robust", {"beta": 0.1}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1}),
    ("sigmoid_norm", {"beta": 0.1}),
    ("sigmoid_norm", {"beta": 5.0}),
]
each_variant = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}{x}" for k, x in v.items())
)


def pairs(n=7, seed=0):
    """Log-probs and lengths of n pairs as the losses take them: four positional arrays and the two counts."""
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.integers(1, 40, (2, n))
    policy = [-rng.uniform(0.5, 3, n) * k for k in (chosen, rejected)]
    logps = [*policy, *(x + rng.normal(0, 4, n) for x in policy)]
    return [np.asarray(x, np.float32) for x in logps], {"chosen_tokens": chosen, "rejected_tokens": rejected}


def bound(name, tokens, **options):
    """The loss with its keywords given: a function of the four log-probs."""
    loss = LOSSES[name]
    return partial(loss.function, **(tokens if loss.takes_tokens else {}), **options)


def oracle(name, logps, tokens, beta, label_smoothing=0.0, length_normalize=True):
    """The formulas in float64 numpy, one pair at a time."""

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    losses = []
    for pc, pr, rc, rr, nc, nr in zip(*logps, *tokens.values(), strict=True):
        c, r = float(pc) - float(rc), float(pr) - float(rr)
        up, down = log_sigmoid(beta * (c - r)), log_sigmoid(-beta * (c - r))
        averages = c / nc - r / nr
        losses.append(
            {
                "sigmoid": -(1 - label_smoothing) * up - label_smoothing * down,
                "hinge": max(0.0, 1 - beta * (c - r)),
                "ipo": ((averages if length_normalize else c - r) - 1 / (2 * beta)) ** 2,
                "robust": (-(1 - label_smoothing) * up + label_smoothing * down) / (1 - 2 * label_smoothing),
                "sigmoid_norm": -log_sigmoid(beta * averages),
            }[name]
        )
    return np.array(losses)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # c = -10 - -14 = 4 nats over 2 tokens, r = -9 - -6 = -3 nats over 3 tokens; d = 7, averages 2 and -1.
        ("sigmoid", {"beta": 1 / 7}, math.log(1 + math.exp(-1))),
        ("sigmoid", {"beta": 1 / 7, "label_smoothing": 0.25}, math.log(1 + math.exp(-1)) + 0.25),
        ("hinge", {"beta": 0.1}, 0.3),
        ("hinge", {"beta": 0.2}, 0.0),
        ("ipo", {"beta": 0.1}, 4.0),
        ("ipo", {"beta": 0.1, "length_normalize": False}, 4.0),
        ("ipo", {"beta": 0.25, "length_normalize": False}, 25.0),
        ("robust", {"beta": 1 / 7, "label_smoothing": 0.25}, math.log(1 + math.exp(-1)) - 0.5),
        ("sigmoid_norm", {"beta": 1 / 3}, math.log(1 + math.exp(-1))),
    ],
)
def test_equals_a_hand_computed_number(name, options, expected):
    logps = [jnp.array([x]) for x in (-10.0, -9.0, -14.0, -6.0)]
    tokens = {"chosen_tokens": jnp.array([2]), "rejected_tokens": jnp.array([3])}
    losses, logged = bound(name, tokens, **options)(*logps)
    np.testing.assert_allclose(losses, [expected], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(logged["rewards/chosen"], [4 * options["beta"]], rtol=1e-6)
    np.testing.assert_allclose(logged["rewards/rejected"], [-3 * options["beta"]], rtol=1e-6)


@each_variant
def test_equals_plain_numpy(name, options):
    logps, tokens = pairs(64)
    losses, _ = bound(name, tokens, **options)(*logps)
    assert losses.shape == (64,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, oracle(name, logps, tokens, **options), rtol=2e-5, atol=1e-6)


def test_variants_set_every_option_of_every_loss():
    for name, loss in LOSSES.items():
        assert set(loss.options) == {key for variant, options in VARIANTS if variant == name for key in options}


@each_variant
def test_batch_equals_single_pairs(name, options):
    logps, tokens = pairs(5)
    together, _ = bound(name, tokens, **options)(*logps)
    for i in range(5):
        alone, _ = bound(name, {k: v[i : i + 1] for k, v in tokens.items()}, **options)(*(x[i : i + 1] for x in logps))
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-6)


@each_variant
def test_weight_zero_on_a_filler_pair_equals_slicing_it_away(name, options):
    logps, tokens = pairs(4)
    filled = [np.append(x, np.float32(0)) for x in logps]
    filled_tokens = {k: np.append(v, 0) for k, v in tokens.items()}
    weights = np.array([1, 1, 1, 1, 0], np.float32)

    def with_filler(*logps):
        return jnp.sum(bound(name, filled_tokens, **options)(*logps)[0] * weights) / weights.sum()

    def sliced(*logps):
        return jnp.mean(bound(name, tokens, **options)(*logps)[0])

    value, gradients = jax.value_and_grad(with_filler, (0, 1))(*filled)
    expected, expected_gradients = jax.value_and_grad(sliced, (0, 1))(*logps)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[:4], want, rtol=1e-5, atol=1e-7)
        assert gradient[4] == 0


@each_variant
def test_gradient_equals_finite_differences(name, options):
    logps, tokens = pairs(6, seed=3)

    def losses(policy_chosen, policy_rejected):
        return bound(name, tokens, **options)(policy_chosen, policy_rejected, *logps[2:])[0]

    # d of these pairs is away from hinge's kink at 1 / beta.
    assert np.abs(1 - options["beta"] * (logps[0] - logps[2] - logps[1] + logps[3])).min() > 0.01
    check_grads(
        losses, tuple(map(jnp.asarray, logps[:2])), order=1, modes=("fwd", "rev"), eps=0.05, atol=0.05, rtol=0.03
    )


@each_variant
def test_no_gradient_reaches_the_reference(name, options):
    logps, tokens = pairs()
    gradients = jax.grad(lambda *x: bound(name, tokens, **options)(*x)[0].sum(), (0, 1, 2, 3))(*logps)
    assert all(np.any(g != 0) for g in gradients[:2]) and not any(np.any(g != 0) for g in gradients[2:])


@each_variant
@pytest.mark.parametrize("count", [0, 1, 4096])
def test_values_and_gradients_are_finite_at_extreme_log_probs_and_without_tokens(name, options, count):
    corners = np.array([(a, b) for a in (-1e4, 0, 1e4) for b in (-1e4, 0, 1e4)], np.float32)
    reference = [np.zeros(len(corners), np.float32)] * 2
    tokens = {"chosen_tokens": np.full(len(corners), count), "rejected_tokens": np.full(len(corners), count)}

    def total(policy_chosen, policy_rejected):
        losses, logged = bound(name, tokens, **options)(policy_chosen, policy_rejected, *reference)
        return losses.sum(), (losses, logged)

    gradients, (losses, logged) = jax.grad(total, (0, 1), has_aux=True)(*corners.T)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, losses, logged)))


@each_variant
def test_jit_equals_no_jit(name, options):
    logps, tokens = pairs()
    function = bound(name, tokens, **options)
    for compiled, eager in zip(
        jax.tree.leaves(jax.jit(function)(*logps)), jax.tree.leaves(function(*logps)), strict=True
    ):
        np.testing.assert_allclose(compiled, eager, rtol=2e-6, atol=1e-6)


def test_beta_may_be_a_traced_array():
    logps, _ = pairs()
    by_array = jax.jit(lambda beta: LOSSES["sigmoid"].function(*logps, beta=beta)[0])(jnp.float32(0.3))
    np.testing.assert_allclose(by_array, LOSSES["sigmoid"].function(*logps, beta=0.3)[0], rtol=1e-6)


def test_half_precision_log_probs_are_differenced_in_float32():
    logps = [jnp.asarray([x], jnp.bfloat16) for x in (-300.0, -200.0, -302.0, -201.0)]
    losses, logged = LOSSES["sigmoid"].function(*logps)
    assert losses.dtype == jnp.float32 and logged["rewards/chosen"].dtype == jnp.float32
    np.testing.assert_allclose(losses, [math.log(1 + math.exp(-0.1))], rtol=1e-6)


def test_label_smoothing_of_robust_is_unbiased_over_swapped_labels():
    (pc, pr, rc, rr), _ = pairs()
    clean = LOSSES["sigmoid"].function(pc, pr, rc, rr)[0]
    function = partial(LOSSES["robust"].function, label_smoothing=0.3)
    mean = 0.7 * function(pc, pr, rc, rr)[0] + 0.3 * function(pr, pc, rr, rc)[0]
    np.testing.assert_allclose(mean, clean, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {}, LN2),
        ("sigmoid", {"label_smoothing": 0.3}, LN2),
        ("robust", {"label_smoothing": 0.3}, LN2),
        ("sigmoid_norm", {"beta": 5.0}, LN2),
        ("hinge", {"beta": 0.7}, 1.0),
        ("ipo", {"beta": 0.1}, 25.0),
        ("ipo", {"beta": 0.5, "length_normalize": False}, 1.0),
    ],
)
def test_at_reference_is_the_loss_of_an_unmoved_policy(name, options, expected):
    assert LOSSES[name].at_reference(**options) == pytest.approx(expected, rel=1e-6)


def test_what_is_known_of_a_loss_is_read_from_its_signature():
    def loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, chosen_tokens, rejected_tokens, tau=0.5):
        return (policy_chosen - policy_rejected) * tau, {}

    preference = Preference(loss)
    assert preference.takes_tokens and preference.options == {"tau": 0.5}
    assert not LOSSES["hinge"].takes_tokens and LOSSES["ipo"].options == {"beta": 0.1, "length_normalize": True}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf")])
def test_beta_out_of_range_is_refused(name, beta):
    with pytest.raises(ValueError, match=f"beta is {beta}, expected"):
        LOSSES[name].at_reference(beta=beta)


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused(name, label_smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing is {label_smoothing}, expected"):
        LOSSES[name].at_reference(label_smoothing=label_smoothing)


def test_golden_conservative_dpo_with_its_gradients():
    settings, arrays = case("legacy", "cdpo_ls0.1")
    logps = [arrays[f"in.{model}_{side}_logps"] for model in ("policy", "ref") for side in ("chosen", "rejected")]

    def mean(*logps):
        losses, logged = LOSSES["sigmoid"].function(*logps, **settings["config"])
        return losses.mean(), (losses, logged)

    (loss, (losses, logged)), gradients = jax.value_and_grad(mean, (0, 1), has_aux=True)(*logps)
    np.testing.assert_allclose(loss, settings["loss"], rtol=1e-5)
    np.testing.assert_allclose(losses, arrays["out.per_pair_loss"], rtol=1e-5, atol=1e-6)
    for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        np.testing.assert_allclose(logged[f"rewards/{side}"], arrays[f"out.rewards.{side}"], atol=1e-5)
        np.testing.assert_allclose(gradient, arrays[f"out.grad.policy_{side}_logps"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("golden", ["dpo_sigmoid", "dpo_ipo", "dpo_robust_ls0.1", "dpo_sigmoid_norm"])
def test_golden_per_pair_losses(family, golden):
    settings, arrays = case(family, golden)
    config = settings["effective_config"]
    (name,) = config["loss_type"]
    options = {key: config[key] for key in LOSSES[name].options if key in config}
    # Rows 0..N-1 are the chosen sides.
    chosen_tokens, rejected_tokens = arrays["in.completion_mask"].sum(1).reshape(2, -1)
    logps = [arrays[f"out.{kind}.{side}"] for kind in ("logps", "ref_logps") for side in ("chosen", "rejected")]
    tokens = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}
    losses, logged = bound(name, tokens, **options)(*logps)
    np.testing.assert_allclose(losses, arrays["out.per_pair_loss"], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(losses.mean(), settings["loss"], rtol=1e-4, atol=2e-5)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(logged[f"rewards/{side}"], arrays[f"out.rewards.{side}"], atol=1e-4)
