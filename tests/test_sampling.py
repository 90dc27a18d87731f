"""The sampler against the golden files and against a naive one that runs the whole text again for every token."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import case, model

from jaxalign import models, sampling, sharding
from jaxalign.models import ModelConfig

FAMILIES = ("llama", "llama_rope3", "qwen2", "qwen3")

# Layers with a window, without one, and a vocabulary that 8 devices divide.
TINY = ModelConfig(
    model_type="qwen3", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, rms_norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=None, tie_word_embeddings=False, attention_bias=False, attention_out_bias=False, mlp_bias=False,
    qk_norm=True, sliding_windows=(None, 4), hidden_act="silu", initializer_range=0.3, bos_token_id=None,
    eos_token_id=(), pad_token_id=0, dtype="float32",
)  # fmt: skip
PROMPTS = [[5, 9, 23, 41, 7], [11], [33, 2, 60, 17, 29, 8, 51, 3, 44, 12], [19, 6, 38]]


N = 12  # one number of new tokens and one width, so that most tests share one program

init = jax.jit(models.init, static_argnums=0)
forward = jax.jit(models.apply, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return init(TINY, jax.random.key(3))


def run(params, prompts, keys, limits, n=N, *, cfg=TINY, multiple=16):
    tokens, mask = sampling.left_pad(prompts, 0, multiple)
    return jax.tree.map(np.asarray, sampling.generate(cfg, params, tokens, mask, keys, limits, max_new_tokens=n))


def logits_at(cfg, params, ids):
    """[T, V] of one text: no cache, no batch. It is padded on the right to one shape, which changes nothing."""
    row = jnp.array([ids + [0] * (24 - len(ids))])
    hidden, _ = forward(cfg, params, row, jnp.arange(24)[None])
    return models.unembed(cfg, params, hidden)[0, : len(ids)]


def naive(cfg, params, prompt, key, *, temperature, max_new, stop_ids=()):
    """The oracle: (tokens, logps, sampling_logps) of one request."""
    tokens, logps, sampling_logps = [], [], []
    for n in range(max_new):
        logits = logits_at(cfg, params, prompt + tokens)[-1]
        if temperature:
            warped = jax.nn.log_softmax(logits / temperature)
            token = int(jax.random.categorical(jax.random.fold_in(key, n), logits / temperature))
            sampling_logps.append(float(warped[token]))
        else:
            token = int(jnp.argmax(logits))
            sampling_logps.append(0.0)
        tokens.append(token)
        logps.append(float(jax.nn.log_softmax(logits)[token]))
        if token in stop_ids:
            break
    return tokens, logps, sampling_logps


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_goldens_token_for_token(family):
    cfg, params = model(family)
    for name in ("greedy", "greedy_eos"):
        settings, arrays = case(family, name)
        stops = [settings["eos_token_id"]] if name == "greedy_eos" else []
        samples = sampling.generate(
            cfg,
            params,
            arrays["in.input_ids"],
            arrays["in.attention_mask"].astype(bool),
            sampling.request_keys(0, range(4)),
            sampling.make_limits(4, max_new=32, stop_ids=stops),
            max_new_tokens=32,
        )
        np.testing.assert_array_equal(samples.tokens, arrays["out.new_tokens"])
        finished = arrays["out.finished_before"].astype(bool) if stops else np.zeros((4, 32), bool)
        assert finished.any() == bool(stops)
        np.testing.assert_array_equal(samples.mask, ~finished)
        np.testing.assert_allclose(samples.logps, np.where(finished, 0, arrays["out.new_token_logps"]), atol=1e-4)
        np.testing.assert_array_equal(samples.sampling_logps, 0)


def test_equals_the_naive_sampler_greedy_and_at_temperatures_with_the_same_keys(params):
    keys = sampling.request_keys(7, range(4))
    temperatures, max_new = [0.0, 0.7, 1.0, 1.6], [12, 12, 12, 5]
    stops = [20, 21, 22]
    limits = sampling.make_limits(4, temperature=temperatures, max_new=max_new, stop_ids=stops)
    samples = run(params, PROMPTS, keys, limits)
    for row, prompt in enumerate(PROMPTS):
        tokens, logps, sampling_logps = naive(
            TINY, params, prompt, keys[row], temperature=temperatures[row], max_new=max_new[row], stop_ids=stops
        )
        n = len(tokens)
        assert samples.tokens[row].tolist() == tokens + [0] * (12 - n)
        assert samples.mask[row].tolist() == [True] * n + [False] * (12 - n)
        np.testing.assert_allclose(samples.logps[row], logps + [0] * (12 - n), atol=1e-5)
        np.testing.assert_allclose(samples.sampling_logps[row], sampling_logps + [0] * (12 - n), atol=1e-5)


def test_stop_id_is_kept_then_padding_and_max_new_counts_per_row(params):
    keys = sampling.request_keys(0, range(4))
    free = run(params, PROMPTS, keys, sampling.make_limits(4, max_new=N))
    stop = int(free.tokens[0, 3])
    first = free.tokens[0].tolist().index(stop)
    limits = sampling.make_limits(4, max_new=[N, 1, 0, 4], stop_ids=[stop])
    samples = run(params, PROMPTS, keys, limits)
    assert samples.tokens[0].tolist() == free.tokens[0, : first + 1].tolist() + [0] * (N - 1 - first)
    assert samples.mask.sum(axis=1).tolist()[:3] == [first + 1, 1, 0]
    assert samples.mask[3].sum() <= 4
    for values in (samples.tokens, samples.logps, samples.sampling_logps):
        assert not values[~samples.mask].any()


def test_what_shares_the_batch_does_not_matter(params):
    keys = sampling.request_keys(1, range(4))
    limits = sampling.make_limits(4, temperature=[1.0, 0.0, 0.9, 1.3], max_new=[N, N, N, 3])
    samples = run(params, PROMPTS, keys, limits)
    others = [PROMPTS[2], [1, 2, 3], PROMPTS[0], [4] * 9]
    order = jnp.array([2, 1, 0, 3])
    again = run(params, others, keys[order], sampling.make_limits(4, temperature=[0.9, 2.0, 1.0, 0.0], max_new=N))
    for mine, theirs in ((0, 2), (2, 0)):
        np.testing.assert_array_equal(samples.tokens[mine], again.tokens[theirs])
        np.testing.assert_array_equal(samples.logps[mine], again.logps[theirs])


def test_more_left_padding_with_another_pad_token_changes_nothing(params):
    keys = sampling.request_keys(2, range(4))
    limits = sampling.make_limits(4, temperature=1.0, max_new=[N, N, N, 3])
    narrow = run(params, PROMPTS, keys, limits)
    cfg = dataclasses.replace(TINY, pad_token_id=63)
    tokens, mask = sampling.left_pad(PROMPTS, 63, 31)
    wide = sampling.generate(cfg, params, tokens, mask, keys, limits, max_new_tokens=N)
    np.testing.assert_array_equal(np.where(narrow.mask, narrow.tokens, 63), wide.tokens)
    np.testing.assert_allclose(narrow.logps, wide.logps, atol=1e-5)


def test_no_limit_key_or_prompt_recompiles(params):
    run(params, PROMPTS, sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=6))
    compiled = sampling.generate._cache_size()
    for limits in (
        sampling.make_limits(4, max_new=2, temperature=0.5),
        sampling.make_limits(4, max_new=[1, 2, 3, 6], temperature=[0, 1, 2, 3], stop_ids=[4]),
        sampling.make_limits(4, max_new=0, stop_ids=[1, 2, 3, 4]),
    ):
        run(params, PROMPTS[::-1], sampling.request_keys(5, [9, 8, 7, 6]), limits)
    assert sampling.generate._cache_size() == compiled


def test_sampled_frequencies_follow_the_tempered_softmax():
    """Chi-square over 2,048 draws of one prompt's next token; 15 degrees of freedom pass 37.7 once in 1,000."""
    cfg = dataclasses.replace(TINY, vocab_size=16, sliding_windows=(None,), num_hidden_layers=1)
    params = init(cfg, jax.random.key(0))
    temperatures, rows = (0.5, 1.0, 2.0), 2048
    limits = sampling.make_limits(3 * rows, temperature=np.repeat(temperatures, rows).tolist(), max_new=1)
    keys = sampling.request_keys(11, range(3 * rows))
    samples = run(params, [[3, 1, 4]] * (3 * rows), keys, limits, 1, cfg=cfg, multiple=4)
    logits = logits_at(cfg, params, [3, 1, 4])[-1]
    for temperature, drawn in zip(temperatures, samples.tokens[:, 0].reshape(3, rows), strict=True):
        expected = np.asarray(jax.nn.softmax(logits / temperature)) * rows
        counts = np.bincount(drawn, minlength=16)
        common = expected >= 5  # the rest is one class, as the test's approximation needs
        assert common.sum() >= 4
        observed = np.append(counts[common], counts[~common].sum())
        wanted = np.append(expected[common], expected[~common].sum())
        assert ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum() < 37.7, temperature


