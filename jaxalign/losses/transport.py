"""Losses that compare distributions over a whole batch of pairs: alignment by optimal transport.

Called as those of preference.py, with the letters of ratios.py, and with `weight`: they sort over the batch, so what a
pair counts (a filler: nothing) must be known to them, and the loss of a part of a batch is not a part of the loss. The
objective gives them the whole batch (see `Pairwise.couple`) and takes the weighted mean.
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
    weight: Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """AOT for pairs: the policy's margins should be larger than the reference's as distributions, quantile by quantile.

    With `e` = the k-th smallest margin (chosen - rejected log-prob) under the policy less the k-th smallest under the
    reference: `-(1 - label_smoothing) log s(beta e) - label_smoothing log s(-beta e)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      weight: [P] what each pair counts, at least 0: a pair of weight 2 is in the distributions twice, one of weight 0
        (a filler) not at all, and its loss means nothing. None: 1 each.
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
    return _by_rank(policy_margin, ref_margin, weight, beta, label_smoothing), ratios.rewards(c, r, beta)


def aot_unpaired(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    weight: Array | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """AOT without pairs: log-ratios of chosen responses should be larger than those of rejected ones as distributions.

    With `e` = the k-th smallest c less the k-th smallest r of the batch:
    `-(1 - label_smoothing) log s(beta e) - label_smoothing log s(-beta e)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      weight: [P] what each pair counts, at least 0: a pair of weight 2 is in the distributions twice, one of weight 0
        (a filler) not at all, and its loss means nothing. None: 1 each.
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
    return _by_rank(c, r, weight, beta, label_smoothing), ratios.rewards(c, r, beta)


def _by_rank(upper: Array, lower: Array, weight: Array | None, beta: float, label_smoothing: float) -> Array:
    """The smoothed sigmoid loss of each of `upper` [P] against what of `lower` [P] has the same rank.

    The ranks of a value are the interval that its weight takes up among the sorted ones. Where an interval meets
    several of the other side, the loss is their mean by what is common.
    """
    weight = jnp.ones_like(upper) if weight is None else jnp.asarray(weight, jnp.float32)
    order, lower_order = (jnp.argsort(jnp.where(weight > 0, x, jnp.inf)) for x in (upper, lower))
    ends, lower_ends = jnp.cumsum(weight[order]), jnp.cumsum(weight[lower_order])
    borders = jnp.sort(jnp.concatenate([ends, lower_ends]))
    shares = jnp.diff(borders, prepend=0)
    middles = borders - shares / 2
    last = len(weight) - 1
    at = order[jnp.minimum(jnp.searchsorted(ends, middles), last)]
    lower_at = lower_order[jnp.minimum(jnp.searchsorted(lower_ends, middles), last)]
    losses = shares * ratios.smoothed(beta * (upper[at] - lower[lower_at]), label_smoothing)
    return jnp.zeros_like(upper).at[at].add(losses) / jnp.where(weight > 0, weight, 1)
