"""The sampler against the golden files and against a naive one that runs the whole text again for every token."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import case, model
from processes import two_processes

from jaxalign import decoding, filters, logprobs, lora, models, quantize, sampling, sharding
from jaxalign.models import ModelConfig

FAMILIES = ("qwen2", *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "llama_rope3", "qwen3")))

# Layers with a window, without one, and a vocabulary that 8 devices divide.
TINY = ModelConfig(
    model_type="qwen3", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=None, tie_word_embeddings=False, attention_bias=False, attention_out_bias=False, mlp_bias=False,
    qk_norm=True, sliding_windows=(None, 4), hidden_act="silu", initializer_range=0.3, bos_token_id=None,
    eos_token_id=(), pad_token_id=0, dtype="float32",
)  # fmt: skip
PROMPTS = [[5, 9, 23, 41, 7], [11], [33, 2, 60, 17, 29, 8, 51, 3, 44, 12], [19, 6, 38]]
N = 12  # one number of new tokens, and REFILLED, so that most tests share their programs
REFILLED = dict(slots=2, segment_tokens=3)

# Of the four prompts: all that a request can ask for, greedy beside drawn.
ASKED = dict(
    temperature=[0.0, 0.7, 1.0, 1.6],
    top_k=[0, 20, 0, 8],
    top_p=[1.0, 0.9, 0.8, 1.0],
    min_p=[0.0, 0.0, 0.05, 0.0],
    repetition_penalty=[1.2, 1.0, 1.3, 1.0],
    max_new=[12, 12, 12, 5],
    min_new=[3, 0, 5, 0],
)
IDS = dict(stop_ids=[20, 21, 22], bad_ids=[1, 37])

init = jax.jit(models.init, static_argnums=0)
forward = jax.jit(models.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return init(TINY, jax.random.key(3))


def run(params, prompts, keys, limits, *, cfg=TINY, new=N, **options):
    return sampling.sample(cfg, params, prompts, keys, limits, max_new_tokens=new, **options)


@jax.jit
def drawn_from(logits, text, count, limits):
    marks = filters.marks(limits, filters.members(text[None], len(logits)))
    return filters.filter_logits(logits[None], marks, count[None], limits)[0]


@functools.partial(jax.jit, static_argnums=0)
def one_token(cfg, params, text, length, key, count, limits):
    """(token, its three log-probs) after a text [24], of which `length` tokens are real: no cache, no batch."""
    hidden, _ = models.apply(cfg, params, jnp.maximum(text, 0)[None], jnp.arange(24)[None])
    logits = models.unembed(cfg, params, hidden)[0, length - 1]
    filtered, temperature = drawn_from(logits, text, count, limits), limits.temperature[0]
    key, blocks = jax.random.fold_in(key, count), filtered.reshape(-1, filters.block_width(len(filtered)))
    block = jax.random.categorical(key, jax.nn.logsumexp(blocks, axis=1))
    drawn = block * blocks.shape[1] + jax.random.categorical(jax.random.fold_in(key, 0), blocks[block])
    token = jnp.where(temperature > 0, drawn, filtered.argmax())
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    logp, sampling_logp, scaled_logp = (jax.nn.log_softmax(x)[token] for x in (logits, filtered, scaled))
    return token, logp, jnp.where(temperature > 0, sampling_logp, 0), scaled_logp


def naive(cfg, params, prompt, key, limits, row):
    """The oracle: (tokens, logps, sampling_logps, scaled_logps) of one request; the filters have their own tests."""
    limits = jax.tree.map(lambda x: x[row : row + 1], limits)
    found = ([], [], [], [])
    for n in range(int(limits.max_new[0])):
        text = prompt + found[0]
        padded = np.array(text + [filters.NO_ID] * (24 - len(text)), np.int32)
        values = jax.device_get(one_token(cfg, params, padded, np.int32(len(text)), key, np.int32(n), limits))
        for values_n, value in zip(found, values, strict=True):
            values_n.append(value.item())
        if found[0][-1] in limits.stop_ids:
            break
    return found


def assert_is_naive(samples, row, expected):
    n = len(expected[0])
    width = samples.tokens.shape[1]
    assert samples.mask[row].tolist() == [True] * n + [False] * (width - n)
    assert samples.tokens[row].tolist() == expected[0] + [0] * (width - n)
    for values, wanted in zip(samples[2:], expected[1:], strict=True):
        np.testing.assert_allclose(values[row], wanted + [0] * (width - n), atol=1e-5)


@pytest.fixture(scope="module")
def expected(params):
    """What the naive sampler gives for the four prompts, with request_keys(7)."""
    limits = filters.make_limits(4, **ASKED, **IDS)
    keys = sampling.request_keys(7, range(4))
    return [naive(TINY, params, prompt, keys[row], limits, row) for row, prompt in enumerate(PROMPTS)]


def compiled():
    programs = decoding.view, decoding.empty, decoding.prefill, decoding.fill, decoding.segment
    return [program._cache_size() for program in programs]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_goldens_token_for_token(family):
    cfg, params = model(family)
    for name in ("greedy", "greedy_eos"):
        settings, arrays = case(family, name)
        stops = [settings["eos_token_id"]] if name == "greedy_eos" else []
        mask = arrays["in.attention_mask"].astype(bool)
        prompts = [ids[row] for ids, row in zip(arrays["in.input_ids"], mask, strict=True)]
        limits = sampling.make_limits(4, max_new=32, stop_ids=stops)
        samples = run(params, prompts, sampling.request_keys(0, range(4)), limits, cfg=cfg, new=32)
        np.testing.assert_array_equal(samples.tokens, arrays["out.new_tokens"])
        finished = arrays["out.finished_before"].astype(bool) if stops else np.zeros((4, 32), bool)
        assert finished.any() == bool(stops)
        np.testing.assert_array_equal(samples.mask, ~finished)
        np.testing.assert_allclose(samples.logps, np.where(finished, 0, arrays["out.new_token_logps"]), atol=1e-4)
        np.testing.assert_array_equal(samples.sampling_logps, 0)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(), id="together"),
        pytest.param(REFILLED, id="slots refilled"),
        pytest.param(
            dict(slots=1, segment_tokens=50, max_prompt_tokens=40), id="in a wider ring", marks=pytest.mark.slow
        ),
    ],
)
def test_equals_the_naive_sampler_with_the_same_keys_whatever_the_slots(params, expected, options):
    limits = sampling.make_limits(4, **ASKED, **IDS)
    samples = run(params, PROMPTS, sampling.request_keys(7, range(4)), limits, **options)
    assert len({len(tokens) for tokens, *_ in expected}) > 1 and any(t[-1] in IDS["stop_ids"] for t, *_ in expected)
    for row in range(4):
        assert_is_naive(samples, row, expected[row])


def test_requests_far_beyond_the_ring_do_not_depend_on_what_shares_their_slots(params, expected):
    """40 requests through 2 slots: the ring of 44 places is written some times over, and prompts end anywhere in it."""
    random = np.random.default_rng(0)
    order = random.integers(0, 4, 40)
    given = {name: np.array(values)[order] for name, values in ASKED.items()}
    keys = sampling.request_keys(7, range(4))[order]
    samples = run(params, [PROMPTS[i] for i in order], keys, sampling.make_limits(40, **given, **IDS), **REFILLED)
    for row, which in enumerate(order):
        assert_is_naive(samples, row, expected[which])


def test_a_groups_prompt_is_read_once_and_its_samples_differ_by_their_keys_alone(params, monkeypatch):
    read, prefill = [], decoding.prefill
    monkeypatch.setattr(decoding, "prefill", lambda *arguments: read.append(arguments[3]) or prefill(*arguments))
    keys = sampling.request_keys(5, range(12))
    limits = sampling.make_limits(12, temperature=1.0, max_new=[1, 12, 7] * 4)
    grouped = run(params, PROMPTS, keys, limits, n=3, **REFILLED)
    assert sorted(int(length) for lengths in read for length in lengths if length) == [2, 4, 9]  # one has no more
    apart = run(params, [prompt for prompt in PROMPTS for _ in range(3)], keys, limits, **REFILLED)
    np.testing.assert_array_equal(grouped.tokens, apart.tokens)
    np.testing.assert_array_equal(grouped.mask.sum(axis=1), [1, 12, 7] * 4)
    assert len({tuple(row) for row in grouped.tokens[1::3].tolist() + grouped.tokens[2::3].tolist()}) == 8
    np.testing.assert_array_equal(grouped.tokens[0, 0] == grouped.tokens[:3, 0], keys[:3] == keys[0])


def test_prompts_of_a_length_are_read_together(params, monkeypatch):
    read, prefill = [], decoding.prefill
    monkeypatch.setattr(decoding, "prefill", lambda *arguments: read.append(arguments[2].shape) or prefill(*arguments))
    monkeypatch.setitem(sampling.PREFILL_TOKENS, "cpu", 2 * 96)
    mixed = [[5] * length for length in (90, 4, 91, 7, 92, 9, 93, 8)]
    limits = sampling.make_limits(8, temperature=1.0, max_new=2)
    sampling.sample(TINY, params, mixed, sampling.request_keys(0, range(8)), limits, max_new_tokens=2)
    assert read == [(6, 32), (2, 96), (2, 96)]  # not a short one beside each long one, which would be four of the last


def test_what_shares_the_batch_does_not_matter(params):
    keys = sampling.request_keys(1, range(4))
    limits = sampling.make_limits(4, temperature=[1.0, 0.0, 0.9, 1.3], max_new=[N, N, N, 3])
    samples = run(params, PROMPTS, keys, limits)
    others = [PROMPTS[2], [1, 2, 3], PROMPTS[0], [4] * 9]
    order = jnp.array([2, 1, 0, 3])
    again = run(params, others, keys[order], sampling.make_limits(4, temperature=[0.9, 2.0, 1.0, 0.0], max_new=N))
    for mine, theirs in ((0, 2), (2, 0)):
        np.testing.assert_array_equal(samples.tokens[mine], again.tokens[theirs])
        np.testing.assert_array_equal(samples.logps[mine], again.logps[theirs])  # they began together


def test_stop_id_is_kept_then_padding_and_max_new_counts_per_row(params):
    keys = sampling.request_keys(0, range(4))
    free = run(params, PROMPTS, keys, sampling.make_limits(4, max_new=99))
    assert free.mask.all()  # max_new_tokens bounds it
    stop = int(free.tokens[0, 3])
    first = free.tokens[0].tolist().index(stop)
    samples = run(params, PROMPTS, keys, sampling.make_limits(4, max_new=[N, 1, 0, 4], stop_ids=[stop]))
    assert samples.tokens[0].tolist() == free.tokens[0, : first + 1].tolist() + [0] * (N - 1 - first)
    assert samples.mask.sum(axis=1).tolist()[:3] == [first + 1, 1, 0]
    assert samples.mask[3].sum() <= 4
    for values in samples[2:]:
        assert not values[~samples.mask].any()


def test_no_limit_key_prompt_or_number_of_finished_rows_recompiles(params):
    bound = REFILLED | dict(max_prompt_tokens=30)
    run(params, PROMPTS, sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=6), **bound)
    before = compiled()
    for limits in (
        sampling.make_limits(4, max_new=2, temperature=0.5),
        sampling.make_limits(4, max_new=[1, 2, 3, 6], temperature=[0, 1, 2, 3], stop_ids=[4]),
        sampling.make_limits(4, max_new=0, stop_ids=range(1, 17), bad_ids=range(20, 36)),
        sampling.make_limits(4, **ASKED, **IDS),
    ):
        run(params, PROMPTS[::-1], sampling.request_keys(5, [9, 8, 7, 6]), limits, **bound)
        run(params, [[7] * 30, [1] * 30] * 2, sampling.request_keys(6, range(4)), limits, **bound)
    assert compiled() == before


def test_sampled_frequencies_follow_the_filtered_softmax():
    """Chi-square over 1,024 draws of one prompt's next token; 15 degrees of freedom pass 37.7 once in 1,000.

    The last request asks for nothing and gets padding.
    """
    cfg = dataclasses.replace(TINY, vocab_size=16, sliding_windows=(None,), num_hidden_layers=1, pad_token_id=5)
    params = init(cfg, jax.random.key(0))
    draws = 1024
    asked = dict(temperature=(0.5, 1.0, 2.0, 1.5), top_k=(0, 0, 0, 10), top_p=(1.0, 1.0, 1.0, 0.9))
    each = {name: np.append(np.repeat(x, draws), x[0]) for name, x in asked.items()}
    limits = sampling.make_limits(4 * draws + 1, max_new=[1] * 4 * draws + [0], **each)
    keys = sampling.request_keys(11, range(4 * draws + 1))
    samples = run(params, [[3, 1, 4]], keys, limits, cfg=cfg, new=1, n=4 * draws + 1)
    assert samples.tokens[-1].tolist() == [5] and samples.mask.sum() == 4 * draws
    hidden, _ = forward(cfg, params, jnp.array([[3, 1, 4]]), jnp.arange(3)[None])
    logits = models.unembed(cfg, params, hidden)[0, -1]
    for which, drawn in enumerate(samples.tokens[:-1, 0].reshape(4, draws)):
        one = sampling.make_limits(1, max_new=1, **{name: x[which] for name, x in asked.items()})
        expected = np.asarray(jax.nn.softmax(drawn_from(logits, np.array([3, 1, 4]), np.int32(0), one))) * draws
        counts = np.bincount(drawn, minlength=16)
        assert not counts[expected == 0].any()
        common = expected >= 5  # the rest is one class, as the test's approximation needs
        assert common.sum() >= 4
        observed = np.append(counts[common], counts[~common].sum())
        wanted = np.append(expected[common], expected[~common].sum())
        assert ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum() < 37.7, which


def test_a_tiny_temperature_is_greedy_and_finite(params):
    keys = sampling.request_keys(0, range(4))
    cold = run(params, PROMPTS, keys, sampling.make_limits(4, temperature=1e-38, top_k=5, top_p=0.9, max_new=6))
    greedy = run(params, PROMPTS, keys, sampling.make_limits(4, max_new=6))
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    np.testing.assert_array_equal(cold.logps, greedy.logps)
    assert np.isfinite(cold.sampling_logps).all() and np.isfinite(cold.scaled_logps).all()


def test_scoring_the_samples_again_gives_their_log_probs(params):
    """By `logprobs.token_stats` at both temperatures; the filtered ones are another distribution's."""
    keys = sampling.request_keys(4, range(4))
    samples = run(params, PROMPTS, keys, sampling.make_limits(4, temperature=0.7, top_p=0.9, max_new=N), **REFILLED)
    rows = [prompt + ids.tolist() for prompt, ids in zip(PROMPTS, samples.tokens, strict=True)]
    tokens = np.array([row + [0] * (24 - len(row)) for row in rows])
    place = np.arange(24)
    mask = np.array([(place >= len(prompt)) & (place < len(prompt) + N) for prompt in PROMPTS])
    batch = {"tokens": tokens, "positions": np.broadcast_to(place, tokens.shape), "mask": mask}

    @jax.jit
    def logps(temperature):
        hidden = logprobs.hidden(TINY, params, batch)
        return logprobs.token_stats(TINY, params, hidden, tokens, mask, temperature=temperature)["logps"]

    for temperature, ours in ((1.0, samples.logps), (0.7, samples.scaled_logps)):
        found = logps(temperature)
        np.testing.assert_allclose(ours, np.asarray(found)[mask].reshape(4, N), atol=1e-4)
    assert (samples.sampling_logps >= samples.scaled_logps - 1e-5).all()
    assert np.abs(samples.sampling_logps - samples.scaled_logps).max() > 0.01


