"""Losses of preference pairs against a reference model that look at the margin between the two responses.

Each function is called alike: four arrays of sequence log-probs by position, then keywords. It returns one loss a pair
and what is logged of each pair; means, weights and filler pairs are the caller's business. The letters of the formulas
are those of ratios.py. `f_divergence_type` other than reverse_kl puts `ratios.f_divergence` of c and of r in their
place; rewards stay those of c and r.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxalign.losses import ratios
from jaxalign.losses.ratios import PairLosses


def dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """DPO's sigmoid loss; with label smoothing, conservative DPO: a label is wrong with that probability.

    `-(1 - label_smoothing) log s(beta d) - label_smoothing log s(-beta d)`

    Args:
      policy_chosen: [P] sums of the chosen responses' token log-probs under the policy, in nats.
      policy_rejected: [P] the same of the rejected responses.
      ref_chosen: [P] the same of the chosen responses under the reference; no gradient goes through it.
      ref_rejected: [P] the same of the rejected responses under the reference.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: probability that a label is swapped, in [0, 0.5).
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and the implicit rewards `rewards/chosen` = beta c and `rewards/rejected` = beta r, [P] each.

    Raises:
      ValueError: beta, label_smoothing or f_divergence_type is out of its range.

    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
      Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3.
    """
    ratios.check(beta, label_smoothing)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    return ratios.smoothed(beta * (c_score - r_score), label_smoothing), ratios.rewards(c, r, beta)


def hinge(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """SLiC's hinge on DPO's margin: no gradient once a pair is apart by 1 / beta nats.

    `max(0, 1 - beta d)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: reciprocal of the wanted margin in nats, above 0.
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta or f_divergence_type is out of its range.

    References:
      Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425.
      Liu et al. 2023 (RSO, its normalised hinge), https://arxiv.org/abs/2309.06657, section 3.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    return jax.nn.relu(1 - beta * (c_score - r_score)), ratios.rewards(c, r, beta)


def ipo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.1,
    length_normalize: bool = True,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """IPO: the squared distance of the log-ratio gap from a fixed target, so that it can't grow without bound.

    `(c / n_c - r / n_r - 1 / (2 beta))^2`; without length_normalize `(c - r - 1 / (2 beta))^2`

    The paper writes sequence log-probs; its authors confirmed that averages are meant, so averages are the default.

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      chosen_tokens, rejected_tokens: [P] scored tokens of each response, of any real or integer type. 0 (a filler)
        divides by 1.
      beta: the paper's tau, above 0: the target gap is 1 / (2 beta) nats (a token, when averaged).
      length_normalize: compare averages over tokens rather than sums.
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P] in nats squared, and `rewards/chosen`, `rewards/rejected` [P] from the sums, as in `dpo`.

    Raises:
      ValueError: beta or f_divergence_type is out of its range.

    References:
      Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    if length_normalize:
        c_score, r_score = ratios.average(c_score, chosen_tokens), ratios.average(r_score, rejected_tokens)
    return ratios.square(c_score - r_score - 1 / (2 * beta)), ratios.rewards(c, r, beta)


def robust(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """Robust DPO: an unbiased estimate of the clean DPO loss when labels are swapped with a known probability.

    `(-(1 - label_smoothing) log s(beta d) + label_smoothing log s(-beta d)) / (1 - 2 label_smoothing)`

    Its mean over swapped and unswapped labels is DPO's loss on clean ones; a single pair's may be negative.

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: the paper's epsilon, probability that a label is swapped, in [0, 0.5).
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta, label_smoothing or f_divergence_type is out of its range.

    References:
      Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, section 3.
    """
    ratios.check(beta, label_smoothing)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (c_score - r_score)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) + label_smoothing * jax.nn.log_sigmoid(-scaled)
    return losses / (1 - 2 * label_smoothing), ratios.rewards(c, r, beta)


def sigmoid_norm(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """Length-normalised DPO: the sigmoid loss on per-token averages, so that a long response weighs no more.

    `-log s(beta (c / n_c - r / n_r))`

    Averages are smaller than sums by a response's length, and so beta is usually larger (Tulu 3 uses 5).

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      chosen_tokens, rejected_tokens: [P] scored tokens of each response, as in `ipo`.
      beta: strength of the pull towards the reference, above 0.
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] from the sums, as in `dpo`.

    Raises:
      ValueError: beta or f_divergence_type is out of its range.

    References:
      Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, section 5.
    """
    ratios.check(beta)
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    margin = ratios.average(c_score, chosen_tokens) - ratios.average(r_score, rejected_tokens)
    return -jax.nn.log_sigmoid(beta * margin), ratios.rewards(c, r, beta)


def exo_pair(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """EXO for pairs: the reverse KL from the policy's choice between the two responses to the smoothed label.

    `s(beta d) (log s(beta d) - log(1 - label_smoothing)) + s(-beta d) (log s(-beta d) - log label_smoothing)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: the label's probability of the rejected response, in (0, 0.5); at 0 the loss is infinite.
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta, label_smoothing or f_divergence_type is out of its range.

    References:
      Ji et al. 2024, https://arxiv.org/abs/2402.00856, eq. 16.
    """
    ratios.check(beta, label_smoothing)
    if isinstance(label_smoothing, int | float) and label_smoothing == 0:
        raise ValueError("label_smoothing is 0, expected a probability in (0, 0.5) for exo_pair (the paper: 0.001)")
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (c_score - r_score)
    chosen = jax.nn.sigmoid(scaled) * (jax.nn.log_sigmoid(scaled) - jnp.log1p(-label_smoothing))
    rejected = jax.nn.sigmoid(-scaled) * (jax.nn.log_sigmoid(-scaled) - jnp.log(label_smoothing))
    return chosen + rejected, ratios.rewards(c, r, beta)


def discopop(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLosses:
    """DiscoPOP's log-ratio modulated loss: logistic where the pair is ordered wrongly, exponential where rightly.

    `-(1 - m) log s(beta d) + m exp(-beta d)` with `m = s(beta d / discopop_tau)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.
      discopop_tau: how softly one part gives way to the other, in (0, 1]; above 1 the loss has no bound in practice.
      f_divergence_type, f_alpha_divergence_coef: see `ratios.f_divergence`.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta, discopop_tau or f_divergence_type is out of its range.

    References:
      Lu et al. 2024, https://arxiv.org/abs/2406.08414, eq. 5.
    """
    ratios.check(beta)
    if isinstance(discopop_tau, int | float) and not 0 < discopop_tau <= 1:
        raise ValueError(f"discopop_tau is {discopop_tau}, expected a number in (0, 1] (the paper: 0.05)")
    c, r = ratios.log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    c_score, r_score = _scores(c, r, f_divergence_type, f_alpha_divergence_coef)
    scaled = beta * (c_score - r_score)
    logistic = -jax.nn.log_sigmoid(scaled) * jax.nn.sigmoid(-scaled / discopop_tau)
    # m exp(-beta d) in one exponential: of a pair far on the wrong side its factors are 0 and infinite.
    exponential = jnp.exp(jax.nn.log_sigmoid(scaled / discopop_tau) - scaled)
    return logistic + exponential, ratios.rewards(c, r, beta)


def _scores(c: Array, r: Array, f_divergence_type: str, f_alpha_divergence_coef: float) -> tuple[Array, Array]:
    """What stands for c and r under the f-divergence, [P] each."""
    chosen, rejected = (ratios.f_divergence(x, f_divergence_type, f_alpha_divergence_coef) for x in (c, r))
    return chosen, rejected
