"""Losses of preference pairs against a reference model.

Each function is called alike: four arrays of sequence log-probs by position, then keywords. It returns one loss a pair
and what is logged of each pair; means, weights and filler pairs are the caller's business.

Letters of the formulas: `P` pairs; `c` = policy - reference log-prob of the chosen response, `r` = the same of the
rejected one, `d = c - r`; `n_c` and `n_r` = their lengths in scored tokens; `s` = the logistic function.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

PairLosses = tuple[Array, dict[str, Array]]
"""(losses [P], {name: values [P]}), float32: nats or their squares, and TRL's names of what is logged of a pair."""


def dpo(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
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

    Returns:
      losses [P], and the implicit rewards `rewards/chosen` = beta c and `rewards/rejected` = beta r, [P] each.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7.
      Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3.
    """
    _check(beta, label_smoothing)
    c, r = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    scaled = beta * (c - r)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) - label_smoothing * jax.nn.log_sigmoid(-scaled)
    return losses, _rewards(c, r, beta)


def hinge(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
) -> PairLosses:
    """SLiC's hinge on DPO's margin: no gradient once a pair is apart by 1 / beta nats.

    `max(0, 1 - beta d)`

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: reciprocal of the wanted margin in nats, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Zhao et al. 2023 (SLiC-HF), https://arxiv.org/abs/2305.10425.
      Liu et al. 2023 (RSO, its normalised hinge), https://arxiv.org/abs/2309.06657, section 3.
    """
    _check(beta)
    c, r = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return jax.nn.relu(1 - beta * (c - r)), _rewards(c, r, beta)


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

    Returns:
      losses [P] in nats squared, and `rewards/chosen`, `rewards/rejected` [P] from the sums, as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.
    """
    _check(beta)
    c, r = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    gap = _average(c, chosen_tokens) - _average(r, rejected_tokens) if length_normalize else c - r
    return jnp.square(gap - 1 / (2 * beta)), _rewards(c, r, beta)


def robust(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Robust DPO: an unbiased estimate of the clean DPO loss when labels are swapped with a known probability.

    `(-(1 - label_smoothing) log s(beta d) + label_smoothing log s(-beta d)) / (1 - 2 label_smoothing)`

    Its mean over swapped and unswapped labels is DPO's loss on clean ones; a single pair's may be negative.

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      beta: strength of the pull towards the reference, above 0.
      label_smoothing: the paper's epsilon, probability that a label is swapped, in [0, 0.5).

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] as in `dpo`.

    Raises:
      ValueError: beta or label_smoothing is a number out of its range.

    References:
      Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409, section 3.
    """
    _check(beta, label_smoothing)
    c, r = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    scaled = beta * (c - r)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled) + label_smoothing * jax.nn.log_sigmoid(-scaled)
    return losses / (1 - 2 * label_smoothing), _rewards(c, r, beta)


def sigmoid_norm(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    *,
    chosen_tokens: Array,
    rejected_tokens: Array,
    beta: float = 0.1,
) -> PairLosses:
    """Length-normalised DPO: the sigmoid loss on per-token averages, so that a long response weighs no more.

    `-log s(beta (c / n_c - r / n_r))`

    Averages are smaller than sums by a response's length, and so beta is usually larger (Tulu 3 uses 5).

    Args:
      policy_chosen, policy_rejected, ref_chosen, ref_rejected: [P] sums of token log-probs in nats, as in `dpo`.
      chosen_tokens, rejected_tokens: [P] scored tokens of each response, as in `ipo`.
      beta: strength of the pull towards the reference, above 0.

    Returns:
      losses [P], and `rewards/chosen`, `rewards/rejected` [P] from the sums, as in `dpo`.

    Raises:
      ValueError: beta is a number out of its range.

    References:
      Lambert et al. 2024 (Tulu 3), https://arxiv.org/abs/2411.15124, section 5.
    """
    _check(beta)
    c, r = _log_ratios(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    losses = -jax.nn.log_sigmoid(beta * (_average(c, chosen_tokens) - _average(r, rejected_tokens)))
    return losses, _rewards(c, r, beta)


@dataclass(frozen=True)
class Preference:
    """A loss of this file as `loss.name` selects it; all that is known of it is read from its signature."""

    function: Callable[..., PairLosses]

    @property
    def takes_tokens(self) -> bool:
        """Whether `chosen_tokens` and `rejected_tokens` [P] are to be given."""
        return "chosen_tokens" in inspect.signature(self.function).parameters

    @property
    def options(self) -> dict[str, float | bool]:
        """The keyword options that a config may set, with their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def at_reference(self, **options: float | bool) -> float:
        """The loss of a pair whose policy is its reference, as at the first step: log 2 for the sigmoid losses."""
        zero = jnp.zeros((1,), jnp.float32)
        tokens = {"chosen_tokens": zero, "rejected_tokens": zero} if self.takes_tokens else {}
        return float(self.function(zero, zero, zero, zero, **tokens, **options)[0][0])


LOSSES: dict[str, Preference] = {
    "sigmoid": Preference(dpo),
    "hinge": Preference(hinge),
    "ipo": Preference(ipo),
    "robust": Preference(robust),
    "sigmoid_norm": Preference(sigmoid_norm),
}


def _log_ratios(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array
) -> tuple[Array, Array]:
    """c and r [P] in float32; the reference is data, so no gradient reaches it."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (
        jnp.asarray(x, jnp.float32) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    )
    return policy_chosen - jax.lax.stop_gradient(ref_chosen), policy_rejected - jax.lax.stop_gradient(ref_rejected)


def _average(log_ratios: Array, tokens: Array) -> Array:
    """[P] nats -> [P] nats a token; a filler has no tokens and keeps a finite value and gradient."""
    return log_ratios / jnp.maximum(jnp.asarray(tokens, jnp.float32), 1)


def _rewards(c: Array, r: Array, beta: float) -> dict[str, Array]:
    """The implicit rewards of a pair, [P] each."""
    return {"rewards/chosen": beta * c, "rewards/rejected": beta * r}


def _check(beta: float, label_smoothing: float = 0.0) -> None:
    """Refuse numbers out of range; an array (a beta that changes during a run) can't be read inside jit."""
    if isinstance(beta, int | float) and not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}, expected a finite number above 0 (usual: 0.01 to 0.5)")
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, expected a probability in [0, 0.5): at 0.5 labels say nothing"
        )