def test_the_host_stops_streams_and_counts(params):
    keys, limits = sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=N)
    free = run(params, PROMPTS, keys, limits, **REFILLED)
    pieces, progress = {}, []
    samples = run(
        params,
        PROMPTS,
        keys,
        limits,
        **REFILLED,
        stop=lambda ids: 5 if len(ids) >= 5 and ids[:5] == free.tokens[1, :5].tolist() else None,
        on_tokens=lambda request, ids: pieces.setdefault(request, []).append(ids),
        on_progress=lambda *counts: progress.append(counts),
    )
    assert samples.mask.sum(axis=1).tolist() == [12, 5, 12, 12]
    np.testing.assert_array_equal(samples.tokens, np.where(samples.mask, free.tokens, 0))
    assert not samples.logps[1, 5:].any()
    for request in range(4):
        assert sum(pieces[request], []) == samples.tokens[request, samples.mask[request]].tolist()
        assert all(1 <= len(piece) <= 3 for piece in pieces[request])
    assert progress[-1] == (4, 41) and progress == sorted(progress)

    def give_up(finished, tokens):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(params, PROMPTS, keys, limits, **REFILLED, on_progress=give_up)


def test_a_segment_ends_early_for_who_waits_and_when_all_have_ended(params):
    """Rows that ask for 1 token and for 12: free slots are refilled at once, the rest goes on to its end."""
    lengths, segment = [], decoding.segment

    def counted(*arguments, **options):
        state, drawn = segment(*arguments, **options)
        lengths.append(int(drawn.counts.max()))
        return state, drawn

    limits = sampling.make_limits(4, max_new=[1, 12, 2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "segment", counted)
        samples = run(params, sorted(PROMPTS, key=len), sampling.request_keys(0, range(4)), limits, **REFILLED)
    assert lengths == [1, 2, 3, 3, 3] and samples.mask.sum(axis=1).tolist() == [1, 12, 2, 3]


@pytest.mark.parametrize(
    ("axes", "rows"),
    [
        pytest.param({"fsdp": 4, "tensor": 2}, 4, id="even"),
        pytest.param({"data": 2, "fsdp": 2, "sequence": 2}, 3, id="uneven", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_samples_what_one_device_samples_and_weights_stay_where_they_lie(params, expected, axes, rows):
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(params, sharding.param_shardings(mesh, models.declare(TINY)))
    limits = sampling.make_limits(rows, **{name: values[:rows] for name, values in ASKED.items()}, **IDS)
    keys = sampling.request_keys(7, range(rows))
    with sharding.use_mesh(mesh):
        before = compiled()
        samples = run(placed, PROMPTS[:rows], keys, limits)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed)
        asked = dict(n_prompts=rows, max_prompt_tokens=10, max_new_tokens=N)
        programs = sampling.programs(TINY, abstract, **asked)
        decode, prefill = programs["decode"].lower().compile(), programs["prefill"].lower()
        run(placed, PROMPTS[:rows], keys, limits)
    assert [new - old for new, old in zip(compiled(), before, strict=True)] == [1] * 5
    for row in range(rows):
        assert_is_naive(samples, row, expected[row])
    for shelf, where in zip(prefill.out_info.k, prefill.compile().output_shardings.k, strict=True):
        assert where.shard_shape(shelf.shape)[0] * 4 == shelf.shape[0]  # no device holds all prompts
    moved = re.findall(r"= [a-z0-9]+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", decode.as_text())
    # No weight, no logits and no cache travel at every token: a row of either is longer than all that does.
    assert moved and max(np.prod([int(n) for n in shape.split(",") if n]) for shape in moved) <= 8 * 64
    assert not [shape for shape in moved if re.search(r"^(32|48|64),|^\d+,44,", shape)]


@pytest.mark.slow
def test_caches_are_updated_in_place(params):
    """One update of each layer's keys and one of its values at a token, no copy of either, and no sort."""
    asked = dict(n_prompts=4, max_prompt_tokens=10, max_new_tokens=N)
    decode = sampling.programs(TINY, models.abstract(TINY), **asked)["decode"].lower().compile()
    whole = re.findall(r"= f32\[4,2,(?:44,8|8,44)\]\{\S+ (\S+?)\(", decode.as_text())
    assert whole.count("dynamic-update-slice") == 4
    assert not {"copy", "transpose", "scatter", "select"} & set(whole)
    assert not re.search(r'\bsort\(|"TopK"', decode.as_text())


@pytest.mark.slow
def test_stacked_layers_sample_the_same(params, expected, monkeypatch):
    monkeypatch.setattr(decoding, "UNSTACKED", ())
    jax.clear_caches()
    limits, keys = sampling.make_limits(4, **ASKED, **IDS), sampling.request_keys(7, range(4))
    try:
        assert not decoding.is_view(decoding.view(TINY, params))
        samples = run(params, PROMPTS, keys, limits, slots=2)
    finally:
        jax.clear_caches()
    for row in range(4):
        assert_is_naive(samples, row, expected[row])


@pytest.mark.slow
def test_adapters_and_quantised_weights_sample_what_their_forward_pass_says(params):
    spec = lora.Spec(targets=("q_proj", "down_proj"), rank=2, alpha=4.0)
    frozen = lora.Frozen(quantize_tree(params), spec)
    random = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda weight: random.normal(size=weight.shape).astype(np.float32) * 0.2,
        lora.declare(TINY, spec),
        is_leaf=lambda x: isinstance(x, models.Weight),
    )
    attached = lora.attach(frozen, adapters)
    keys, limits = sampling.request_keys(7, range(4)), sampling.make_limits(4, **ASKED, **IDS)
    samples = run(attached, PROMPTS, keys, limits, slots=2)
    for row in (0, 2):
        assert_is_naive(samples, row, naive(TINY, attached, PROMPTS[row], keys[row], limits, row))


def quantize_tree(params):
    kernels = lambda path, x: quantize.quantize(x, "int8") if path[-1].key == "kernel" else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(kernels, params)


@pytest.mark.slow
def test_bfloat16_weights_are_narrowed_once_and_give_the_same_numbers(params):
    cfg = dataclasses.replace(TINY, compute_dtype="bfloat16")
    view = models.as_used(cfg, params)
    assert view["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    assert view["norm"]["scale"].dtype == jnp.float32
    tokens = jnp.array([PROMPTS[0]])
    positions = jnp.arange(tokens.shape[1])[None]
    whole, narrow = (forward(cfg, weights, tokens, positions)[0] for weights in (params, view))
    np.testing.assert_array_equal(whole, narrow)
    keys, limits = sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=6)
    samples = run(params, PROMPTS, keys, limits, cfg=cfg)
    again = run(decoding.view(cfg, params), PROMPTS, keys, limits, cfg=cfg)
    np.testing.assert_array_equal(samples.tokens, again.tokens)
    assert samples.mask[:, :6].all() and np.isfinite(samples.logps).all()


PROGRAM = """
from test_sampling import ASKED, IDS, N, PROMPTS, TINY
from jaxalign import sampling
mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
place = sharding.param_shardings(mesh, models.declare(TINY))
with sharding.use_mesh(mesh):
    params = jax.jit(models.init, static_argnums=0, out_shardings=place)(TINY, jax.random.key(3))
    keys, limits = sampling.request_keys(7, range(4)), sampling.make_limits(4, **ASKED, **IDS)
    samples = sampling.sample(TINY, params, PROMPTS, keys, limits, max_new_tokens=N, slots=4, segment_tokens=5)
tell([x.tolist() for x in samples])
"""


@pytest.mark.slow
def test_two_processes_get_all_that_one_samples(expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "tests")
    first, second = two_processes(PROGRAM, tmp_path)
    assert first == second
    samples = sampling.Samples(*map(np.array, first[0]))
    for row in range(4):
        assert_is_naive(samples, row, expected[row])


def test_prompts_are_read_with_their_like_and_no_more_than_a_program_takes():
    prompts = [[1] * length for length in (1, 5, 33, 34, 200, 9)]
    waiting = collections.deque(request for prompt in (0, 1, 2, 3, 4, 5) for request in (2 * prompt, 2 * prompt + 1))
    rows, tokens, lengths = sampling._next_prompts(prompts, waiting, 2)
    assert rows == {0: 0, 1: 1, 2: 2, 3: 3} and tokens.shape == (4, 64) and lengths.tolist() == [0, 4, 32, 33]
    assert (tokens == -1).sum(axis=1).tolist() == [64, 60, 32, 31]
    for _ in range(8):
        waiting.popleft()
    rows, tokens, lengths = sampling._next_prompts(prompts, waiting, 2)
    assert rows == {4: 0} and tokens.shape == (1, 256)  # another would be one too many for its width


def test_who_asks_for_nothing_gets_nothing():
    samples = run({}, [], sampling.request_keys(0, []), sampling.make_limits(0, max_new=3))
    assert samples.tokens.shape == (0, N)
    samples = run({}, PROMPTS, sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=0))
    assert not samples.mask.any()


def test_buckets():
    widths = {sampling.bucket(length, 32) for length in range(1, 8193)}
    assert sorted(widths)[:8] == [32, 64, 96, 128, 192, 256, 384, 512] and len(widths) == 16
    assert all(length <= sampling.bucket(length, 32) <= max(32, 2 * length) for length in range(1, 8193))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=[[1], []], n=2), "prompt 1 has 0 tokens, expected 1 to max_prompt_tokens=1"),
        (dict(max_prompt_tokens=4), "prompt 0 has 5 tokens, expected 1 to max_prompt_tokens=4"),
        (dict(n=2), "keys has 4 entries, expected one for each of 8 requests"),
        (dict(limits=sampling.make_limits(3, max_new=1)), "limits has 3 entries, expected one for each of 4"),
        (dict(new=0), "max_new_tokens is 0, expected at least 1"),
        (dict(slots=-1), "slots is -1"),
        (dict(cfg=dataclasses.replace(TINY, num_labels=1)), "score head"),
    ],
)
def test_calls_that_make_no_sense_are_refused(changes, message):
    given = dict(prompts=PROMPTS, keys=sampling.request_keys(0, range(4)), limits=sampling.make_limits(4, max_new=1))
    with pytest.raises(ValueError, match=message):
        run({}, **given | changes)
