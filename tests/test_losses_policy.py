"""Surrogates of the policy gradient against their formulas, one token and one sequence at a time in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses
from jaxalign.losses import policy
from jaxalign.segments import Sequences

LENGTHS = (5, 3, 6)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32)
"""The three sequences packed; the last token of each is none that counts."""
MASK = np.array([[1, 1, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]], bool)


def tokens(seed=0):
    """(logps, old_logps, advantages), [2, 9] each, and the same as lists of the sequences' tokens that count."""
    rng = np.random.default_rng(seed)
    logps = -rng.gamma(1, 1, MASK.shape).astype(np.float32)
    old = logps + rng.normal(0, 0.5, MASK.shape).astype(np.float32)
    of_sequence = np.array([[0.0, 1.3, -0.7], [0.0, 0.9, 0.0]], np.float32)
    advantages = np.take_along_axis(of_sequence, SEGMENTS, axis=1)
    parts = [(row, MASK[row] & (SEGMENTS[row] == n)) for row, n in ((0, 1), (0, 2), (1, 1))]
    lists = [[x[row, kept].astype(float).tolist() for x in (logps, old)] for row, kept in parts]
    return logps, old, advantages, list(zip(lists, (1.3, -0.7, 0.9), strict=True))


def expected(name, **o):
    """The losses of the tokens that count, in order, by the formulas as the papers have them."""
    out = []
    for (logps, old), a in tokens()[3]:
        log_ratios = [new - before for new, before in zip(logps, old, strict=True)]
        low, high = o.get("epsilon", 0.2), o.get("epsilon_high", o.get("epsilon", 0.2))
        for new, log_ratio in zip(logps, log_ratios, strict=True):
            r = math.exp(log_ratio)
            if name == "grpo":
                clipped = min(max(r, 1 - low), 1 + high)
                out.append(-min(min(r, o.get("delta", math.inf)) * a, clipped * a))
            elif name == "cispo":
                out.append(-min(r, o.get("epsilon_high", 5.0)) * a * new)
            elif name == "sapo":
                t = o.get("sapo_temperature_pos", 1.0) if a > 0 else o.get("sapo_temperature_neg", 1.05)
                out.append(-a * 4 / t / (1 + math.exp(-t * (r - 1))))
            elif name == "reinforce":
                out.append(-a * new)
            elif name == "vespo":
                k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
                w = math.exp(sum(log_ratios))
                out.append(-math.exp(rate) * w**k * math.exp(-rate * w) * a * new)
            elif name == "gmpo":
                high = o.get("epsilon_high", o.get("epsilon", 0.4))
                kept = [min(x, high) if a > 0 else max(x, -o.get("epsilon", 0.4)) for x in log_ratios]
                out.append(-a * math.exp(sum(kept) / len(kept)))
    return out


FUNCTIONS = {"grpo": losses.grpo, "cispo": losses.cispo, "sapo": losses.sapo, "vespo": losses.vespo,
             "gmpo": losses.gmpo, "reinforce": losses.reinforce}  # fmt: skip


def call(name, logps, **options):
    _, old, advantages, _ = tokens()
    log_ratio = losses.policy_ratio(logps, old, MASK)
    given = {"sequences": Sequences(MASK, SEGMENTS, 2)} if name in ("vespo", "gmpo") else {}
    return FUNCTIONS[name](log_ratio, logps, advantages, **given, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}), ("grpo", {"epsilon": 0.1, "epsilon_high": 0.3}), ("grpo", {"delta": 1.4}), ("cispo", {}),
        ("cispo", {"epsilon_high": 1.1}), ("sapo", {}), ("sapo", {"sapo_temperature_pos": 2.0}), ("vespo", {}),
        ("gmpo", {}), ("gmpo", {"epsilon": 0.05, "epsilon_high": 0.2}), ("reinforce", {}),
    ],
    ids=str,
)  # fmt: skip
def test_losses_equal_the_formulas(name, options):
    got, _ = call(name, tokens()[0], **options)
    np.testing.assert_allclose(np.asarray(got)[MASK], expected(name, **options), rtol=2e-5, atol=1e-6)


