"""Losses that bring a student's distribution to a teacher's, token by token.

Letters: V vocabulary; `...` any leading dimensions (rows, time).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array


def generalized_jsd(
    student_logits: Array, teacher_logits: Array, mask: Array, *, beta: float = 0.5, temperature: float = 1.0
) -> Array:
    """The generalised Jensen-Shannon divergence of student and teacher at each token, summed over the vocabulary.

    `beta KL(teacher || m) + (1 - beta) KL(student || m)` with `m = beta teacher + (1 - beta) student`. At its ends this
    is 0, and what it tends to there when divided by beta (1 - beta) takes its place: `KL(teacher || student)` for beta
    0 and `KL(student || teacher)` for beta 1.

    Args:
      student_logits: [..., V] of any float type.
      teacher_logits: [..., V]; no gradient goes through it.
      mask: [...] True where a token counts; elsewhere the loss is 0, whatever the logits are.
      beta: the mixture's share of the teacher, in [0, 1].
      temperature: both logits are divided by it, above 0.

    Returns:
      losses [...] in nats, float32.

    Raises:
      ValueError: beta or temperature is a number out of its range.

    References:
      Agarwal et al. 2024 (GKD), https://arxiv.org/abs/2306.13649, eq. 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, expected the teacher's share of the mixture, in [0, 1]")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")
    mask = jnp.asarray(mask, bool)
    # Both sides of a choice are differentiated: a token that doesn't count gets logits that can't spoil the rest.
    student, teacher = (
        jax.nn.log_softmax(jnp.where(mask[..., None], x, 0).astype(jnp.float32) / temperature)
        for x in (student_logits, jax.lax.stop_gradient(teacher_logits))
    )
    if beta == 0:
        losses = _kl(teacher, student)
    elif beta == 1:
        losses = _kl(student, teacher)
    else:
        mixture = jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
        losses = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return jnp.where(mask, losses, 0)


def _kl(p: Array, q: Array) -> Array:
    """KL(p || q) [...] of log-probabilities [..., V]."""
    return (jnp.exp(p) * (p - q)).sum(axis=-1)