def test_a_tiny_temperature_is_greedy_and_finite(params):
    keys = sampling.request_keys(0, range(4))
    cold = run(params, PROMPTS, keys, sampling.make_limits(4, temperature=1e-38, max_new=6))
    greedy = run(params, PROMPTS, keys, sampling.make_limits(4, max_new=6))
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    np.testing.assert_array_equal(cold.logps, greedy.logps)
    assert np.isfinite(cold.sampling_logps).all()


def test_rescoring_the_samples_gives_their_logps(params):
    limits = sampling.make_limits(4, temperature=1.0, max_new=N)
    samples = run(params, PROMPTS, sampling.request_keys(4, range(4)), limits)
    for row, prompt in enumerate(PROMPTS):
        logits = logits_at(TINY, params, prompt + samples.tokens[row].tolist())[len(prompt) - 1 : -1]
        logps = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), samples.tokens[row][:, None], axis=1)[:, 0]
        np.testing.assert_allclose(samples.logps[row], logps, atol=1e-4)
        np.testing.assert_allclose(samples.sampling_logps[row], samples.logps[row], atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "rows"),
    [({"fsdp": 4, "tensor": 2}, 4), ({"data": 2, "fsdp": 2, "sequence": 2}, 3)],
    ids=["even", "uneven"],
)
def test_a_mesh_samples_what_one_device_samples_and_never_gathers_the_head(params, axes, rows):
    keys = sampling.request_keys(6, range(4))
    temperatures = [0.0, 1.0, 0.8, 1.2]
    alone = run(params, PROMPTS, keys, sampling.make_limits(4, temperature=temperatures, max_new=8, stop_ids=[20, 21]))
    mesh = sharding.make_mesh(**axes)
    placed = jax.device_put(params, sharding.param_shardings(mesh, models.declare(TINY)))
    limits = sampling.make_limits(rows, temperature=temperatures[:rows], max_new=8, stop_ids=[20, 21])
    inputs = (placed, *sampling.left_pad(PROMPTS[:rows], 0, 16), keys[:rows], limits)
    with jax.set_mesh(mesh):
        program = sampling.generate.lower(TINY, *inputs, max_new_tokens=N).compile()
        spread = jax.tree.map(np.asarray, program(*inputs))
    gathered = re.findall(r"= (\S+?)\{\S* all-gather", program.as_text())
    vocabulary = [shape for shape in gathered if str(TINY.vocab_size) in re.findall(r"\d+", shape)]
    assert gathered and not vocabulary  # neither the head's table nor the logits
    np.testing.assert_array_equal(alone.tokens[:rows], spread.tokens)
    np.testing.assert_array_equal(alone.mask[:rows], spread.mask)
    np.testing.assert_allclose(alone.logps[:rows], spread.logps, atol=1e-5)