def test_gradients_go_where_the_papers_have_them():
    logps, old, advantages, _ = tokens()
    ratio = np.exp(logps - old)
    slope = {name: np.asarray(jax.grad(lambda x, name=name: call(name, x)[0][MASK].sum())(logps)) for name in FUNCTIONS}
    outside = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert (outside & MASK).any() and (~outside & MASK).any()
    np.testing.assert_allclose(slope["grpo"][MASK], np.where(outside, 0, -advantages * ratio)[MASK], rtol=1e-5)
    # The weight of a log-prob has no gradient of its own.
    np.testing.assert_allclose(slope["cispo"][MASK], -(np.minimum(ratio, 5) * advantages)[MASK], rtol=1e-5)
    np.testing.assert_allclose(slope["vespo"][MASK], (np.asarray(call("vespo", logps)[0]) / logps)[MASK], rtol=1e-5)
    for x in slope.values():
        assert not x[~MASK].any()


def test_what_is_logged_says_which_ratios_lost_their_gradient():
    logps, old, advantages, _ = tokens()
    ratio = np.exp(logps - old)
    seen = call("grpo", logps, epsilon=0.1, epsilon_high=0.3)[1]
    np.testing.assert_array_equal(seen["low"][MASK], ((ratio < 0.9) & (advantages < 0))[MASK])
    np.testing.assert_array_equal(seen["high"][MASK], ((ratio > 1.3) & (advantages > 0))[MASK])
    seen = call("gmpo", logps, epsilon=0.1, epsilon_high=0.2)[1]
    np.testing.assert_array_equal(seen["low"][MASK], ((np.log(ratio) < -0.1) & (advantages < 0))[MASK])
    np.testing.assert_array_equal(seen["high"][MASK], ((np.log(ratio) > 0.2) & (advantages > 0))[MASK])
    np.testing.assert_array_equal(
        call("cispo", logps, epsilon_high=1.2)[1]["cispo"][MASK], ((ratio > 1.2) & (advantages > 0))[MASK]
    )


def test_the_ratio_of_a_sequence_is_that_of_its_tokens():
    logps, old, _, lists = tokens()
    options = {"segment_ids_RT": SEGMENTS, "num_segments": 2}
    own = [[new - before for new, before in zip(*pair, strict=True)] for pair, _ in lists]
    wanted = {
        "token": own,
        "sequence": [[sum(x) / len(x)] * len(x) for x in own],
        "sequence_token": [[sum(x) / len(x)] * len(x) for x in own],
        "sum": [[sum(x)] * len(x) for x in own],
    }
    slopes = {"token": 1.0, "sequence": 1.0, "sequence_token": 1.0, "sum": None}
    for level, want in wanted.items():
        got = losses.policy_ratio(logps, old, MASK, **options, level=level)
        np.testing.assert_allclose(np.asarray(got)[MASK], sum(want, []), rtol=1e-5, atol=1e-6)
        slope = jax.grad(lambda x, level=level: losses.policy_ratio(x, old, MASK, **options, level=level)[MASK].sum())(
            logps
        )
        lengths = np.repeat([len(x) for x in own], [len(x) for x in own])
        np.testing.assert_allclose(np.asarray(slope)[MASK], slopes[level] or lengths, rtol=1e-5)
    # One token's ratio moves by that token's log-prob alone, or by all of its sequence.
    first = lambda level: np.asarray(  # noqa: E731
        jax.grad(lambda x: losses.policy_ratio(x, old, MASK, **options, level=level)[0, 0])(logps)
    )
    assert np.count_nonzero(first("sequence_token")) == 1 and np.count_nonzero(first("sequence")) == 4
    of_old = jax.grad(lambda x: losses.policy_ratio(logps, x, MASK).sum())(old)
    assert not np.asarray(of_old).any()


def test_on_policy_all_of_them_have_the_policy_gradient():
    """Where the policy is the one that sampled; a sequence's ratio has it, too, divided among its tokens."""
    logps, _, advantages, _ = tokens()
    for name, function in FUNCTIONS.items():
        given = {"sequences": Sequences(MASK, SEGMENTS, 2)} if name in ("vespo", "gmpo") else {}

        def total(x, function=function, given=given):
            return function(losses.policy_ratio(x, logps, MASK), x, advantages, **given)[0][MASK].sum()

        np.testing.assert_allclose(np.asarray(jax.grad(total)(logps))[MASK], -advantages[MASK], rtol=1e-5, err_msg=name)


