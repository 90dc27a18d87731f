"""Token statistics: equal to the obvious computation on every mesh, and never a [R, T, V] buffer in the program."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import FAMILIES, LAYOUTS, LOGPS, case, model, pair_batch

from jaxalign import logprobs, models, sharding


def batch_of(family):
    """The golden batch with 16 rows of 68 tokens, which every layout divides."""
    batch = pair_batch(case(family, "logps_dpo")[1])
    batch = {name: np.concatenate([x, x[:4]]) for name, x in batch.items()}
    pad = -batch["tokens"].shape[1] % 4
    return {name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, pad))) for name, x in batch.items()}


def naive(cfg, params, batch, temperature=1.0):
    """Everything of every position, from logits that are held whole."""
    hidden, _ = models.apply(cfg, params, batch["tokens"], batch["positions"], batch.get("segment_ids"))
    logits = models.unembed(cfg, params, hidden)[:, :-1] / temperature
    logp = jax.nn.log_softmax(logits)
    follows = batch["mask"][:, 1:]
    if "segment_ids" in batch:
        follows = follows & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
    targets = batch["tokens"][:, 1:, None]
    stats = {
        "logps": jnp.take_along_axis(logp, targets, -1)[..., 0],
        "entropy": -(jnp.exp(logp) * logp).sum(-1),
        "mean_logit": logits.mean(-1),
        "correct": (logits.argmax(-1) == targets[..., 0]).astype(jnp.float32),
        "sum_p2": jnp.square(jnp.exp(logp)).sum(-1),
    }
    return {name: jnp.pad(jnp.where(follows, x, 0), ((0, 0), (1, 0))) for name, x in stats.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_token_logps_and_entropy_equal_trl(family):
    _, a = case(family, "logps_dpo")
    batch = pair_batch(a)
    order = np.arange(len(batch["tokens"])).reshape(-1, 2).T.reshape(-1)  # back to chosen rows, then rejected ones
    for role in ("policy", "ref"):
        cfg, params = model(family, role)
        score = jax.jit(functools.partial(logprobs.score, cfg, want=("logps", "entropy")))
        stats = score(params, {name: batch[name] for name in ("tokens", "positions", "mask")})
        np.testing.assert_allclose(stats["logps"][order, 1:], a[f"out.{role}.per_token_logps"], **LOGPS)
        if role == "policy":
            mask = batch["mask"][order, 1:]
            np.testing.assert_allclose(stats["entropy"][order, 1:], a["out.policy.per_token_entropy"] * mask, **LOGPS)


def weighted(stats, names):
    """A scalar that gives every entry its own weight. (All positive: no cancellation blows rounding up.)"""
    weight = 2 + jnp.sin(jnp.arange(stats[names[0]].size)).reshape(stats[names[0]].shape)
    return sum((stats[name] * weight).sum() for name in names) / 100


@functools.cache
def oracle(family):
    cfg, params = model(family)
    batch = batch_of(family)
    value = jax.jit(jax.value_and_grad(lambda p: weighted(naive(cfg, p, batch, 1.3), ("logps", "entropy"))))
    return jax.device_get(value(params))


@pytest.mark.parametrize("layout", [None, *LAYOUTS], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied and tied
def test_values_and_gradients_equal_the_naive_ones_on_every_mesh(family, layout):
    cfg, params = model(family)
    batch = batch_of(family)
    mesh = sharding.make_mesh(**layout) if layout else None

    def loss(params, batch):
        hidden, _ = models.apply(cfg, params, batch["tokens"], batch["positions"])
        both = ("logps", "entropy")
        stats = logprobs.token_stats(
            cfg, params, hidden, batch["tokens"], batch["mask"], temperature=1.3, want=both, differentiate=both,
            chunk_tokens=48,
        )  # fmt: skip
        return weighted(stats, both)

    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        placed = sharding.place_batch(mesh, batch, len(batch["tokens"]))
        value, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(params, placed))
    want, want_gradient = oracle(family)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("layout", [None, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "sequence": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_gives_the_values_and_gradients_of_two_whole_rows(family, layout):
    if layout and family != "llama":
        pytest.skip("one family shows the layouts")
    cfg, params = model(family)
    batch = batch_of(family)
    n = 12
    assert (batch["tokens"][0::2, :n] == batch["tokens"][1::2, :n]).all() and not batch["mask"][:, :n].any()
    mesh = sharding.make_mesh(**layout) if layout else None

    def loss(params, batch):
        return weighted(logprobs.score(cfg, params, batch), ("logps",))

    value = jax.jit(jax.value_and_grad(loss))
    want, want_gradient = jax.device_get(value(params, batch))
    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        shared = {**batch, "shared_prefix": batch["tokens"][:, :n]}
        got, gradient = jax.device_get(value(params, sharding.place_batch(mesh, shared, len(batch["tokens"]))))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
        np.testing.assert_allclose(g, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_every_statistic_equals_the_naive_one_with_segments():
    cfg, params = model("llama")
    batch = batch_of("llama")
    batch["segment_ids"] = (1 + (np.arange(batch["tokens"].shape[1]) >= 30) + 0 * batch["tokens"]).astype(np.int32)
    batch["mask"] = np.ones_like(batch["mask"])  # a segment's first token has nothing before it
    got = jax.jit(functools.partial(logprobs.score, cfg, want=logprobs.STATISTICS))(params, batch)
    want = jax.jit(functools.partial(naive, cfg))(params, batch)
    for name in logprobs.STATISTICS:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, rtol=1e-5, err_msg=name)
    assert float(got["logps"][0, 0]) == 0 and float(got["logps"][0, 30]) == 0 and float(got["logps"][0, 31]) != 0


def test_nothing_masked_gives_zeros_and_a_zero_gradient():
    cfg, params = model("llama")
    batch = batch_of("llama")
    batch["mask"] = np.zeros_like(batch["mask"])
    value, gradient = jax.jit(jax.value_and_grad(lambda p: logprobs.score(cfg, p, batch)["logps"].sum()))(params)
    assert float(value) == 0 and all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(gradient))


def test_an_entropy_that_is_only_looked_at_has_no_gradient():
    cfg, params = model("qwen2")
    batch = batch_of("qwen2")

    def entropy(params, differentiate):
        hidden, _ = models.apply(cfg, params, batch["tokens"], batch["positions"])
        return logprobs.token_stats(
            cfg, params, hidden, batch["tokens"], batch["mask"], want=("entropy",), differentiate=differentiate
        )["entropy"].sum()

    gradient = jax.jit(jax.grad(entropy), static_argnums=1)
    largest = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))  # noqa: E731
    assert largest(gradient(params, ("logps",))) == 0 < largest(gradient(params, ("entropy",)))


def test_unknown_statistics_are_named():
    cfg, params = model("llama")
    tokens, mask = np.zeros((2, 4), np.int32), np.ones((2, 4), bool)
    with pytest.raises(ValueError, match="perplexity"):
        logprobs.token_stats(cfg, params, jnp.zeros((2, 4, 64)), tokens, mask, want=("perplexity",))


# The compiled program


R, T, V, D = 16, 32, 4096, 32  # the vocabulary dwarfs everything else


@functools.cache
def program(layout, tied):
    """Optimised HLO of value and gradient of scored rows, with chunks of 64 tokens over all devices."""
    cfg = models.config_from_hf(
        dict(model_type="llama", vocab_size=V, hidden_size=D, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=tied)
    )  # fmt: skip
    mesh = sharding.make_mesh(**dict(layout)) if layout else None
    tokens = np.zeros((R, T), np.int32)
    batch = {"tokens": tokens, "positions": tokens, "mask": np.ones((R, T), bool)}

    def loss(params, batch):
        hidden, _ = models.apply(cfg, params, batch["tokens"], batch["positions"])
        return logprobs.token_stats(cfg, params, hidden, batch["tokens"], batch["mask"], chunk_tokens=64)["logps"].sum()

    with sharding.use_mesh(mesh):
        shardings = None if mesh is None else sharding.param_shardings(mesh, models.declare(cfg))
        params = models.abstract(cfg, jnp.float32, shardings)
        batch = sharding.place_batch(mesh, batch, R)
        return jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile().as_text()


def shapes(text):
    """Element counts of every float array that an HLO text names, by shape."""
    found = set(re.findall(r"(?:f32|bf16|f16)\[([\d,]+)\]", text))
    return {dims: int(np.prod([int(d) for d in dims.split(",")])) for dims in found}


def loop_bodies(text):
    """The computations that a while loop of the program runs, with all that they call."""
    computations = {m[1]: m[0] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n.*?^\}", text, re.M | re.S)}
    todo = re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)
    seen: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in computations and name not in seen:
            seen[name] = computations[name]
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name])
    return seen


PROGRAMS = [(), (("fsdp", 8),), (("fsdp", 4), ("tensor", 2))]


@pytest.mark.parametrize("layout", PROGRAMS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_no_buffer_has_the_size_of_all_logits(tied, layout):
    rows_split = int(np.prod([size for name, size in layout if name in sharding.ROWS]))
    vocab_split = int(np.prod([size for name, size in layout if name in ("fsdp", "tensor")]))
    found = shapes(program(layout, tied))
    assert found[f"64,{V // vocab_split}"], "a chunk's logits, which must be there, are not: the test reads nothing"
    # What a device would hold of [R, T, V] if its rows' logits were made at once, over its own slice or all of V.
    assert max(found.values()) < R // rows_split * T * V
    assert max(found.values()) < R * T * V // vocab_split or not layout


@pytest.mark.parametrize("layout", PROGRAMS[1:], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_no_collective_in_a_loop_has_the_size_of_the_head(tied, layout):
    kinds = r" (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    in_loops = re.findall(rf"= (\(?[^=\n]*?){kinds}", "\n".join(loop_bodies(program(layout, tied)).values()))
    assert in_loops, "tokens are gathered inside the loop"
    assert max(size for shape in in_loops for size in shapes(shape).values()) <= 64 * D
    # Nor does the head travel outside of the loop, nor its gradient: what travels at most is the batch's activations.
    anywhere = re.findall(rf"= (\(?[^=\n]*?){kinds}", program(layout, tied))
    assert max(size for shape in anywhere for size in shapes(shape).values()) <= R * T * D < V * D // 4


def test_a_vocabulary_that_divides_by_one_axis_alone_gives_the_same():
    cfg = models.config_from_hf(
        dict(model_type="llama", vocab_size=132, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, max_position_embeddings=64)
    )  # fmt: skip
    params = models.init(cfg, jax.random.key(0))
    tokens = np.arange(16 * 32, dtype=np.int32).reshape(16, 32) % 132
    batch = {"tokens": tokens, "positions": 0 * tokens, "mask": np.ones_like(tokens, bool)}

    def loss(params, batch):
        return logprobs.score(cfg, params, batch)["logps"].sum()

    want = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    with sharding.use_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        got = jax.jit(jax.value_and_grad(loss))(placed, sharding.place_batch(mesh, batch, 16))
    assert {"fsdp"} == set(placed["lm_head"]["embedding"].sharding.spec[:1])
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_heads_gradient_is_summed_in_float32_in_bfloat16_runs():
    cfg, params = model("qwen2")
    cfg = dataclasses.replace(cfg, compute_dtype="bfloat16")
    batch = batch_of("qwen2")

    def loss(table, chunk):
        hidden = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, cfg.hidden_size), jnp.bfloat16)
        full = {**params, "embed_tokens": {"embedding": table}}
        stats = logprobs.token_stats(cfg, full, hidden, batch["tokens"], batch["mask"], chunk_tokens=chunk)
        return stats["logps"].sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    table = params["embed_tokens"]["embedding"]
    one, many = gradient(table, 4096), gradient(table, 8)
    assert one.dtype == jnp.float32
    # In bfloat16 sums over 130 chunks would differ by percents.
    np.testing.assert_allclose(many, one, atol=1e-3 * float(jnp.abs(one).max()), rtol=0)


def test_per_sequence_sums_masked_tokens_of_each_segment():
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]], bool)
    np.testing.assert_array_equal(logprobs.per_sequence(x, mask), [[8], [40]])
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 0]])
    np.testing.assert_array_equal(logprobs.per_sequence(x, mask, segments, num_segments=2), [[1, 7], [6, 34]])
    np.testing.assert_array_equal(logprobs.per_sequence(mask, mask), [[4], [5]])
    # A masked-out NaN stays out, of the value and of the gradient.
    x[0, 2] = np.nan
    assert np.isfinite(np.asarray(jax.grad(lambda x: logprobs.per_sequence(x, mask).sum())(x))).all()


def test_per_token_gives_each_token_its_sequences_value_and_is_the_transpose_of_per_sequence():
    segments = np.array([[1, 1, 5, 2, 2, 0], [3, 1, 1, 6, 2, 0]])  # 5 and 6: prompts that stand once; 3: there are two
    y = np.array([[3.0, 4.0], [5.0, 6.0]], np.float32)
    spread = logprobs.per_token(y, segments)
    np.testing.assert_array_equal(spread, [[3, 3, 0, 4, 4, 0], [0, 5, 5, 0, 6, 0]])
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    mask = np.array([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    one = (y * logprobs.per_sequence(x, mask, segments, num_segments=2)).sum()
    assert float(one) == float((spread * x * mask).sum()) != 0
    column = y[:, :1]
    assert logprobs.per_token(column).shape == (2, 1)
    whole = (column * logprobs.per_sequence(x, mask)).sum()
    assert float(whole) == float((logprobs.per_token(column) * x * mask).sum())
