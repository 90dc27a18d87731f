"""Losses of single responses with a label, desirable or not, against a reference model.

Letters of the formulas: `E` examples; `x` = policy - reference log-prob of the response; `y` = 1 for a desirable
response, -1 for an undesirable one; `w` = `desirable_weight` or `undesirable_weight`; `s` = the logistic function. Each
function returns one loss an example and its implicit reward `beta x`; means, weights of examples and fillers are the
caller's business.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxalign.losses import ratios

UnpairedLosses = tuple[Array, dict[str, Array]]
"""(losses [E], {"rewards": [E]}), float32."""


def kto(
    logps: Array,
    ref_logps: Array,
    label: Array,
    kl: Array | float,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLosses:
    """KTO: a response's value is a gain or a loss against a reference point, the policy's distance from its reference.

    `w (1 - s(y beta (x - kl)))`

    Args:
      logps: [E] sums of the responses' token log-probs under the policy, in nats.
      ref_logps: [E] the same under the reference; no gradient goes through it.
      label: [E] 1 (desirable) or 0, of any real or boolean type.
      kl: the reference point in nats, a scalar, see `mismatched_kl`; no gradient goes through it.
      beta: how fast the value saturates, above 0.
      desirable_weight, undesirable_weight: weights of the two kinds of response, at least 0. Eq. 8 of the paper wants
        desirable_weight * desirable examples between 1 and 4/3 of undesirable_weight * undesirable ones.

    Returns:
      losses [E] in [0, w], and `rewards` [E] = beta x.

    Raises:
      ValueError: beta or a weight is a number out of its range.

    References:
      Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7.
    """
    _check(beta, desirable_weight, undesirable_weight)
    x, sign = _log_ratio(logps, ref_logps), _sign(label)
    weights = jnp.where(sign > 0, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(-sign * beta * (x - jax.lax.stop_gradient(kl))), {"rewards": beta * x}


def apo_zero_unpaired(
    logps: Array,
    ref_logps: Array,
    label: Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> UnpairedLosses:
    """APO-zero for single responses: desirable ones up, undesirable ones down, from where the reference has them.

    `w (1 - s(y beta x))`: KTO with its reference point at 0, so no mismatched responses are needed.

    Args:
      logps, ref_logps, label, beta, desirable_weight, undesirable_weight: as in `kto`.

    Returns:
      losses [E] in [0, w], and `rewards` [E] = beta x.

    Raises:
      ValueError: beta or a weight is a number out of its range.

    References:
      D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 7, one response at a time.
    """
    return kto(
        logps,
        ref_logps,
        label,
        0.0,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco(logps: Array, ref_logps: Array, label: Array, shift: Array | float, *, beta: float = 0.1) -> UnpairedLosses:
    """BCO: the implicit reward, shifted, is the logit of a classifier of desirable responses.

    `-log s(y (beta x - shift))`

    The paper's weights for undesirable prompts that come from elsewhere than the desirable ones (UDM, its section on
    distribution mismatch) are no part of this; they can be given as weights of examples.

    Args:
      logps, ref_logps, label, beta: as in `kto`.
      shift: the paper's delta, a scalar: half the sum of the mean rewards of desirable and of undesirable responses,
        see `reward_shift`; no gradient goes through it.

    Returns:
      losses [E] in nats, and `rewards` [E] = beta x.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656 (its loss with the reward shift).
    """
    _check(beta)
    x = _log_ratio(logps, ref_logps)
    return -jax.nn.log_sigmoid(_sign(label) * (beta * x - jax.lax.stop_gradient(shift))), {"rewards": beta * x}


UNPAIRED: dict[str, Callable[..., UnpairedLosses]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}
"""These losses by name. Besides the examples one may take `kl` or `shift`: what the whole batch says."""


def mismatched_kl(log_ratios: Array, weights: Array) -> Array:
    """KTO's reference point in nats: the mean of x over responses to other prompts, and 0 where that is negative.

    Args:
      log_ratios: [E] x of each example's prompt with another example's response.
      weights: [E] of the examples, 0 for fillers. Where all are 0 so is the result.

    References:
      Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.
    """
    return jnp.maximum(jnp.sum(log_ratios * weights) / _or_one(weights.sum()), 0)


def reward_means(rewards: Array, label: Array, weights: Array) -> Array:
    """[2, 2] of examples [E]: (mean reward, sum of weights) of undesirable and of desirable ones."""
    of_kind = jnp.stack([jnp.where(_sign(label) < 0, weights, 0), jnp.where(_sign(label) > 0, weights, 0)])
    total = of_kind.sum(axis=1)
    return jnp.stack([(of_kind * rewards).sum(axis=1) / _or_one(total), total], axis=1)


def merge_means(a: Array, b: Array) -> Array:
    """The `reward_means` [2, 2] of two sets of examples together."""
    total = a[:, 1] + b[:, 1]
    return jnp.stack([a[:, 0] + (b[:, 0] - a[:, 0]) * b[:, 1] / _or_one(total), total], axis=1)


def reward_shift(means: Array) -> Array:
    """BCO's shift: half the sum of the two mean rewards of `reward_means`; while one kind is missing, the other's.

    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    """
    seen = means[:, 1] > 0
    return jnp.where(seen, means[:, 0], 0).sum() / _or_one(seen.sum())


def _log_ratio(logps: Array, ref_logps: Array) -> Array:
    return jnp.asarray(logps, jnp.float32) - jax.lax.stop_gradient(jnp.asarray(ref_logps, jnp.float32))


def _sign(label: Array) -> Array:
    return jnp.where(jnp.asarray(label) > 0, 1.0, -1.0)


def _or_one(x: Array) -> Array:
    """A denominator: x, or 1 where it is 0."""
    return jnp.where(x > 0, x, 1)


def _check(beta: float, *weights: float) -> None:
    ratios.check(beta)
    for weight in weights:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"desirable_weight or undesirable_weight is {weight}, expected a finite number >= 0")
