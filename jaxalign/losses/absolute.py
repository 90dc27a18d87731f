"""Losses of preference pairs against a reference model that judge each response by its own log-ratio.

Called as those of preference.py, with the letters of ratios.py. They also say where the likelihood of each response
should go, which the margin of a pair leaves open.
"""

import jax
from jax import Array

from jaxalign.losses import ratios
from jaxalign.losses.ratios import PairLosses


def nca_pair(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1
) -> PairLosses:
    """NCA for pairs: noise-contrastive, so that the chosen response's likelihood does not fall with the other one's.

    `-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Chen et al. 2024, https://arxiv.org/abs/2402.05369 (its form for preferences).
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    noise = jax.nn.log_sigmoid(-beta * c) + jax.nn.log_sigmoid(-beta * r)
    return -jax.nn.log_sigmoid(beta * c) - noise / 2, ratios.rewards(c, r, beta)


def bco_pair(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1
) -> PairLosses:
    """BCO's binary classifier on both responses of a pair, without its running shift of the rewards.

    `-log s(beta c) - log s(-beta r)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return -jax.nn.log_sigmoid(beta * c) - jax.nn.log_sigmoid(-beta * r), ratios.rewards(c, r, beta)


def sppo_hard(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1
) -> PairLosses:
    """SPPO with hard labels: each log-ratio is pulled to its own target, as far from 0 as a certain win or loss says.

    `(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: the reciprocal of the paper's eta, above 0: the targets are 1 / (2 beta) nats from 0.

    Returns:
      losses [P] in nats squared, and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Wu et al. 2024, https://arxiv.org/abs/2405.00675, eq. 4.7 with winning probabilities 1 and 0.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    target = 1 / (2 * beta)
    return ratios.square(c - target) + ratios.square(r + target), ratios.rewards(c, r, beta)


def apo_zero(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1
) -> PairLosses:
    """APO-zero: the chosen response up, the rejected one down; for chosen responses better than the model's own.

    `1 - s(beta c) + s(beta r)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 7.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return jax.nn.sigmoid(-beta * c) + jax.nn.sigmoid(beta * r), ratios.rewards(c, r, beta)


def apo_down(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array, *, beta: float = 0.1
) -> PairLosses:
    """APO-down: both responses down, the rejected one further; for chosen responses worse than the model's own.

    `s(beta c) + 1 - s(beta d)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 8.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return jax.nn.sigmoid(beta * c) + jax.nn.sigmoid(-beta * (c - r)), ratios.rewards(c, r, beta)
