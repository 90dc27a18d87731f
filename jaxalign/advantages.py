"""Advantages: how much better each sampled completion was than what was to be expected, from the rewards.

Plain NumPy: rewards are known on the host. A reward of NaN is one that nothing could say anything about: it takes no
part in means and deviations, and its advantage is 0. Standard deviations are those of a sample (n - 1), and EPSILON is
added to them before a division, as TRL 1.16 does it.

Letters: B prompts, G completions of a prompt (its group), C = B * G completions (a group's are neighbours), F reward
functions, N tokens of a completion.
"""

from collections.abc import Sequence

import numpy as np

ESTIMATORS = ("group", "leave_one_out", "batch_mean", "reinforce_pp")
"""What `combine` compares a completion's reward with."""

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")

EPSILON = 1e-4


def group(rewards_BG: np.ndarray, *, scale: str = "group") -> np.ndarray:
    """GRPO's advantages: the reward less its group's mean, in units of a standard deviation.

    Args:
      rewards_BG: NaN where there is none.
      scale: whose standard deviation: that of the `group`, of the whole `batch`, or `none`: no division.

    Returns:
      [B, G] float32.

    Raises:
      ValueError: scale is none of these.

    References:
      Shao et al. 2024, https://arxiv.org/abs/2402.03300; Liu et al. 2025, https://arxiv.org/abs/2503.20783 (none).
    """
    rewards_BG = np.asarray(rewards_BG, np.float64)
    centered = rewards_BG - _mean(rewards_BG, axis=1)
    if scale != "none":
        centered /= _scale_of(rewards_BG, scale) + EPSILON
    return _known(centered)


def leave_one_out(rewards_BG: np.ndarray, *, normalize: bool = False) -> np.ndarray:
    """RLOO's advantages: the reward less the mean reward of the group's others.

    Args:
      rewards_BG: NaN where there is none.
      normalize: over the batch, see `combine`.

    Returns:
      [B, G] float32; 0 where a completion has no others.

    References:
      Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
    """
    rewards_BG = np.asarray(rewards_BG, np.float64)
    others = (~np.isnan(rewards_BG)).sum(axis=1, keepdims=True) - 1
    baseline = (np.nansum(rewards_BG, axis=1, keepdims=True) - rewards_BG) / np.where(others > 0, others, np.nan)
    advantages_BG = rewards_BG - baseline
    return _known(_normalized(advantages_BG) if normalize else advantages_BG)


def batch_mean(rewards_C: np.ndarray, *, normalize: bool = False) -> np.ndarray:
    """REINFORCE with a baseline: the reward less the mean of all, in units of their standard deviation where this is to
    be normalised: [C] float32."""
    rewards_C = np.asarray(rewards_C, np.float64)
    return _known(_normalized(rewards_C) if normalize else rewards_C - _mean(rewards_C))


def reinforce_pp(
    rewards_C: np.ndarray, mask_CN: np.ndarray, kl_CN: np.ndarray | None = None, *, beta: float = 0.0
) -> np.ndarray:
    """REINFORCE++: the return of each token, the KL divergence from there on taken off, normalised over all tokens.

    `(a - mean a) / (std a + EPSILON)` with `a_t = reward - beta sum over i >= t of kl_i`

    Args:
      rewards_C: NaN where there is none.
      mask_CN: bool, the sampled tokens.
      kl_CN: log-prob of each under the policy that sampled less that under the reference; needed where beta is not 0.
      beta: what a nat of it costs.

    Returns:
      [C] float32, or [C, N] where beta is not 0: then it differs from token to token.

    References:
      Hu et al. 2025, https://arxiv.org/abs/2501.03262, the variant without a group's baseline.
    """
    mask_CN = np.asarray(mask_CN, bool)
    returns_CN = np.broadcast_to(np.asarray(rewards_C, np.float64)[:, None], mask_CN.shape)
    if beta:
        assert kl_CN is not None, "a KL penalty needs log-probs under the reference"
        cost_CN = np.where(mask_CN, kl_CN, 0.0)
        returns_CN = returns_CN - beta * np.cumsum(cost_CN[:, ::-1], axis=1)[:, ::-1]
    sampled = np.where(mask_CN, returns_CN, np.nan)
    advantages_CN = _known((returns_CN - _mean(sampled)) / (_std(sampled) + EPSILON))
    return np.where(mask_CN, advantages_CN, np.float32(0)) if beta else advantages_CN[:, 0]


