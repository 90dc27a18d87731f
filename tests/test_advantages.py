"""Advantages: TRL's numbers, and by hand what no golden case shows."""

import numpy as np
import pytest
from common import FAMILIES, LOSS, case

from jaxalign import advantages

NAN = np.nan
EPSILON = 1e-4


def masks(a):
    return {"mask_CN": a["in.completion_mask"].astype(bool)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name",
    ["grpo_adv_batch", "grpo_adv_group", "grpo_adv_none", "grpo_adv_two_weighted", "grpo_adv_with_none", "rloo_adv",
     "rloo_adv_kl", "rloo_adv_two_funcs", "rloo_loss"],
)  # fmt: skip
def test_advantages_and_metrics_equal_trl(name, family):
    golden, a = case(family, name)
    settings = golden["effective_config"]
    values = a["in.rewards_per_func"].T
    weights = settings["reward_weights"] or [1.0] * values.shape[1]
    options = {"num_generations": settings["num_generations"]}
    given = {}
    if name.startswith("rloo"):
        given = {"estimator": "leave_one_out", "beta": settings["beta"]}
        if settings["beta"]:  # the case has sums: any split over tokens will do
            kl = np.zeros(a["in.completion_mask"].shape, np.float32)
            kl[:, 0] = a["out.old_logps"] - a["out.ref_logps"]
            given |= {"kl_CN": kl, **masks(a)}
    else:
        options |= {"scale": settings["scale_rewards"], "aggregation": settings["multi_objective_aggregation"]}
    found, rewards = advantages.combine(values, weights, **options, **given)
    want = a["out.advantages"]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=5e-5 if "kl" in name else 1e-6)
    assert found.dtype == rewards.dtype == np.float32
    names = [f"reward_{i}" for i in range(values.shape[1])]
    metrics = advantages.summary(values, weights, names, **options)
    wanted = {key: x for key, x in golden["metrics"].items() if key.startswith(("reward", "frac"))}
    assert metrics.keys() == wanted.keys()
    for key, x in wanted.items():
        np.testing.assert_allclose(metrics[key], x, **LOSS, err_msg=key)


# Means and standard deviations by hand, as TRL 1.16's lines for multi_objective_aggregation = normalize_then_sum say.
def test_functions_normalised_one_by_one_are_summed_and_normalised_again():
    values = np.array([[1.0, 10], [3, 10], [5, NAN], [0, 20], [0, 40], [NAN, NAN]])
    first = [(x - 3) / (2 + EPSILON) for x in (1, 3, 5)] + [0.0, 0.0]
    deviation = np.std([20, 40], ddof=1)
    second = [0.0, 0.0, 0.0] + [(x - 30) / (deviation + EPSILON) for x in (20, 40)]
    summed = np.array(first) + 0.5 * np.array(second)
    want = (summed - summed.mean()) / (summed.std(ddof=1) + EPSILON)
    options = {"num_generations": 3, "aggregation": "normalize_then_sum"}
    found, rewards = advantages.combine(values, (1, 0.5), **options)
    np.testing.assert_allclose(found, [*want, 0], rtol=1e-6)
    np.testing.assert_allclose(rewards, [6, 8, 5, 10, 20, NAN])
    metrics = advantages.summary(values, (1, 0.5), ("a", "b"), **options)
    assert metrics["frac_reward_zero_std"] == 0 and metrics["rewards/b/mean"] == 20
    alike = advantages.summary(np.ones((6, 2)), (1, 1), ("a", "b"), **options)
    assert alike["frac_reward_zero_std"] == 1


def test_groups_without_spread_or_with_one_reward_teach_nothing():
    rewards = np.array([0.1] * 4 + [0.0, 1.0, NAN, NAN] + [NAN, NAN, NAN, 7.0] + [NAN] * 4)
    groups = rewards.reshape(4, 4)
    group = advantages.group(groups)
    assert not group[[0, 2, 3]].any() and not group[1, 2:].any()
    np.testing.assert_allclose(group[1, :2], np.array([-0.5, 0.5]) / (np.sqrt(0.5) + EPSILON), rtol=1e-6)
    others = advantages.leave_one_out(groups)
    np.testing.assert_allclose(others[1], [-1, 1, 0, 0])
    assert not others[[2, 3]].any() and np.abs(others[0]).max() < 1e-7
    assert advantages.has_spread(rewards, 4).tolist() == [False, True, False, False]
    metrics = advantages.summary(rewards[:, None], [1.0], ["f"], num_generations=4)
    assert metrics["frac_reward_zero_std"] == 0.25
    # One completion of a prompt has no group, and a batch of one no spread.
    assert not advantages.group(np.array([[3.0], [5.0]])).any()
    assert not advantages.leave_one_out(np.array([[3.0], [5.0]])).any()
    assert advantages.group(np.array([[3.0], [5.0]]), scale="batch").tolist() == [[0.0], [0.0]]
    assert "reward_std" not in advantages.summary(np.array([[3.0]]), [1.0], ["f"], num_generations=1)
    assert "reward" not in advantages.summary(np.array([[NAN]] * 2), [1.0], ["f"], num_generations=2)


