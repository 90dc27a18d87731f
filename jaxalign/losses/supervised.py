"""Losses of the tokens of a text that is to be imitated: log-probs [R, T] in, one loss a token out."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array


def nll(logps: Array) -> Array:
    """The negative log-likelihood of each token.

    Args:
      logps: [R, T] log-probs in nats.

    Returns:
      [R, T] float32 in nats.
    """
    return -jnp.asarray(logps, jnp.float32)


def dft(logps: Array) -> Array:
    """Dynamic fine-tuning: the NLL times the token's own probability, through which no gradient goes.

    Undoes the weight 1 / p that a token's gradient has in the NLL, so that unlikely tokens don't dominate.

    Args:
      logps: [R, T] log-probs in nats.

    Returns:
      [R, T] float32 in nats.

    References:
      Wu et al. 2025, https://arxiv.org/abs/2508.05629 (DFT).
    """
    logps = jnp.asarray(logps, jnp.float32)
    return -jax.lax.stop_gradient(jnp.exp(logps)) * logps


TOKEN_LOSSES: Mapping[str, Callable[[Array], Array]] = {"sft": nll, "dft": dft}
"""The losses of tokens as `loss.name` selects them."""
