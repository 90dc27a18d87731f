"""Surrogates of the policy gradient: the loss of each sampled token, given what its completion was worth.

Letters: R rows, T time. In formulas: `lr` = log-prob under the policy - log-prob under the old policy, which sampled
(of a token, or of a sequence at each of its tokens, see `policy_ratio`); `A` = advantage; `sg` = without gradient.

A surrogate takes `log_ratio_RT` and `logps_RT`, nats in float32, and `advantages_RT` ([R, T], or [R, 1] for a sequence
a row), and where it has them `sequences` (`segments.Sequences`), for what is a mean or a sum over a sequence's tokens.
It returns losses [R, T] (or [R, 1] where all it was given is) and what is logged of a token, by name: `low` and `high`
say that a ratio was clipped from below and from above. Sums and their denominators are the caller's business.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxalign.segments import Sequences

PolicyLosses = tuple[Array, dict[str, Array]]

LEVELS = ("token", "sequence", "sequence_token")

_LARGEST = 20.0  # of a log-ratio: its exponential, and that squared, are float32 numbers; beyond it is no gradient


def policy_ratio(
    logps_RT: Array,
    old_logps_RT: Array,
    mask_RT: Array,
    segment_ids_RT: Array | None = None,
    *,
    level: str = "token",
    num_segments: int = 1,
) -> Array:
    """The log of the importance ratio, at each token: [R, T], or [R, 1] for sequences that are rows.

    Args:
      logps_RT: log-probs under the policy.
      old_logps_RT: the same under the policy that sampled; no gradient goes through it.
      mask_RT: bool, the tokens that count; a token's own ratio is 1 elsewhere.
      segment_ids_RT, num_segments: see `segments.per_sequence`.
      level: `token`: its own; `sequence`: the mean over its sequence (GSPO); `sequence_token`: that mean, with the
        gradient of its own (GSPO-token); `sum`: the sum over its sequence (RLOO). The losses take ratios between e^-20
        and e^20; beyond these is no gradient.

    References:
      Zheng et al. 2025, https://arxiv.org/abs/2507.18071 (GSPO).
    """
    own = jnp.where(mask_RT, logps_RT - jax.lax.stop_gradient(old_logps_RT), 0)
    sequences = Sequences(mask_RT, segment_ids_RT, num_segments)
    if level == "token":
        return own
    if level == "sum":
        return sequences.sum(own)
    mean = sequences.mean(own)
    return mean if level == "sequence" else jax.lax.stop_gradient(mean - own) + own


def grpo(
    log_ratio_RT: Array,
    logps_RT: Array,
    advantages_RT: Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> PolicyLosses:
    """PPO's clipped surrogate: a ratio that went where it should gains nothing from going further.

    `-min(min(e^lr, delta) A, clip(e^lr, 1 - epsilon, 1 + epsilon_high) A)`

    Args:
      epsilon, epsilon_high: how far below and above 1 the ratio counts; epsilon_high None: as epsilon.
      delta: bound of the ratio where A < 0, which PPO has none for; above 1 + epsilon_high, or None.

    References:
      Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7 (PPO); Shao et al. 2024, https://arxiv.org/abs/2402.03300
      (GRPO); Yu et al. 2025, https://arxiv.org/abs/2503.14476 (DAPO: epsilon_high); INTELLECT-2 2025,
      https://arxiv.org/abs/2505.07291 (delta).
    """
    del logps_RT
    ratio = _ratio(log_ratio_RT)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    clipped = jnp.clip(ratio, low, high)
    ratio = ratio if delta is None else jnp.minimum(ratio, delta)
    losses = -jnp.minimum(ratio * advantages_RT, clipped * advantages_RT)
    return losses, _clipped(ratio < low, ratio > high, advantages_RT)


def cispo(log_ratio_RT: Array, logps_RT: Array, advantages_RT: Array, *, epsilon_high: float = 5.0) -> PolicyLosses:
    """CISPO: the importance weight is clipped, not the update, so that no token loses its gradient.

    `-sg(min(e^lr, epsilon_high)) A logp`

    Args:
      epsilon_high: largest weight (not counted from 1); the paper has no bound below.

    References:
      MiniMax 2025, https://arxiv.org/abs/2506.13585; the default is that of Khatri et al. 2025,
      https://arxiv.org/abs/2510.13786 (ScaleRL).
    """
    ratio = _ratio(log_ratio_RT)
    losses = -jax.lax.stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantages_RT * logps_RT
    return losses, {"cispo": (ratio > epsilon_high) & (advantages_RT > 0)}


def sapo(
    log_ratio_RT: Array,
    logps_RT: Array,
    advantages_RT: Array,
    *,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> PolicyLosses:
    """SAPO: a soft gate in the place of clipping; the farther the ratio from 1, the less it counts.

    `-A (4 / t) sigmoid(t (e^lr - 1))`

    Args:
      sapo_temperature_pos, sapo_temperature_neg: t where A > 0, and elsewhere.

    References:
      Gao et al. 2025, https://arxiv.org/abs/2511.20347.
    """
    del logps_RT
    t = jnp.where(advantages_RT > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -advantages_RT * 4 / t * jax.nn.sigmoid(t * (_ratio(log_ratio_RT) - 1)), {}


def vespo(
    log_ratio_RT: Array,
    logps_RT: Array,
    advantages_RT: Array,
    sequences: Sequences,
    *,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> PolicyLosses:
    """VESPO: a smooth weight of the sequence's importance w, 1 where that is 1, in the place of clipping.

    `-sg(phi) A logp`, `phi = e^l w^k e^(-l w)`, `w` = the product of a sequence's ratios.

    Args:
      log_ratio_RT: of tokens.
      vespo_k_pos, vespo_k_neg: k where A >= 0, and elsewhere: how fast sequences that became unlikely stop to count.
      vespo_lambda_pos, vespo_lambda_neg: l, the same for those that became likely.

    References:
      https://arxiv.org/abs/2602.10693 (VESPO).
    """
    is_good = advantages_RT >= 0
    k = jnp.where(is_good, vespo_k_pos, vespo_k_neg)
    rate = jnp.where(is_good, vespo_lambda_pos, vespo_lambda_neg)
    log_w = jnp.clip(sequences.sum(jnp.clip(log_ratio_RT, -_LARGEST, _LARGEST)), math.log(1e-8), _LARGEST)
    phi = jax.lax.stop_gradient(jnp.exp(rate + k * log_w - rate * jnp.exp(log_w)))
    return -phi * advantages_RT * logps_RT, {"phi": phi}


def gmpo(
    log_ratio_RT: Array,
    logps_RT: Array,
    advantages_RT: Array,
    sequences: Sequences,
    *,
    epsilon: float = 0.4,
    epsilon_high: float | None = None,
) -> PolicyLosses:
    """GMPO: the geometric mean of a sequence's ratios, clipped token by token, on which outliers have little hold.

    `-A e^mean(min(lr, epsilon_high))` where A > 0, `-A e^mean(max(lr, -epsilon))` elsewhere

    Args:
      log_ratio_RT: of tokens.
      epsilon, epsilon_high: how far below and above 0 a log-ratio counts; epsilon_high None: as epsilon.

    References:
      Zhao et al. 2025, https://arxiv.org/abs/2507.20673.
    """
    del logps_RT
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = jnp.where(advantages_RT > 0, jnp.minimum(log_ratio_RT, high), jnp.maximum(log_ratio_RT, -epsilon))
    losses = -advantages_RT * _ratio(sequences.mean(clipped))
    return losses, _clipped(log_ratio_RT < -epsilon, log_ratio_RT > high, advantages_RT)


def reinforce(log_ratio_RT: Array, logps_RT: Array, advantages_RT: Array) -> PolicyLosses:
    """REINFORCE with a baseline: the log-prob of what was sampled, times how much better it was than the mean.

    `-A logp`. The policy must be the one that sampled: nothing corrects for a difference.

    References:
      Williams 1992, https://doi.org/10.1007/BF00992696.
    """
    del log_ratio_RT
    return -advantages_RT * logps_RT, {}


def kl(logps_RT: Array, ref_logps_RT: Array, log_ratio_RT: Array | None = None) -> Array:
    """k3, an estimate of the policy's KL divergence from its reference at a token: `e^q - q - 1`, q = ref - logp.

    It is never negative and, on the policy's own samples, unbiased; its gradient is not, but that of `e^lr` times it.

    Args:
      log_ratio_RT: multiply by the importance ratio, with its gradient; None: don't.

    Returns:
      [R, T] float32 in nats.

    References:
      Schulman 2020, http://joschu.net/blog/kl-approx.html; DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556 (the
      ratio).
    """
    q = jax.lax.stop_gradient(ref_logps_RT) - logps_RT
    k3 = _ratio(q) - q - 1
    return k3 if log_ratio_RT is None else k3 * _ratio(log_ratio_RT)


def importance_ratio(
    old_logps_RT: Array,
    sampling_logps_RT: Array,
    sequences: Sequences,
    *,
    mode: str = "sequence_mask",
    clip_min: float | None = None,
    clip_max: float = 3.0,
) -> Array:
    """What corrects for a sampler that is not the old policy (another engine, another precision): [R, T] or [R, 1].

    `e^(old - sampling)` of a token, or of its sequence's sum.

    Args:
      old_logps_RT, sampling_logps_RT: log-probs under the two; NaN: not known, and not corrected for.
      mode: `token` or `sequence`, then `_truncate`: clipped to [clip_min, clip_max], or `_mask`: 0 outside of it.
      clip_min, clip_max: None: 0; inf: no bound.

    References:
      TRL 1.16's vllm_importance_sampling_mode, after https://fengyao.notion.site/off-policy-rl (truncated ratios).
    """
    difference = jnp.where(sequences.mask, old_logps_RT - sampling_logps_RT, 0)
    difference = jnp.where(jnp.isnan(difference), 0, difference)
    ratio = _ratio(difference if mode.startswith("token") else sequences.sum(difference))
    low = 0.0 if clip_min is None else clip_min
    if mode.endswith("truncate"):
        return jnp.clip(ratio, low, clip_max)
    return jnp.where((ratio < low) | (ratio > clip_max), 0, ratio)


@dataclass(frozen=True)
class Surrogate:
    """A policy loss as `loss.name` selects it.

    Attributes:
      summary: what it is, in a line.
      function: the surrogate.
      aggregation: what becomes of a batch's token losses. `sequence_mean`: the mean over sequences of their means;
        `sequence_sum`: the mean over sequences of their sums; `token_mean`: the mean over all tokens; `constant`: their
        sum over sequences x max_completion_length.
      estimator: how advantages come from rewards, see `advantages.ESTIMATORS`.
      level: that of the importance ratio, see `policy_ratio`; None: `loss.importance_sampling_level`.
      kl_in_reward: the KL divergence is taken off the rewards, not added to the loss.
      defaults: options whose default is another than the function's, or than that of all policy losses.
      corrects_ratio: a correction for another sampler multiplies the importance ratio, not the loss.
      without: options of all policy losses that mean nothing here.
    """

    summary: str
    function: Callable[..., PolicyLosses]
    aggregation: str
    estimator: str = "group"
    level: str | None = None
    kl_in_reward: bool = False
    corrects_ratio: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


_SEQUENCE = {"importance_sampling_level": "sequence"}
_NO_FILTER = ("use_bias_correction_kl", "top_entropy_quantile")

POLICY: dict[str, Surrogate] = {
    "grpo": Surrogate("PPO's clipped surrogate, averaged in each completion", grpo, "sequence_mean"),
    "bnpo": Surrogate("PPO's clipped surrogate, averaged over all tokens", grpo, "token_mean"),
    "dr_grpo": Surrogate("PPO's clipped surrogate, over a constant length", grpo, "constant"),
    "dapo": Surrogate("PPO's clipped surrogate, averaged over all tokens", grpo, "token_mean"),
    "cispo": Surrogate("the importance weight is clipped, not the update", cispo, "token_mean"),
    "luspo": Surrogate("GSPO, summed over each completion", grpo, "sequence_sum", defaults=_SEQUENCE),
    "sapo": Surrogate("a soft gate in the place of clipping", sapo, "sequence_mean"),
    "vespo": Surrogate(
        "a smooth weight of a completion's importance in the place of clipping",
        vespo,
        "token_mean",
        level="token",
        corrects_ratio=True,
        defaults={"importance_sampling_mode": "token_truncate"},
    ),
    "gspo": Surrogate(
        "PPO's clipped surrogate of whole completions: the mean log-ratio",
        grpo,
        "sequence_mean",
        defaults={**_SEQUENCE, "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gmpo": Surrogate("the geometric mean of clipped ratios", gmpo, "sequence_mean", level="token", without=_NO_FILTER),
    "rloo": Surrogate(
        "PPO's clipped surrogate of whole completions, against the group's others",
        grpo,
        "sequence_mean",
        "leave_one_out",
        level="sum",
        kl_in_reward=True,
        defaults={"beta": 0.05},
        without=(*_NO_FILTER, "delta"),
    ),
    "reinforce": Surrogate(
        "the log-prob times the reward less the mean of all",
        reinforce,
        "sequence_sum",
        "batch_mean",
        level="token",
        kl_in_reward=True,
        without=("use_bias_correction_kl",),
    ),
    "reinforce_pp": Surrogate(
        "PPO's clipped surrogate with returns normalised over the batch (REINFORCE++)",
        grpo,
        "token_mean",
        "reinforce_pp",
        level="token",
        kl_in_reward=True,
        without=("use_bias_correction_kl", "delta"),
    ),
}
"""The losses of sampled completions as `loss.name` selects them."""

SHARED: Mapping[str, Any] = {
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "mask_truncated_completions": False,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "off_policy_mask_threshold": None,
    "importance_sampling_correction": False,
    "importance_sampling_mode": "sequence_mask",
    "importance_sampling_clip_min": None,
    "importance_sampling_clip_max": 3.0,
}
"""Options of all policy losses beside those of their functions, with TRL's defaults."""

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

