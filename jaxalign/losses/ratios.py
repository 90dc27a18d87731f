"""What the losses of pairs share: log-ratios, f-divergences, averages, rewards, and the check of their numbers.

Letters of the formulas here and in the losses: `P` pairs; `c` = policy - reference log-prob of the chosen response,
`r` = the same of the rejected one, `d = c - r`; `n_c` and `n_r` = their lengths in scored tokens; `s` = the logistic
function.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

PairLosses = tuple[Array, dict[str, Array]]
"""(losses [P], {name: values [P]}), float32: nats or their squares, and TRL's names of what is logged of a pair."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

_LARGEST_EXPONENT = 80.0  # exp of it is a float32; what reaches it has no gradient


def log_ratios(
    policy_chosen: Array, policy_rejected: Array, ref_chosen: Array, ref_rejected: Array
) -> tuple[Array, Array]:
    """c and r [P] in float32; the reference is data, so no gradient reaches it."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = (
        jnp.asarray(x, jnp.float32) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    )
    return policy_chosen - jax.lax.stop_gradient(ref_chosen), policy_rejected - jax.lax.stop_gradient(ref_rejected)


def f_divergence(log_ratio: Array, f_divergence_type: str, f_alpha_divergence_coef: float) -> Array:
    """f'(u) of u = exp(log_ratio), which takes the place of log u where another divergence than KL holds the policy.

    - `reverse_kl`: log u (plain DPO)
    - `forward_kl`: 1 - 1 / u
    - `js_divergence`: log(2 u / (1 + u))
    - `alpha_divergence`: (u^(a - 1) - 1) / (a - 1) with a = f_alpha_divergence_coef; reverse_kl is a = 1, forward_kl 0

    The term that the partition function leaves cancels in a difference of two, so only losses of d may use it.

    Args:
      log_ratio: [P] c or r, float32.
      f_divergence_type: one of F_DIVERGENCES.
      f_alpha_divergence_coef: a; read by alpha_divergence alone.

    Raises:
      ValueError: f_divergence_type is none of F_DIVERGENCES.

    References:
      Wang et al. 2023 (f-DPO), https://arxiv.org/abs/2309.16240, table 1; the a of its last row is 1 - a here.
    """
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type is {f_divergence_type!r}, expected one of {', '.join(F_DIVERGENCES)}")
    if f_divergence_type == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(log_ratio)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(f_divergence_type, f_alpha_divergence_coef - 1)
    return box_cox(log_ratio, power)


def box_cox(x: Array, power: float) -> Array:
    """(exp(x)^power - 1) / power, [P]; x itself in the limit, power = 0."""
    if abs(power) < 1e-6:
        return x
    return jnp.expm1(jnp.minimum(power * x, _LARGEST_EXPONENT)) / power


def average(values: Array, tokens: Array) -> Array:
    """[P] nats -> [P] nats a token; a filler has no tokens and keeps a finite value and gradient."""
    return values / jnp.maximum(jnp.asarray(tokens, jnp.float32), 1)


def square(x: Array) -> Array:
    """x^2, without a gradient where it would not be a float32."""
    return jnp.square(jnp.clip(x, -1e18, 1e18))


def smoothed(margin: Array, label_smoothing: float) -> Array:
    """`-(1 - label_smoothing) log s(margin) - label_smoothing log s(-margin)`, [P]."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def rewards(c: Array, r: Array, beta: float) -> dict[str, Array]:
    """The implicit rewards of a pair, [P] each."""
    return {"rewards/chosen": beta * c, "rewards/rejected": beta * r}


def check(beta: float, label_smoothing: float = 0.0) -> None:
    """Refuse numbers out of range; an array (a beta that changes during a run) can't be read inside jit."""
    if isinstance(beta, int | float) and not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}, expected a finite number above 0 (usual: 0.01 to 0.5)")
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, expected a probability in [0, 0.5): at 0.5 labels say nothing"
        )
