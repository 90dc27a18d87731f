"""Losses of pairs: by hand, against plain numpy and TRL, and as functions to batch, jit and differentiate."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import case
from jax.test_util import check_grads

from jaxalign import losses
from jaxalign.losses import LOSSES, Preference

LN2 = math.log(2)
FORWARD_KL = {"f_divergence_type": "forward_kl"}
ALPHA = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8}

# Every loss with its defaults and with each option away from its default, so that an ignored option fails.
VARIANTS = [
    ("sigmoid", {"beta": 0.1}),
    ("sigmoid", {"beta": 0.35, "label_smoothing": 0.2}),
    ("sigmoid", {"beta": 0.2, **FORWARD_KL}),
    ("sigmoid", {"beta": 0.2, "f_divergence_type": "js_divergence"}),
    ("sigmoid", {"beta": 0.2, **ALPHA}),
    ("hinge", {"beta": 0.1}),
    ("hinge", {"beta": 0.02}),
    ("hinge", {"beta": 0.02, **ALPHA}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.4, "length_normalize": False}),
    ("ipo", {"beta": 0.4, **ALPHA}),
    ("robust", {"beta": 0.1}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.1}),
    ("robust", {"beta": 0.3, **ALPHA}),
    ("sigmoid_norm", {"beta": 0.1}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("sigmoid_norm", {"beta": 5.0, **ALPHA}),
    ("exo_pair", {"beta": 0.1}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.2}),
    ("exo_pair", {"beta": 0.3, **ALPHA}),
    ("discopop", {"beta": 0.1}),
    ("discopop", {"beta": 0.3, "discopop_tau": 0.7}),
    ("discopop", {"beta": 0.1, **ALPHA}),
    ("nca_pair", {"beta": 0.1}),
    ("nca_pair", {"beta": 0.4}),
    ("bco_pair", {"beta": 0.1}),
    ("bco_pair", {"beta": 0.4}),
    ("sppo_hard", {"beta": 0.1}),
    ("sppo_hard", {"beta": 0.4}),
    ("apo_zero", {"beta": 0.1}),
    ("apo_zero", {"beta": 0.4}),
    ("apo_down", {"beta": 0.1}),
    ("apo_down", {"beta": 0.4}),
    ("orpo", {"beta": 0.1}),
    ("orpo", {"beta": 0.4}),
    ("simpo", {"beta": 2.0}),
    ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.1, "label_smoothing": 0.2, "alpha": 0.25}),
    ("cpo", {"beta": 0.1}),
    ("cpo", {"beta": 0.3, "label_smoothing": 0.2, "alpha": -0.02}),
    ("cpo_hinge", {"beta": 0.1}),
    ("cpo_hinge", {"beta": 0.03, "alpha": 0.01}),
    ("cpo_ipo", {"beta": 0.1}),
    ("cpo_ipo", {"beta": 0.4, "alpha": 0.25}),
    ("tpo", {"beta": 0.01}),
    ("tpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("tpo_hinge", {"beta": 0.01}),
    ("tpo_hinge", {"beta": 0.03}),
    ("tpo_ipo", {"beta": 0.1}),
    ("tpo_ipo", {"beta": 0.4}),
    ("tpo_l", {"beta": 2.0}),
    ("tpo_l", {"beta": 2.5, "gamma_beta_ratio": 0.1, "label_smoothing": 0.2}),
]
COUPLED = [
    ("aot", {"beta": 0.1}),
    ("aot", {"beta": 0.3, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.1}),
    ("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.2}),
]


def each(variants):
    names = lambda v: v if isinstance(v, str) else "-".join(f"{k}{x}" for k, x in v.items())  # noqa: E731
    return pytest.mark.parametrize(("name", "options"), variants, ids=names)


each_variant, each_of_all = each(VARIANTS), each(VARIANTS + COUPLED)


def pairs(n=7, seed=0):
    """Log-probs and lengths of n pairs as the losses take them: four positional arrays and the two counts."""
    rng = np.random.default_rng(seed)
    chosen, rejected = rng.integers(1, 40, (2, n))
    policy = [-rng.uniform(0.5, 3, n) * k for k in (chosen, rejected)]
    logps = [*policy, *(x + rng.normal(0, 4, n) for x in policy)]
    return [np.asarray(x, np.float32) for x in logps], {"chosen_tokens": chosen, "rejected_tokens": rejected}


def bound(name, tokens, **options):
    """The loss with its keywords given: a function of the four log-probs, whether it looks at all of them or not."""
    loss = LOSSES[name]
    function = partial(loss.function, **(tokens if loss.takes_tokens else {}), **options)
    return (
        function
        if loss.needs_reference
        else lambda policy_chosen, policy_rejected, *_: function(policy_chosen, policy_rejected)
    )


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return math.exp(log_sigmoid(x))


def smoothed(x, label_smoothing):
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def oracle(name, logps, tokens, beta, **options):
    """The formulas of the papers in float64, one pair at a time."""
    return np.array(
        [one(name, *map(float, pair), beta=beta, **options) for pair in zip(*logps, *tokens.values(), strict=True)]
    )


def one(
    name, pc, pr, rc, rr, nc, nr, *, beta, label_smoothing=None, length_normalize=True, discopop_tau=0.05,
    f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, gamma_beta_ratio=0.5, alpha=0.0,
):  # fmt: skip
    smoothing = label_smoothing or 0.0
    c, r = pc - rc, pr - rr
    # f'(u) of the divergence, u = policy / reference; log u for the reverse KL
    derivative = {
        "reverse_kl": math.log,
        "forward_kl": lambda u: 1 - 1 / u,
        "js_divergence": lambda u: math.log(2 * u / (1 + u)),
        "alpha_divergence": lambda u: (u ** (f_alpha_divergence_coef - 1) - 1) / (f_alpha_divergence_coef - 1),
    }[f_divergence_type]
    fc, fr = derivative(math.exp(c)), derivative(math.exp(r))
    x = beta * (fc - fr)
    averages = fc / nc - fr / nr
    reward = lambda q: q if alpha == 0 else (1 - math.exp(q) ** -alpha) / alpha  # noqa: E731
    qc, qr = pc / nc, pr / nr
    odds = lambda q: math.exp(q) / (1 - math.exp(q))  # noqa: E731
    epsilon = 1e-3 if label_smoothing is None else label_smoothing
    mixture = sigmoid(x / discopop_tau)
    return {
        "sigmoid": lambda: smoothed(x, smoothing),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: ((averages if length_normalize else fc - fr) - 1 / (2 * beta)) ** 2,
        "robust": lambda: (-(1 - smoothing) * log_sigmoid(x) + smoothing * log_sigmoid(-x)) / (1 - 2 * smoothing),
        "sigmoid_norm": lambda: -log_sigmoid(beta * averages),
        "exo_pair": lambda: (
            sigmoid(x) * math.log(sigmoid(x) / (1 - epsilon)) + sigmoid(-x) * math.log(sigmoid(-x) / epsilon)
        ),
        "discopop": lambda: -(1 - mixture) * log_sigmoid(x) + mixture * math.exp(-x),
        "nca_pair": lambda: -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * r),
        "bco_pair": lambda: -log_sigmoid(beta * c) - log_sigmoid(-beta * r),
        "sppo_hard": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(beta * c) + sigmoid(beta * r),
        "apo_down": lambda: sigmoid(beta * c) + 1 - sigmoid(beta * (c - r)),
        "orpo": lambda: -beta * log_sigmoid(math.log(odds(qc) / odds(qr))),
        "simpo": lambda: smoothed(beta * (reward(qc) - reward(qr)) - beta * gamma_beta_ratio, smoothing),
        "cpo": lambda: smoothed(beta * (reward(pc) - reward(pr)), smoothing),
        "cpo_hinge": lambda: max(0.0, 1 - beta * (reward(pc) - reward(pr))),
        "cpo_ipo": lambda: (reward(qc) - reward(qr) - 1 / (2 * beta)) ** 2,
        "tpo": lambda: smoothed(beta * (pc - pr), smoothing),
        "tpo_hinge": lambda: max(0.0, 1 - beta * (pc - pr)),
        "tpo_ipo": lambda: (qc - qr - 1 / (2 * beta)) ** 2,
        "tpo_l": lambda: smoothed(beta * (qc - qr) - beta * gamma_beta_ratio, smoothing),
    }[name]()


# c = -10 - -14 = 4 nats over 2 tokens, r = -9 - -6 = -3 nats over 3 tokens; d = 7, averages 2 and -1.
BY_HAND = [
    ("sigmoid", {"beta": 1 / 7}, math.log(1 + math.exp(-1))),
    ("sigmoid", {"beta": 1 / 7, "label_smoothing": 0.25}, math.log(1 + math.exp(-1)) + 0.25),
    ("sigmoid", {"beta": 0.05, **FORWARD_KL}, math.log(1 + math.exp(-0.05 * (math.exp(3) - math.exp(-4))))),
    ("hinge", {"beta": 0.1}, 0.3),
    ("hinge", {"beta": 0.2}, 0.0),
    ("ipo", {"beta": 0.1}, 4.0),
    ("ipo", {"beta": 0.1, "length_normalize": False}, 4.0),
    ("ipo", {"beta": 0.25, "length_normalize": False}, 25.0),
    ("robust", {"beta": 1 / 7, "label_smoothing": 0.25}, math.log(1 + math.exp(-1)) - 0.5),
    ("sigmoid_norm", {"beta": 1 / 3}, math.log(1 + math.exp(-1))),
    # p = s(log 3) = 3/4 against the label 3/4
    ("exo_pair", {"beta": math.log(3) / 7, "label_smoothing": 0.25}, 0.0),
    # m = s(1) = 0.731059, log s(1) = -0.313262, exp(-1) = 0.367879
    ("discopop", {"beta": 1 / 7, "discopop_tau": 1.0}, 0.268941 * 0.313262 + 0.731059 * 0.367879),
    # log s(1) = -0.313262, log s(-1) = -1.313262, log s(0.75) = -0.386871
    ("nca_pair", {"beta": 0.25}, 0.313262 + 1.313262 / 2 + 0.386871 / 2),
    ("bco_pair", {"beta": 0.25}, 0.313262 + 0.386871),
    ("sppo_hard", {"beta": 0.25}, 4 + 1),
    # s(1) = 0.731059, s(-0.75) = 0.320821, s(1.75) = 0.851953
    ("apo_zero", {"beta": 0.25}, 1 - 0.731059 + 0.320821),
    ("apo_down", {"beta": 0.25}, 0.731059 + 1 - 0.851953),
    ("aot", {"beta": 1 / 7}, math.log(1 + math.exp(-1))),
    ("aot_unpaired", {"beta": 1 / 7}, math.log(1 + math.exp(-1))),
    # averages of the policy: -5 and -3 nats a token
    ("simpo", {"beta": 0.5, "gamma_beta_ratio": 2.0}, math.log(1 + math.exp(2))),
    ("simpo", {"beta": 0.5, "gamma_beta_ratio": 0.0, "alpha": -1.0},
     -math.log(sigmoid((math.exp(-5) - math.exp(-3)) / 2))),
    ("cpo", {"beta": 1.0}, math.log(1 + math.exp(1))),
    ("cpo_hinge", {"beta": 0.5}, 1.5),
    ("cpo_ipo", {"beta": 0.25}, 16.0),
    ("tpo", {"beta": 1.0}, math.log(1 + math.exp(1))),
    ("tpo_hinge", {"beta": 0.5}, 1.5),
    ("tpo_ipo", {"beta": 0.25}, 16.0),
    ("tpo_l", {"beta": 0.5, "gamma_beta_ratio": 2.0}, math.log(1 + math.exp(2))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_equals_a_hand_computed_number(name, options, expected):
    logps = [jnp.array([x]) for x in (-10.0, -9.0, -14.0, -6.0)]
    tokens = {"chosen_tokens": jnp.array([2]), "rejected_tokens": jnp.array([3])}
    losses, logged = bound(name, tokens, **options)(*logps)
    np.testing.assert_allclose(losses, [expected], rtol=1e-5, atol=2e-7)
    if LOSSES[name].needs_reference:
        c, r = 4, -3
    elif LOSSES[name].takes_tokens:
        c, r = (-5, -3) if not options.get("alpha") else (math.exp(-5) - 1, math.exp(-3) - 1)
    else:
        c, r = -10, -9
    np.testing.assert_allclose(logged["rewards/chosen"], [c * options["beta"]], rtol=1e-6)
    np.testing.assert_allclose(logged["rewards/rejected"], [r * options["beta"]], rtol=1e-6)


def test_the_odds_ratio_by_hand():
    # probabilities 1/2 and 1/4 a token: odds 1 and 1/3, their ratio 3, s(log 3) = 3/4
    logps = [jnp.array([2 * math.log(0.5)]), jnp.array([3 * math.log(0.25)])]
    tokens = {"chosen_tokens": jnp.array([2]), "rejected_tokens": jnp.array([3])}
    losses, logged = LOSSES["orpo"].function(*logps, **tokens, beta=0.5)
    np.testing.assert_allclose(losses, [-0.5 * math.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(logged["log_odds_chosen"], [math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(logged["log_odds_ratio"], [math.log(0.75)], rtol=1e-6)
    np.testing.assert_allclose(logged["logps/rejected"], [math.log(0.25)], rtol=1e-6)
    np.testing.assert_allclose(logged["rewards/chosen"], [math.log(0.5) / 2], rtol=1e-6)


@each_variant
def test_equals_plain_numpy(name, options):
    logps, tokens = pairs(64)
    losses, logged = bound(name, tokens, **options)(*logps)
    assert losses.shape == (64,) and losses.dtype == jnp.float32
    assert all(x.shape == (64,) and x.dtype == jnp.float32 for x in logged.values())
    np.testing.assert_allclose(losses, oracle(name, logps, tokens, **options), rtol=1e-4, atol=2e-6)


def aot_oracle(name, logps, beta, label_smoothing=0.0):
    """The mean loss, by sorted lists."""
    pc, pr, rc, rr = (np.asarray(x, np.float64) for x in logps)
    upper, lower = (pc - pr, rc - rr) if name == "aot" else (pc - rc, pr - rr)
    ranked = zip(sorted(upper), sorted(lower), strict=True)
    return np.mean([smoothed(beta * (x - y), label_smoothing) for x, y in ranked])


@each(COUPLED)
def test_a_loss_of_distributions_equals_plain_numpy_and_is_not_that_of_single_pairs(name, options):
    logps, _ = pairs(33)
    losses, logged = bound(name, {}, **options)(*logps)
    np.testing.assert_allclose(losses.mean(), aot_oracle(name, logps, **options), rtol=1e-5)
    alone = np.mean([bound(name, {}, **options)(*(x[i : i + 1] for x in logps))[0] for i in range(33)])
    assert abs(losses.mean() - alone) > 1e-3
    # Each loss is said at the pair that it is about, wherever that stands.
    order = np.random.default_rng(1).permutation(33)
    np.testing.assert_allclose(bound(name, {}, **options)(*(x[order] for x in logps))[0], losses[order], rtol=1e-6)
    np.testing.assert_allclose(logged["rewards/chosen"], options["beta"] * (logps[0] - logps[2]), rtol=1e-5)


@each(COUPLED)
@pytest.mark.parametrize("weights", [(2, 1, 0, 3, 1, 0, 1), (1, 0.5, 1.5, 0, 2.5, 1, 0.5)], ids=str)
def test_a_weight_in_the_distributions_is_how_often_a_pair_is_there(name, options, weights):
    logps, _ = pairs()
    weights = np.array(weights, np.float32)
    often = np.repeat(np.arange(7), (2 * weights).astype(int))
    spread = [np.asarray(x)[often] for x in logps]

    def weighted(*logps):
        found = bound(name, {}, **options, weight=weights)(*logps)[0]
        return (weights * found).sum() / weights.sum()

    def repeated(*logps):
        return bound(name, {}, **options)(*(jnp.asarray(x)[often] for x in logps))[0].mean()

    (value, gradients), (want, wanted) = (jax.value_and_grad(f, (0, 1))(*logps) for f in (weighted, repeated))
    np.testing.assert_allclose(value, aot_oracle(name, spread, **options), rtol=1e-5)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for gradient, expected in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)
        assert not gradient[weights == 0].any()


def test_variants_set_every_option_of_every_loss():
    for name, loss in LOSSES.items():
        mine = [options for variant, options in VARIANTS + COUPLED if variant == name]
        assert set(loss.keywords(loss.options)) == {key for options in mine for key in options}


@each_variant
def test_batch_equals_single_pairs(name, options):
    logps, tokens = pairs(5)
    together, _ = bound(name, tokens, **options)(*logps)
    for i in range(5):
        alone, _ = bound(name, {k: v[i : i + 1] for k, v in tokens.items()}, **options)(*(x[i : i + 1] for x in logps))
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5, atol=1e-6)


@each_of_all
def test_weight_zero_on_a_filler_pair_equals_slicing_it_away(name, options):
    logps, tokens = pairs(4)
    filled = [np.insert(x, 2, np.float32(0)) for x in logps]
    filled_tokens = {k: np.insert(v, 2, 0) for k, v in tokens.items()}
    weights = np.array([1, 1, 0, 1, 1], np.float32)
    counted = {"weight": weights} if LOSSES[name].couples else {}

    def with_filler(*logps):
        return jnp.sum(bound(name, filled_tokens, **options, **counted)(*logps)[0] * weights) / weights.sum()

    def sliced(*logps):
        return jnp.mean(bound(name, tokens, **options)(*logps)[0])

    value, gradients = jax.value_and_grad(with_filler, (0, 1))(*filled)
    expected, expected_gradients = jax.value_and_grad(sliced, (0, 1))(*logps)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(np.delete(gradient, 2), want, rtol=1e-5, atol=1e-7)
        assert gradient[2] == 0


@each_of_all
def test_gradient_equals_finite_differences(name, options):
    logps, tokens = pairs(6, seed=3)

    def losses(policy_chosen, policy_rejected):
        return bound(name, tokens, **options)(policy_chosen, policy_rejected, *logps[2:])[0]

    step = 0.002 if "f_divergence_type" in options else 0.05  # exponentials of log-ratios bend more
    check_grads(
        losses, tuple(map(jnp.asarray, logps[:2])), order=1, modes=("fwd", "rev"), eps=step, atol=0.05, rtol=0.03
    )


@each_of_all
def test_no_gradient_reaches_the_reference(name, options):
    logps, tokens = pairs()
    gradients = jax.grad(lambda *x: bound(name, tokens, **options)(*x)[0].sum(), (0, 1, 2, 3))(*logps)
    assert all(np.any(g != 0) for g in gradients[:2]) and not any(np.any(g != 0) for g in gradients[2:])


@each_of_all
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


@each_of_all
def test_jit_equals_no_jit(name, options):
    logps, tokens = pairs()
    function = bound(name, tokens, **options)
    for compiled, eager in zip(
        jax.tree.leaves(jax.jit(function)(*logps)), jax.tree.leaves(function(*logps)), strict=True
    ):
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_beta_may_be_a_traced_array():
    logps, tokens = pairs()
    for name, loss in LOSSES.items():
        by_array = jax.jit(lambda beta, name=name: bound(name, tokens, beta=beta)(*logps)[0])(jnp.float32(0.3))
        np.testing.assert_allclose(by_array, bound(name, tokens, beta=0.3)(*logps)[0], rtol=1e-5, atol=1e-6)
        assert "beta" in loss.options


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


def test_alpha_divergence_has_the_kl_divergences_as_limits():
    logps, _ = pairs()
    plain, forward = (losses.dpo(*logps, f_divergence_type=name)[0] for name in ("reverse_kl", "forward_kl"))
    divergence = partial(losses.dpo, *logps, f_divergence_type="alpha_divergence")
    np.testing.assert_allclose(divergence(f_alpha_divergence_coef=1.0)[0], plain, rtol=1e-6)
    np.testing.assert_allclose(divergence(f_alpha_divergence_coef=1.001)[0], plain, rtol=0.02)
    np.testing.assert_allclose(divergence(f_alpha_divergence_coef=0.0)[0], forward, rtol=1e-6)


def test_alpha_rewards_of_a_small_alpha_are_log_probs():
    (pc, pr, *_), tokens = pairs()
    small = LOSSES["simpo"].function(pc, pr, **tokens, alpha=1e-4)
    for got, want in zip(
        jax.tree.leaves(small), jax.tree.leaves(LOSSES["simpo"].function(pc, pr, **tokens)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", {}, LN2),
        ("sigmoid", {"label_smoothing": 0.3}, LN2),
        ("sigmoid", ALPHA, LN2),
        ("robust", {"label_smoothing": 0.3}, LN2),
        ("sigmoid_norm", {"beta": 5.0}, LN2),
        ("hinge", {"beta": 0.7}, 1.0),
        ("ipo", {"beta": 0.1}, 25.0),
        ("ipo", {"beta": 0.5, "length_normalize": False}, 1.0),
        ("exo_pair", {"label_smoothing": 0.25}, math.log(2 / 3) / 2 + math.log(2) / 2),
        ("discopop", {}, LN2 / 2 + 0.5),
        ("nca_pair", {}, 2 * LN2),
        ("bco_pair", {}, 2 * LN2),
        ("sppo_hard", {"beta": 0.5}, 2.0),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("aot", {}, LN2),
        ("aot_unpaired", {}, LN2),
    ],
)
def test_the_loss_of_an_unmoved_policy(name, options, expected):
    zero = jnp.zeros(1)
    tokens = {"chosen_tokens": zero, "rejected_tokens": zero}
    assert float(bound(name, tokens, **options)(zero, zero, zero, zero)[0][0]) == pytest.approx(expected, rel=1e-6)


def test_what_is_known_of_a_loss_is_read_from_its_signature():
    def loss(policy_chosen, policy_rejected, *, chosen_tokens, rejected_tokens, tau=0.5):
        return (policy_chosen - policy_rejected) * tau, {}

    preference = Preference(loss, nll=0.3)
    assert preference.takes_tokens and not preference.needs_reference and not preference.couples
    assert preference.options == {"tau": 0.5, "cpo_alpha": 0.3}
    assert not LOSSES["hinge"].takes_tokens and LOSSES["hinge"].needs_reference
    assert LOSSES["aot"].couples and "weight" not in LOSSES["aot"].options
    assert LOSSES["nca_pair"].options == {"beta": 0.1, "ld_alpha": None, "use_weighting": False}
    assert "use_weighting" not in LOSSES["aot_unpaired"].options and "cpo_alpha" not in LOSSES["orpo"].options


def test_defaults_are_the_papers():
    assert LOSSES["simpo"].options | {"label_smoothing": 0, "alpha": 0} == {
        "beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0, "alpha": 0, "cpo_alpha": 0.0
    }  # fmt: skip
    assert LOSSES["cpo"].options["cpo_alpha"] == 1.0 and LOSSES["exo_pair"].options["label_smoothing"] == 1e-3
    assert LOSSES["tpo"].options == {"beta": 0.01, "label_smoothing": 0.0, "tpo_alpha": 1.0}
    assert LOSSES["discopop"].options["discopop_tau"] == 0.05 and LOSSES["orpo"].options == {"beta": 0.1}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf")])
def test_beta_out_of_range_is_refused(name, beta):
    with pytest.raises(ValueError, match=f"beta is {beta}, expected"):
        LOSSES[name].check({"beta": beta})


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "label_smoothing" in loss.options])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused(name, label_smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing is {label_smoothing}, expected"):
        LOSSES[name].check({"label_smoothing": label_smoothing})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing is 0, expected a probability in \(0, 0.5\)"),
        ("discopop", {"discopop_tau": 0.0}, "discopop_tau is 0.0, expected"),
        ("discopop", {"discopop_tau": 1.5}, "discopop_tau is 1.5, expected"),
        ("sigmoid", {"f_divergence_type": "kl"}, "f_divergence_type is 'kl', expected one of reverse_kl"),
    ],
)
def test_other_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name].check(options)


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
