"""Losses of triples that need no reference model: a pair, and a third, gold response whose token NLL is the anchor.

Each function is that of a pair in reference_free.py with the defaults of TPO, and with its letters; the NLL of the gold
responses, weighted by `tpo_alpha`, is the caller's business, as it is a mean over the batch's tokens.
"""

from jax import Array

from jaxalign.losses import reference_free
from jaxalign.losses.ratios import PairLosses


def tpo(
    policy_chosen: Array, policy_rejected: Array, *, beta: float = 0.01, label_smoothing: float = 0.0
) -> PairLosses:
    """TPO's preference term; TPO is this plus the NLL of the gold responses.

    `-(1 - label_smoothing) log s(m) - label_smoothing log s(-m)` with `m = beta (p_c - p_r)`

    Args:
      policy_chosen, policy_rejected: [P] sums of the responses' token log-probs in nats.
      beta: scale of the rewards, above 0.
      label_smoothing: probability that a label is swapped, in [0, 0.5).

    Returns:
      losses [P], and what is logged, as in `reference_free.cpo`.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Saeidi et al. 2024, https://arxiv.org/abs/2405.16681 (TPO).
    """
    return reference_free.cpo(policy_chosen, policy_rejected, beta=beta, label_smoothing=label_smoothing)


def tpo_hinge(policy_chosen: Array, policy_rejected: Array, *, beta: float = 0.01) -> PairLosses:
    """TPO with SLiC's hinge as its preference term.

    `max(0, 1 - beta (p_c - p_r))`

    Args:
      policy_chosen, policy_rejected: as in `tpo`.
      beta: reciprocal of the wanted margin in nats, above 0.

    Returns:
      losses [P], and what is logged, as in `reference_free.cpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425.
    """
    return reference_free.cpo_hinge(policy_chosen, policy_rejected, beta=beta)


def tpo_ipo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.01,
) -> PairLosses:
    """TPO with IPO's squared distance of the averages' margin from a fixed target as its preference term.

    `(q_c - q_r - 1 / (2 beta))^2`

    Args:
      policy_chosen, policy_rejected: as in `tpo`.
      chosen_tokens, rejected_tokens: [P] scored tokens of each response, of any real or integer type.
      beta: IPO's tau, above 0: the target is 1 / (2 beta) nats a token.

    Returns:
      losses [P] in nats squared, and what is logged, as in `reference_free.cpo_ipo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, with a uniform reference.
    """
    return reference_free.cpo_ipo(
        policy_chosen, policy_rejected, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens, beta=beta
    )


def tpo_l(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """TPO-L: averages as rewards, and a margin that the pair has to reach, as SimPO has them.

    `-(1 - label_smoothing) log s(m) - label_smoothing log s(-m)` with `m = beta (q_c - q_r - gamma_beta_ratio)`

    Args:
      policy_chosen, policy_rejected, chosen_tokens, rejected_tokens: as in `tpo_ipo`.
      beta: scale of the rewards, above 0.
      gamma_beta_ratio: the target margin over beta, in nats a token; TRL's `tpo_l_gamma` is beta times this.
      label_smoothing: probability that a label is swapped, in [0, 0.5).

    Returns:
      losses [P], and what is logged, as in `reference_free.simpo`.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Saeidi et al. 2024, https://arxiv.org/abs/2405.16681 (TPO-L).
    """
    return reference_free.simpo(
        policy_chosen,
        policy_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        beta=beta,
        gamma_beta_ratio=gamma_beta_ratio,
        label_smoothing=label_smoothing,
    )
