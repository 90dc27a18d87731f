"""What is sampled from: the golden file of transformers' processors, a sorting oracle, and each limit by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import case

from jaxalign import filters

filter_logits = jax.jit(filters.filter_logits)


def probabilities(logits, limits, *, context=None, counts=0):
    rows, n_vocab = logits.shape
    seen = jnp.zeros((rows, n_vocab), bool) if context is None else filters.members(jnp.asarray(context), n_vocab)
    marks = filters.marks(jax.tree.map(jnp.asarray, limits), seen)
    counts = np.broadcast_to(np.int32(counts), (rows,))
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits), marks, counts, limits)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("temperature_0.7", dict(temperature=0.7)),
        ("top_k_20", dict(top_k=20)),
        ("top_p_0.9", dict(top_p=0.9)),
        ("min_p_0.1", dict(min_p=0.1)),
        ("repetition_penalty_1.3", dict(repetition_penalty=1.3)),
        ("all", dict(repetition_penalty=1.3, temperature=0.7, top_k=50, top_p=0.9, min_p=0.02)),
    ],
)
def test_goldens_of_the_filters_with_their_exact_zeros(name, settings):
    _, arrays = case("llama", "sampling_warpers")
    limits = filters.make_limits(5, max_new=1, **{"temperature": 1.0} | settings)
    got = probabilities(arrays["in.logits"], limits, context=arrays["in.context_ids"])
    want = arrays[f"out.probs.{name}"]
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


def by_sorting(logits, *, temperature, top_k, top_p, min_p):
    """One row's probabilities in float64; tokens as likely as the last one kept are kept."""
    scaled = logits.astype(np.float64) / temperature
    keep = np.ones(len(scaled), bool)
    if top_k:
        keep &= scaled >= np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
    p = np.where(keep, np.exp(scaled - scaled.max()), 0)
    p /= p.sum()
    if top_p < 1:
        above = np.array([p[scaled > one].sum() for one in scaled])
        keep &= above < top_p
    keep &= p >= min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "ties"])
def test_every_row_has_its_own_filters_and_bisection_finds_what_sorting_finds(tied):
    random = np.random.default_rng(1)
    rows, n_vocab = 64, 97
    logits = (random.normal(size=(rows, n_vocab)) * random.uniform(0.1, 30, (rows, 1))).astype(np.float32)
    if tied:
        logits = np.round(logits)
    given = dict(
        temperature=random.choice([0.25, 1.0, 2.0], rows),
        top_k=random.choice([0, 1, 5, 40, 97, 1000], rows),
        top_p=random.choice([1e-6, 0.3, 0.83, 0.97, 1.0], rows),
        min_p=random.choice([0.0, 0.013, 0.31, 1.0], rows),
    )
    got = probabilities(logits, filters.make_limits(rows, max_new=1, **given))
    for row in range(rows):
        want = by_sorting(logits[row], **{name: values[row] for name, values in given.items()})
        np.testing.assert_array_equal(got[row] > 1e-30, want > 1e-30, err_msg=str(row))
        np.testing.assert_allclose(got[row], want, atol=2e-6)


def test_stop_ids_wait_for_min_new_and_bad_ids_never_come():
    logits = np.zeros((3, 8), np.float32)
    limits = filters.make_limits(3, max_new=9, min_new=[0, 2, 3], temperature=1.0, stop_ids=[2, 5], bad_ids=[7])
    early, late = (probabilities(logits, limits, counts=counts) for counts in (1, 2))
    assert [sorted(np.flatnonzero(row == 0)) for row in early] == [[7], [2, 5, 7], [2, 5, 7]]
    assert [sorted(np.flatnonzero(row == 0)) for row in late] == [[7], [7], [2, 5, 7]]


