"""Distillation losses: TRL's numbers, the formula in float64, and what a mask and a temperature do."""

import jax
import numpy as np
import pytest
from common import LOSS, case

from jaxalign.losses import distillation


def logits(seed=0, shape=(2, 5, 11)):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 2, shape).astype(np.float32) for _ in range(2)], rng.random(shape[:2]) < 0.7


def oracle(student, teacher, beta, temperature):
    """Agarwal et al. 2024, eq. 1, in float64: [..., V] -> [...]."""

    def softmax(x):
        e = np.exp(np.float64(x) / temperature - np.max(np.float64(x) / temperature, axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    kl = lambda p, q: (p * np.log(p / q)).sum(axis=-1)  # noqa: E731
    p, q = softmax(teacher), softmax(student)
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


@pytest.mark.parametrize("name", ["gkd_jsd_0", "gkd_jsd_1"])
def test_loss_and_gradient_equal_trl(name):
    golden, a = case("llama", name)
    mask = a["in.labels"] != -100

    def mean(student):
        return (
            distillation.generalized_jsd(student, a["in.teacher_logits"], mask, **golden["config"]).sum() / mask.sum()
        )

    loss, gradient = jax.value_and_grad(mean)(a["in.student_logits"])
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    want = a["out.grad.student_logits"]
    np.testing.assert_allclose(gradient, want, atol=2e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_mixture_equals_the_formula(beta, temperature):
    (student, teacher), mask = logits()
    losses = distillation.generalized_jsd(student, teacher, mask, beta=beta, temperature=temperature)
    want = oracle(student, teacher, beta, temperature)
    np.testing.assert_allclose(losses, np.where(mask, want, 0), rtol=1e-4, atol=1e-6)
    assert want.min() > 1e-3  # so that a swapped pair of arguments would be seen


def test_the_ends_are_the_limits_of_mixtures_and_equal_models_lose_nothing():
    (student, teacher), mask = logits()
    call = lambda beta: np.asarray(  # noqa: E731
        distillation.generalized_jsd(student, teacher, mask, beta=beta, temperature=5.0)
    )
    for end, near in ((0, 5e-3), (1, 1 - 5e-3)):
        np.testing.assert_allclose(call(near) / (near * (1 - near)), call(end), rtol=0.05)
    same = distillation.generalized_jsd(student, student, mask, beta=0.3)
    np.testing.assert_allclose(same, 0, atol=1e-6)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_what_does_not_count_can_not_spoil_the_rest_and_the_teacher_has_no_gradient(beta):
    (student, teacher), mask = logits()
    mask[0, 0] = False
    bad = student.copy()
    bad[~mask] = np.nan

    def total(student, teacher):
        return distillation.generalized_jsd(student, teacher, mask, beta=beta).sum()

    value, (of_student, of_teacher) = jax.value_and_grad(total, (0, 1))(bad, teacher)
    np.testing.assert_allclose(value, total(student, teacher), rtol=1e-6)
    assert not np.asarray(of_student)[~mask].any() and np.abs(np.asarray(of_student)[mask]).max() > 1e-3
    assert not np.asarray(of_teacher).any()
    # Nothing at all counts: 0, not 0 / 0.
    assert float(distillation.generalized_jsd(student, teacher, mask & False, beta=beta).sum()) == 0


def test_numbers_out_of_range_are_refused():
    (student, teacher), mask = logits()
    for options, message in (({"beta": 1.1}, "beta is 1.1"), ({"temperature": 0.0}, "temperature is 0.0")):
        with pytest.raises(ValueError, match=message):
            distillation.generalized_jsd(student, teacher, mask, **options)
