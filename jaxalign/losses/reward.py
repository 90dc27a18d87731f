"""Losses of reward models: from the scores that a model gives to what it is to learn. No log-probs here.

Letters: P pairs, E examples, K attributes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def bradley_terry(
    chosen: Array, rejected: Array, margin: Array | None = None, *, center_rewards_coefficient: float = 0.0
) -> Array:
    """The negative log-likelihood that the chosen response wins; with a margin, that it wins by that much.

    `-log s(chosen - rejected - margin) + center_rewards_coefficient (chosen + rejected)^2`

    Args:
      chosen, rejected: [P] scores of the two responses, of any float type; the loss is computed in float32.
      margin: [P] how far apart the two are to be, or None (0): Llama 2's m(rating).
      center_rewards_coefficient: weight of what keeps a pair's scores around 0, at least 0.

    Returns:
      losses [P] in nats.

    Raises:
      ValueError: center_rewards_coefficient is negative or not finite.

    References:
      Touvron et al. 2023 (Llama 2), https://arxiv.org/abs/2307.09288, eq. 2.
      Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244 (centring).
    """
    if not 0 <= center_rewards_coefficient < float("inf"):
        raise ValueError(
            f"center_rewards_coefficient is {center_rewards_coefficient}, expected a finite number >= 0 (usual: 0.01)"
        )
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    losses = -jax.nn.log_sigmoid(chosen - rejected - (0.0 if margin is None else margin))
    if center_rewards_coefficient:
        losses += center_rewards_coefficient * jnp.square(chosen + rejected)
    return losses


def attributes(values: Array, scores: Array) -> Array:
    """Squared errors of a model with one head an attribute: [E, K] float32, 0 where an attribute was not scored.

    Args:
      values: [E, K] the heads' outputs.
      scores: [E, K] what people gave; NaN: not scored.

    References:
      Wang et al. 2024 (ArmoRM), https://arxiv.org/abs/2406.12845.
    """
    scored = ~jnp.isnan(scores)
    return jnp.square(jnp.where(scored, values.astype(jnp.float32) - jnp.where(scored, scores, 0), 0))


def compose(values: Array, reward_weights: Sequence[float] | None) -> Array:
    """One reward [...] of K attributes [..., K]: their weighted sum, or (None) their mean. Weights may be negative."""
    n = values.shape[-1]
    weights = jnp.full(n, 1 / n) if reward_weights is None else jnp.asarray(reward_weights, jnp.float32)
    return (values * weights).sum(axis=-1)