def combine(
    values_CF: np.ndarray,
    weights_F: Sequence[float] | np.ndarray,
    *,
    num_generations: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    estimator: str = "group",
    beta: float = 0.0,
    kl_CN: np.ndarray | None = None,
    mask_CN: np.ndarray | None = None,
    clip_range: tuple[float, float] | None = None,
    normalize: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, rewards_C) of completions that several functions rewarded.

    Args:
      values_CF: what each function said, NaN where it does not apply; a completion with NaN alone gets advantage 0.
      weights_F: what each function counts.
      num_generations: G.
      scale: see `group`; the other estimators take none.
      aggregation: `sum_then_normalize`: advantages of the weighted sum of rewards; `normalize_then_sum`: the weighted
        sum of each function's advantages within their groups, normalised over the batch (of `group` alone).
      estimator: one of ESTIMATORS, see the functions of these names.
      beta: the KL divergence is taken off the reward, times this (leave_one_out, batch_mean: of the whole completion;
        reinforce_pp: of the tokens from each on); 0: it is not.
      kl_CN, mask_CN: see `reinforce_pp`; the mask is needed by that, and both where beta is not 0.
      clip_range: (lowest, highest) that a weighted sum of rewards may be, before anything is taken off it; the sums
        that are returned are not clipped.
      normalize: the advantages of leave_one_out or batch_mean, `(a - mean a) / (std a + EPSILON)` over the batch.

    Returns:
      advantages [C] float32, [C, N] for reinforce_pp with a beta; and the weighted sums of rewards [C] float32, NaN
      where no function applied.

    Raises:
      ValueError: an estimator, scale or aggregation is unknown, or the completions are no whole groups.

    References:
      https://arxiv.org/abs/2601.05242 (GDPO: normalize_then_sum).
    """
    for name, value, known in (
        ("estimator", estimator, ESTIMATORS),
        ("scale", scale, SCALES),
        ("aggregation", aggregation, AGGREGATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    values_CF, rewards_C = _sums(values_CF, weights_F, num_generations)
    clipped_C = rewards_C if clip_range is None else np.clip(rewards_C, *clip_range)
    costly_C = clipped_C
    if beta and estimator != "reinforce_pp":
        assert kl_CN is not None and mask_CN is not None, "a KL penalty needs log-probs under the reference"
        costly_C = clipped_C - beta * np.where(mask_CN, kl_CN, 0.0).sum(axis=1)
    rewards_BG = costly_C.reshape(-1, num_generations)
    if estimator == "reinforce_pp":
        assert mask_CN is not None, "advantages of tokens need their mask"
        advantages = reinforce_pp(clipped_C, mask_CN, kl_CN, beta=beta)
    elif estimator == "batch_mean":
        advantages = batch_mean(costly_C, normalize=normalize)
    elif estimator == "leave_one_out":
        advantages = leave_one_out(rewards_BG, normalize=normalize).reshape(-1)
    elif aggregation == "sum_then_normalize":
        advantages = group(rewards_BG, scale=scale).reshape(-1)
    else:
        whole_C = _normalized_sums(values_CF, weights_F, num_generations)
        advantages = _known(_normalized(whole_C))
    return advantages, rewards_C.astype(np.float32)


def summary(
    values_CF: np.ndarray,
    weights_F: Sequence[float] | np.ndarray,
    names: Sequence[str],
    *,
    num_generations: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> dict[str, float]:
    """TRL's metrics of rewards: `reward`, `reward_std`, `frac_reward_zero_std`, `rewards/<name>/mean` and `/std`.

    `frac_reward_zero_std` is the share of completions whose advantage would be divided by a standard deviation of 0.
    What can't be said (a deviation of one reward, a function that never applied) is left out.

    Args: as in `combine`; names: of the functions.
    """
    values_CF, rewards_C = _sums(values_CF, weights_F, num_generations)
    if aggregation == "normalize_then_sum":
        deviation = _std(_normalized_sums(values_CF, weights_F, num_generations))
    else:
        deviation = _scale_of(rewards_C.reshape(-1, num_generations), "batch" if scale == "batch" else "group")
    found = {"reward": _mean(rewards_C), "reward_std": _std(rewards_C)}
    for name, values_C in zip(names, values_CF.T, strict=True):
        found |= {f"rewards/{name}/mean": _mean(values_C), f"rewards/{name}/std": _std(values_C)}
    metrics = {name: float(value.item()) for name, value in found.items() if np.isfinite(value).all()}
    return metrics | {"frac_reward_zero_std": float((np.abs(deviation) <= 1e-8).mean())}


def has_spread(rewards_C: np.ndarray, num_generations: int) -> np.ndarray:
    """Whether a group's rewards differ, so that its advantages are not all 0: [B] bool."""
    rewards_BG = np.asarray(rewards_C, np.float64).reshape(-1, num_generations)
    return _scale_of(rewards_BG, "group")[:, 0] > 1e-8