def test_k3_is_never_negative_and_its_corrected_gradient_is_that_of_the_divergence():
    logps, ref, _, _ = tokens()
    q = ref - logps
    np.testing.assert_allclose(policy.kl(logps, ref), np.expm1(q) - q, rtol=1e-4, atol=1e-6)
    assert np.asarray(policy.kl(logps, ref)).min() >= 0
    # The expectation over a distribution of three tokens, each sampled as often as it is likely.
    logits, reference = jnp.array([0.3, -1.0, 0.8]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.4]))

    def divergence(logits):
        p = jax.nn.log_softmax(logits)
        return (jnp.exp(p) * (p - reference)).sum()

    def estimate(logits, corrected):
        p = jax.nn.log_softmax(logits)
        old = jax.lax.stop_gradient(p)
        return (jnp.exp(old) * policy.kl(p, reference, p - old if corrected else None)).sum()

    want = jax.grad(divergence)(logits)
    np.testing.assert_allclose(estimate(logits, True), divergence(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(estimate)(logits, True), want, rtol=1e-4, atol=1e-6)
    assert np.abs(jax.grad(estimate)(logits, False) - want).max() > 0.01


@pytest.mark.parametrize("mode", policy.MODES)
def test_another_samplers_ratio_is_cut_or_left_out(mode):
    _, old, _, lists = tokens()
    sampling = old + np.random.default_rng(1).normal(0, 0.3, old.shape).astype(np.float32)
    sampling[0, 1] = np.nan
    sampling[~MASK] = 1e4
    got = policy.importance_ratio(old, sampling, Sequences(MASK, SEGMENTS, 2), mode=mode, clip_min=0.8, clip_max=1.2)
    difference = np.where(MASK & ~np.isnan(sampling), old - sampling, 0)
    want = []
    for row, n in ((0, 1), (0, 2), (1, 1)):
        mine = difference[row, MASK[row] & (SEGMENTS[row] == n)].astype(float)
        ratios = np.exp(mine) if mode.startswith("token") else np.full(len(mine), np.exp(mine.sum()))
        kept = np.clip(ratios, 0.8, 1.2) if mode.endswith("truncate") else ratios * ((ratios >= 0.8) & (ratios <= 1.2))
        want.extend(kept)
    np.testing.assert_allclose(np.asarray(got)[MASK], want, rtol=1e-4)
    assert len(set(np.round(want, 4))) > 2 and len(lists) == 3
    free = policy.importance_ratio(
        old, sampling, Sequences(MASK, SEGMENTS, 2), mode=mode, clip_min=None, clip_max=math.inf
    )
    assert np.asarray(free)[MASK].max() > 1.2


def test_ratios_out_of_any_range_stay_finite():
    far = np.float32([[-200, -30, 30, 200]])
    zero, mask = np.zeros_like(far), np.ones_like(far, bool)
    for sign in (1.0, -1.0):
        advantages = np.full_like(far, sign)
        for name, function in FUNCTIONS.items():
            given = {"sequences": Sequences(mask)} if name in ("vespo", "gmpo") else {}

            def total(x, function=function, given=given, advantages=advantages):
                return function(losses.policy_ratio(x, zero, mask), x, advantages, **given)[0].sum()

            value, slope = jax.value_and_grad(total)(far)
            assert np.isfinite(value) and np.isfinite(slope).all(), name
    assert np.isfinite(policy.kl(far, zero)).all()


def test_names_have_the_defaults_of_their_papers():
    options = {name: policy.options_of(name) for name in policy.POLICY}
    assert options["gspo"]["epsilon"] == 3e-4 and options["gspo"]["epsilon_high"] == 4e-4
    assert options["gspo"]["importance_sampling_level"] == options["luspo"]["importance_sampling_level"] == "sequence"
    assert options["gmpo"]["epsilon"] == 0.4 and options["cispo"]["epsilon_high"] == 5.0
    assert options["rloo"]["beta"] == 0.05 and options["grpo"]["beta"] == 0.0
    assert "importance_sampling_level" not in options["rloo"] and "epsilon" not in options["vespo"]
    for name, of_loss in options.items():
        policy.check(name, of_loss)
