"""Losses of preference pairs that need no reference model.

Each function is called alike: two arrays of sequence log-probs by position, then keywords. It returns one loss a pair
and what is logged of each pair. The token NLL of the chosen responses that ORPO and CPO add is the caller's business,
as it is a mean over the batch's tokens (see `Preference`).

Letters of the formulas: `P` pairs; `p_c` and `p_r` = the log-probs of the chosen and the rejected response, `q_c` and
`q_r` = their averages over tokens; `s` = the logistic function.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxalign.losses import ratios
from jaxalign.losses.ratios import PairLosses


def orpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.1,
) -> PairLosses:
    """ORPO's odds-ratio term; ORPO is this plus the NLL of the chosen rows.

    `-beta log s(log odds(q_c) - log odds(q_r))` with `odds(q) = exp(q) / (1 - exp(q))`

    Args:
      policy_chosen, policy_rejected: [P] sums of the responses' token log-probs in nats.
      chosen_tokens, rejected_tokens: [P] scored tokens of each response, of any real or integer type.
      beta: the paper's lambda, weight of the term beside the NLL, above 0.

    Returns:
      losses [P]; `rewards/chosen` = beta q_c and `rewards/rejected` = beta q_r; `logps/chosen`, `logps/rejected`, the
      averages; `log_odds_chosen`, the difference of the log odds, and `log_odds_ratio`, its log s; [P] each.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 4 to 7.
    """
    ratios.check(beta)
    q_c, q_r = _averages(policy_chosen, policy_rejected, chosen_tokens, rejected_tokens)
    log_odds = _log_odds(q_c) - _log_odds(q_r)
    log_ratio = jax.nn.log_sigmoid(log_odds)
    logged = {**_logged(q_c, q_r, beta), "log_odds_chosen": log_odds, "log_odds_ratio": log_ratio}
    return -beta * log_ratio, logged


def simpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> PairLosses:
    """SimPO: averages as rewards, and a margin that the pair has to reach.

    `-(1 - label_smoothing) log s(m) - label_smoothing log s(-m)` with `m = beta (q_c - q_r - gamma_beta_ratio)`

    Args:
      policy_chosen, policy_rejected, chosen_tokens, rejected_tokens: as in `orpo`.
      beta: scale of the rewards, above 0.
      gamma_beta_ratio: the target margin, the paper's gamma / beta, in nats a token.
      label_smoothing: probability that a label is swapped, in [0, 0.5).
      alpha: see `alpha_reward`, which takes the place of q_c and q_r; 0 leaves them.

    Returns:
      losses [P]; `rewards/chosen` = beta q_c and `rewards/rejected` = beta q_r; `logps/chosen`, `logps/rejected`, the
      averages; [P] each.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Meng et al. 2024, https://arxiv.org/abs/2405.14734, eq. 6.
    """
    ratios.check(beta, label_smoothing)
    q_c, q_r = _averages(policy_chosen, policy_rejected, chosen_tokens, rejected_tokens)
    margin = alpha_reward(q_c, alpha) - alpha_reward(q_r, alpha) - gamma_beta_ratio
    return ratios.smoothed(beta * margin, label_smoothing), _logged(q_c, q_r, beta, alpha)


def cpo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> PairLosses:
    """CPO's preference term: DPO against a uniform reference; CPO is this plus the NLL of the chosen responses.

    `-(1 - label_smoothing) log s(m) - label_smoothing log s(-m)` with `m = beta (p_c - p_r)`

    Args:
      policy_chosen, policy_rejected: [P] sums of the responses' token log-probs in nats.
      beta: scale of the rewards, above 0.
      label_smoothing: probability that a label is swapped, in [0, 0.5).
      alpha: see `alpha_reward`, which takes the place of p_c and p_r; 0 leaves them.

    Returns:
      losses [P]; `rewards/chosen` = beta p_c and `rewards/rejected` = beta p_r; `logps/chosen`, `logps/rejected`, the
      sums; [P] each.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Xu et al. 2024, https://arxiv.org/abs/2401.08417, eq. 3.
    """
    ratios.check(beta, label_smoothing)
    p_c, p_r = _float32(policy_chosen, policy_rejected)
    margin = alpha_reward(p_c, alpha) - alpha_reward(p_r, alpha)
    return ratios.smoothed(beta * margin, label_smoothing), _logged(p_c, p_r, beta, alpha)


def cpo_hinge(policy_chosen: Array, policy_rejected: Array, *, beta: float = 0.1, alpha: float = 0.0) -> PairLosses:
    """CPO's preference term as SLiC's hinge on log-probs: no gradient once a pair is apart by 1 / beta nats.

    `max(0, 1 - beta (p_c - p_r))`

    Args:
      policy_chosen, policy_rejected: [P] sums of the responses' token log-probs in nats.
      beta: reciprocal of the wanted margin in nats, above 0.
      alpha: see `alpha_reward`, which takes the place of p_c and p_r; 0 leaves them.

    Returns:
      losses [P], and what is logged, as in `cpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425.
    """
    ratios.check(beta)
    p_c, p_r = _float32(policy_chosen, policy_rejected)
    margin = alpha_reward(p_c, alpha) - alpha_reward(p_r, alpha)
    return jax.nn.relu(1 - beta * margin), _logged(p_c, p_r, beta, alpha)


def cpo_ipo(
    policy_chosen: Array,
    policy_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.1,
    alpha: float = 0.0,
) -> PairLosses:
    """CPO's preference term as IPO's squared distance of the averages' margin from a fixed target.

    `(q_c - q_r - 1 / (2 beta))^2`

    Args:
      policy_chosen, policy_rejected, chosen_tokens, rejected_tokens: as in `orpo`.
      beta: IPO's tau, above 0: the target is 1 / (2 beta) nats a token.
      alpha: see `alpha_reward`, which takes the place of q_c and q_r; 0 leaves them.

    Returns:
      losses [P] in nats squared, and what is logged, as in `simpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, with a uniform reference.
    """
    ratios.check(beta)
    q_c, q_r = _averages(policy_chosen, policy_rejected, chosen_tokens, rejected_tokens)
    margin = alpha_reward(q_c, alpha) - alpha_reward(q_r, alpha)
    return ratios.square(margin - 1 / (2 * beta)), _logged(q_c, q_r, beta, alpha)


def alpha_reward(log_prob: Array, alpha: float) -> Array:
    """AlphaPO's reward of a log-prob [P], `(1 - exp(-alpha log_prob)) / alpha`; at alpha = 0 the log-prob itself.

    Above 0 an unlikely response changes the reward more than a likely one, below 0 less.

    References:
      Gupta et al. 2025, https://arxiv.org/abs/2501.03884.
    """
    return ratios.box_cox(log_prob, -alpha)


def _float32(*values: Array) -> list[Array]:
    return [jnp.asarray(x, jnp.float32) for x in values]


def _averages(
    policy_chosen: Array, policy_rejected: Array, chosen_tokens: Array, rejected_tokens: Array
) -> tuple[Array, Array]:
    """q_c and q_r [P] in float32."""
    chosen, rejected = _float32(policy_chosen, policy_rejected)
    return ratios.average(chosen, chosen_tokens), ratios.average(rejected, rejected_tokens)


def _log_odds(log_prob: Array) -> Array:
    """log(p / (1 - p)) [P] of p = exp(log_prob); a response without doubt (or a filler) is taken at p = 1 - 1e-7."""
    log_prob = jnp.minimum(log_prob, -1e-7)
    return log_prob - jnp.log(-jnp.expm1(log_prob))


def _logged(chosen: Array, rejected: Array, beta: float, alpha: float = 0.0) -> dict[str, Array]:
    """The implicit rewards of a pair and the log-probs that they come from, [P] each."""
    rewards = ratios.rewards(alpha_reward(chosen, alpha), alpha_reward(rejected, alpha), beta)
    return {**rewards, "logps/chosen": chosen, "logps/rejected": rejected}