_CHOICES = {"importance_sampling_level": LEVELS, "importance_sampling_mode": MODES}
_NOT_NEGATIVE = ("beta", "off_policy_mask_threshold", "importance_sampling_clip_min")
_ANY = ("entropy_coef",)  # below 0 it is a penalty
_SHARES = ("top_entropy_quantile",)


def options_of(name: str) -> dict[str, Any]:
    """The options of a policy loss, with its own defaults."""
    loss = POLICY[name]
    parameters = inspect.signature(loss.function).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    level = {} if loss.level else {"importance_sampling_level": "token"}
    options = {**SHARED, **level, **own, **loss.defaults}
    return {option: default for option, default in options.items() if option not in loss.without}


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where one of the `options` of a policy loss is out of its range."""
    for option, value in options.items():
        if option in _CHOICES:
            if value not in _CHOICES[option]:
                raise ValueError(f"{option} is {value!r}, expected one of {', '.join(_CHOICES[option])}")
        elif value is not None and not isinstance(value, bool):
            low_is_fine = option in (*_NOT_NEGATIVE, *_SHARES) and value == 0
            high_is_fine = option not in _SHARES or value <= 1
            if not (option in _ANY or ((value > 0 or low_is_fine) and high_is_fine)):
                wanted = "in [0, 1]" if option in _SHARES else "at least 0" if option in _NOT_NEGATIVE else "above 0"
                raise ValueError(f"{option} is {value}, expected a number {wanted}")
    low, high = (options.get(f"importance_sampling_clip_{end}") for end in ("min", "max"))
    if low is not None and high is not None and low >= high:
        raise ValueError(f"importance_sampling_clip_min is {low}, not below importance_sampling_clip_max = {high}")
    if POLICY[name].corrects_ratio and not options["importance_sampling_mode"].startswith("token"):
        mode = options["importance_sampling_mode"]
        raise ValueError(f"importance_sampling_mode is {mode!r}, but {name} takes token_truncate or token_mask")


def _ratio(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -_LARGEST, _LARGEST))


def _clipped(is_low: Array, is_high: Array, advantages_RT: Array) -> dict[str, Array]:
    """The tokens whose ratio was clipped and had its gradient taken by that."""
    return {"low": is_low & (advantages_RT < 0), "high": is_high & (advantages_RT > 0)}