def _sums(
    values_CF: np.ndarray, weights_F: Sequence[float] | np.ndarray, num_generations: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rewards in float64, and their weighted sums [C]; NaN where no function applied."""
    values_CF = np.asarray(values_CF, np.float64)
    if len(values_CF) % num_generations:
        raise ValueError(f"{len(values_CF)} completions are no groups of num_generations = {num_generations}")
    sums_C = np.nansum(values_CF * np.asarray(weights_F, np.float64), axis=1)
    return values_CF, np.where(np.isnan(values_CF).all(axis=1), np.nan, sums_C)


def _normalized_sums(
    values_CF: np.ndarray, weights_F: Sequence[float] | np.ndarray, num_generations: int
) -> np.ndarray:
    """The weighted sums [C] of each function's advantages within its groups; NaN where no function applied."""
    values_BGF = values_CF.reshape(-1, num_generations, values_CF.shape[1])
    deviation = _std(values_BGF, axis=1) if num_generations > 1 else 0.0
    normalized_BGF = (values_BGF - _mean(values_BGF, axis=1)) / (deviation + EPSILON)
    sums_C = np.nansum(normalized_BGF.reshape(values_CF.shape) * np.asarray(weights_F, np.float64), axis=1)
    return np.where(np.isnan(values_CF).all(axis=1), np.nan, sums_C)


def _scale_of(rewards_BG: np.ndarray, scale: str) -> np.ndarray:
    """Standard deviations that broadcast to [B, G]; 0 where one completion is all there could be."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    whole = rewards_BG if scale == "batch" else rewards_BG[:1]
    if whole.size < 2:
        return np.zeros((len(rewards_BG), 1))
    return _std(rewards_BG) if scale == "batch" else _std(rewards_BG, axis=1)


def _mean(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of what is no NaN, NaN of nothing; `axis` is kept."""
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    return np.nansum(x, axis=axis, keepdims=True) / np.where(count > 0, count, np.nan)


def _std(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The sample's standard deviation of what is no NaN, NaN of fewer than two; `axis` is kept."""
    count = (~np.isnan(x)).sum(axis=axis, keepdims=True)
    squares = np.nansum((x - _mean(x, axis)) ** 2, axis=axis, keepdims=True)
    return np.sqrt(squares / np.where(count > 1, count - 1, np.nan))


def _normalized(x: np.ndarray) -> np.ndarray:
    """x less its mean, in units of its standard deviation."""
    return (x - _mean(x)) / (_std(x) + EPSILON)


def _known(advantages: np.ndarray) -> np.ndarray:
    """float32, and 0 where nothing is known."""
    return np.nan_to_num(advantages, nan=0.0).astype(np.float32)