def test_reinforce_compares_with_the_mean_of_all():
    found, _ = advantages.combine(
        np.array([[1.0], [2.0], [6.0], [NAN]]), [2.0], num_generations=1, estimator="batch_mean"
    )
    np.testing.assert_allclose(found, [-4, -2, 6, 0])


def test_rewards_are_clipped_before_the_divergence_is_taken_off_and_advantages_normalised():
    """TRL 1.16's reward_clip_range and normalize_advantages, by hand."""
    values, kl = np.array([[5.0], [-3.0], [0.5], [NAN]]), np.array([[0.5, 0.5], [1.0, 9.0], [0.0, -2.0], [1.0, 1.0]])
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
    given = {"num_generations": 4, "estimator": "leave_one_out", "beta": 0.1, "kl_CN": kl, "mask_CN": mask}
    costly = np.array([1.0 - 0.1, -1.0 - 0.1, 0.5 + 0.2])
    want = np.array([costly[i] - np.delete(costly, i).mean() for i in range(3)])
    found, rewards = advantages.combine(values, [1.0], **given, clip_range=(-1.0, 1.0))
    np.testing.assert_allclose(found, [*want, 0], rtol=1e-6)
    np.testing.assert_array_equal(rewards, np.float32([5, -3, 0.5, NAN]))
    found, _ = advantages.combine(values, [1.0], **given, clip_range=(-1.0, 1.0), normalize=True)
    np.testing.assert_allclose(found, [*(want - want.mean()) / (want.std(ddof=1) + EPSILON), 0], rtol=1e-6)
    given = {"num_generations": 1, "estimator": "batch_mean", "normalize": True}
    found, _ = advantages.combine(values, [1.0], **given)
    known = values[:3, 0]
    np.testing.assert_allclose(found, [*(known - known.mean()) / (known.std(ddof=1) + EPSILON), 0], rtol=1e-6)


def test_reinforce_pp_normalises_the_return_of_each_token_over_all_tokens():
    """By loops, as the paper's equations say."""
    rng = np.random.default_rng(0)
    rewards, kl = np.array([1.0, 0.0, 2.0, NAN]), rng.normal(0, 1, (4, 5))
    mask = np.arange(5) < np.array([[3], [5], [1], [2]])
    kl[~mask] = 100
    for beta in (0.0, 0.3):
        returns = {
            (i, t): rewards[i] - beta * sum(kl[i, s] for s in range(t, 5) if mask[i, s])
            for i in range(3)
            for t in range(5)
            if mask[i, t]
        }
        mean, deviation = np.mean(list(returns.values())), np.std(list(returns.values()), ddof=1)
        want = np.zeros((4, 5))
        for (i, t), value in returns.items():
            want[i, t] = (value - mean) / (deviation + EPSILON)
        given = {"mask_CN": mask, "kl_CN": kl if beta else None, "beta": beta}
        found, _ = advantages.combine(rewards[:, None], [1.0], num_generations=2, estimator="reinforce_pp", **given)
        np.testing.assert_allclose(found, want if beta else want[:, 0], rtol=1e-6, atol=1e-7)


def test_what_is_unknown_or_no_whole_group_is_refused():
    values = np.ones((4, 1))
    for options, message in (
        ({"estimator": "gae"}, "estimator is 'gae', expected one of group"),
        ({"scale": "prompt"}, "scale is 'prompt'"),
        ({"aggregation": "sum"}, "aggregation is 'sum'"),
        ({"num_generations": 3}, "4 completions are no groups of num_generations = 3"),
    ):
        with pytest.raises(ValueError, match=message):
            advantages.combine(values, [1.0], **{"num_generations": 2, **options})
    with pytest.raises(ValueError, match="scale is 'all'"):
        advantages.group(values, scale="all")