def test_greedy_rows_take_the_likeliest_that_is_allowed_after_the_penalty():
    logits = np.array([[3.0, 2.0, -0.5, -1.0]], np.float32)
    greedy = dict(max_new=1, top_k=1, top_p=0.1, min_p=0.9)
    assert probabilities(logits, filters.make_limits(1, **greedy)).argmax() == 0
    assert probabilities(logits, filters.make_limits(1, **greedy, bad_ids=[0])).argmax() == 1
    penalised = filters.make_limits(1, max_new=1, repetition_penalty=4.0)
    assert probabilities(logits, penalised, context=[[0, 2]]).argmax() == 1
    np.testing.assert_allclose(  # positive logits are divided, negative ones multiplied
        probabilities(logits, penalised, context=[[0, 2]])[0],
        jax.nn.softmax(jnp.array([0.75, 2.0, -2.0, -1.0])),
        rtol=1e-5,
    )


def test_what_changes_nothing_is_known_to():
    plain = dict(max_new=4, temperature=[0.0, 0.7])
    counts = np.array([1, 0], np.int32)
    assert not filters.changes(filters.make_limits(2, **plain, stop_ids=[3]), counts)
    assert not filters.changes(filters.make_limits(2, **plain, top_k=[5, 0], min_new=[1, 0]), counts)
    for name, value in dict(top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, min_new=1, bad_ids=[2]).items():
        assert filters.changes(filters.make_limits(2, **plain, **{name: value}), counts), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new=3, temperature=-1.0), "temperature"),
        (dict(max_new=3, temperature=float("nan")), "temperature"),
        (dict(max_new=3, top_p=0.0), "top_p is 0.0, expected finite numbers above 0 and at most 1"),
        (dict(max_new=3, top_p=1.5), "top_p"),
        (dict(max_new=3, min_p=-0.1), "min_p"),
        (dict(max_new=3, top_k=-1), "top_k"),
        (dict(max_new=3, repetition_penalty=0.0), "repetition_penalty is 0.0, expected finite numbers above 0"),
        (dict(max_new=3, min_new=-1), "min_new"),
        (dict(max_new=-3), "max_new"),
        (dict(max_new=[1, 2, 3]), "each of 2 rows"),
        (dict(max_new=3, stop_ids=[-2]), "stop ids"),
        (dict(max_new=3, bad_ids=[-2]), "bad ids"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        filters.make_limits(2, **arguments)


def test_blocks_then_tokens_are_drawn_from_the_softmax_and_never_what_is_removed():
    """Chi-square over 20,000 draws in blocks of 4; so many degrees of freedom pass the limit once in 1,000."""
    rows, rng = 20_000, np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 64).astype(np.float32)
    logits[rng.permutation(64)[:20]] = -np.inf
    logits[12:16] = -np.inf  # a whole block
    limits = filters.make_limits(rows, max_new=1, temperature=[1.0] * (rows - 1) + [0.0])
    keys = jax.random.split(jax.random.key(5), rows)
    counts = jnp.arange(rows, dtype=jnp.int32) % 3
    assert filters.block_width(64) == 4 and filters.block_width(60) == 1 and filters.block_width(49152) == 256

    @jax.jit
    def draw(logits_BV, *request):
        return filters.draw(logits_BV, filters.block_weights(logits_BV), *request)

    drawn = np.asarray(draw(jnp.broadcast_to(logits, (rows, 64)), keys, counts, limits))
    assert drawn[-1] == logits.argmax()
    seen = np.bincount(drawn[:-1], minlength=64)
    p = np.exp(logits) / np.exp(logits).sum()
    assert not seen[p == 0].any()
    possible = p > 0
    wanted = p[possible] * (rows - 1)
    assert possible.sum() == 41 and ((seen[possible] - wanted) ** 2 / wanted).sum() < 73.5  # 40 degrees of freedom
    # A row draws what it draws alone.
    first = jax.tree.map(lambda x: x[:1], (keys, counts, limits))
    alone = draw(jnp.asarray(logits)[None], *first)
    assert alone[0] == drawn[0]
