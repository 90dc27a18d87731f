"""Losses that compare distributions over a whole batch of pairs: alignment by optimal transport.

Called as those of preference.py, with the letters of ratios.py, and with `valid`: they sort over the batch, so a filler
pair must be known to them, and the loss of a part of a batch is not a part of the loss. The objective gives them the
whole batch (see `Pairwise.couple`).
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxalign.losses import ratios
from jaxalign.losses.ratios import PairLosses


def aot(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    valid: Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """AOT for pairs: the policy's margins should be larger than the reference's as distributions, quantile by quantile.

    With `e` = the k-th smallest margin (chosen - rejected log-prob) under the policy less the k-th smallest under the
    reference: `-(1 - label_smoothing) log s(beta e) - label_smoothing log s(-beta e)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      valid: [P] bool, False for fillers, whose losses mean nothing. None: all pairs count.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: probability that a label is swapped, in [0, 0.5).

    Returns:
      losses [P], each at the pair whose margin under the policy it is about, and `rewards/chosen`, `rewards/rejected`
      [P] as in `dpo`.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882 (paired).
    """
    ratios.check(beta, label_smoothing)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    ref_margin = jax.lax.stop_gradient(jnp.asarray(ref_chosen, jnp.float32) - jnp.asarray(ref_rejected, jnp.float32))
    policy_margin = jnp.asarray(policy_chosen, jnp.float32) - jnp.asarray(policy_rejected, jnp.float32)
    return _by_rank(policy_margin, ref_margin, valid, beta, label_smoothing), ratios.rewards(c, r, beta)


def aot_unpaired(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    valid: Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """AOT without pairs: log-ratios of chosen responses should be larger than those of rejected ones as distributions.

    With `e` = the k-th smallest c less the k-th smallest r of the batch:
    `-(1 - label_smoothing) log s(beta e) - label_smoothing log s(-beta e)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      valid: [P] bool, False for fillers, whose losses mean nothing. None: all pairs count.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: probability that a label is swapped, in [0, 0.5).

    Returns:
      losses [P], each at the pair whose c it is about, and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Melnyk et al. 2024, https://arxiv.org/abs/2406.05882 (unpaired).
    """
    ratios.check(beta, label_smoothing)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return _by_rank(c, r, valid, beta, label_smoothing), ratios.rewards(c, r, beta)


def _by_rank(upper: Array, lower: Array, valid: Array | None, beta: float, label_smoothing: float) -> Array:
    """The smoothed sigmoid loss of each of `upper` [P] against the one of `lower` [P] with the same rank."""
    keep = jnp.ones(upper.shape, bool) if valid is None else valid
    order, lower_order = (jnp.argsort(jnp.where(keep, x, jnp.inf)) for x in (upper, lower))  # fillers come last
    losses = ratios.smoothed(beta * (upper[order] - lower[lower_order]), label_smoothing)
    return jnp.zeros_like(losses).at[order].set(losses)