def test_the_program_holds_no_logits_of_whole_prompts():
    rows, width, n = 3, 40, 6
    cfg = dataclasses.replace(TINY, vocab_size=509)
    compiled = sampling.generate.lower(
        cfg,
        models.abstract(cfg),
        np.zeros((rows, width), np.int32),
        np.ones((rows, width), bool),
        sampling.request_keys(0, range(rows)),
        sampling.make_limits(rows, temperature=1.0, max_new=n),
        max_new_tokens=n,
    ).compile()
    text = compiled.as_text()
    assert "f32[3,509]" in text
    assert f"f32[3,{width},509]" not in text and f"f32[{3 * width},509]" not in text


def test_bfloat16_weights_are_narrowed_once_and_give_the_same_numbers(params):
    cfg = dataclasses.replace(TINY, compute_dtype="bfloat16")
    view = models.as_used(cfg, params)
    assert view["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
    assert view["norm"]["scale"].dtype == jnp.float32
    tokens = jnp.array([PROMPTS[0]])
    positions = jnp.arange(tokens.shape[1])[None]
    whole, narrow = (forward(cfg, weights, tokens, positions)[0] for weights in (params, view))
    np.testing.assert_array_equal(whole, narrow)
    samples = run(params, PROMPTS, sampling.request_keys(0, range(4)), sampling.make_limits(4, max_new=6), cfg=cfg)
    assert samples.mask[:, :6].all() and np.isfinite(samples.logps).all()


def test_left_pad_and_its_buckets():
    tokens, mask = sampling.left_pad([[1, 2, 3], [], [4]], 9, 4)
    assert tokens.tolist() == [[9, 1, 2, 3], [9] * 4, [9, 9, 9, 4]] and tokens.dtype == np.int32
    assert mask.tolist() == [[False, True, True, True], [False] * 4, [False] * 3 + [True]]
    widths = {sampling.bucket(length, 32) for length in range(1, 8193)}
    assert sorted(widths)[:8] == [32, 64, 96, 128, 192, 256, 384, 512] and len(widths) == 16
    assert all(length <= sampling.bucket(length, 32) <= max(32, 2 * length) for length in range(1, 8193))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_new=3, temperature=-1.0), "temperature"),
        (dict(max_new=3, temperature=float("nan")), "temperature"),
        (dict(max_new=-3), "max_new"),
        (dict(max_new=[1, 2, 3]), "each of 2 rows"),
        (dict(max_new=3, stop_ids=[-2]), "stop ids"),
    ],
)
def test_limits_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling.make_limits(2, **arguments)


def test_a_score_head_cannot_generate():
    cfg = dataclasses.replace(TINY, num_labels=1)
    with pytest.raises(ValueError, match="score head"):
        run({}, PROMPTS[:1], sampling.request_keys(0, [0]), sampling.make_limits(1, max_new=1), 1, cfg=cfg)
