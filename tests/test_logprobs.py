"""Token statistics: equal to the obvious computation on every mesh, and never a [R, T, V] buffer in the program."""

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
    """A scalar that gives every entry its own weight."""
    weight = jnp.sin(jnp.arange(stats[names[0]].size)).reshape(stats[names[0]].shape)
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


R, T = 16, 64


@functools.cache
def program(layout, family):
    """Optimised HLO of value and gradient of scored rows, with chunks of 32 tokens a device."""
    cfg, params = model(family)
    layout = dict(layout)
    mesh = sharding.make_mesh(**layout) if layout else None
    tokens = np.zeros((R, T), np.int32)
    batch = {"tokens": tokens, "positions": tokens, "mask": np.ones((R, T), bool)}

    def loss(params, batch):
        hidden, _ = models.apply(cfg, params, batch["tokens"], batch["positions"])
        stats = logprobs.token_stats(cfg, params, hidden, batch["tokens"], batch["mask"], chunk_tokens=32 * 8)
        return stats["logps"].sum()

    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
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


@pytest.mark.parametrize("layout", [(), (("fsdp", 8),), (("fsdp", 4), ("tensor", 2))], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_buffer_has_the_size_of_all_logits(family, layout):
    cfg, _ = model(family)
    groups = int(np.prod([size for name, size in layout if name in sharding.ROWS]))
    vocab_slices = int(np.prod([size for name, size in layout if name in ("fsdp", "tensor")]))
    all_logits_of_a_device = R // groups * T * cfg.vocab_size // max(1, vocab_slices // groups)
    found = shapes(program(layout, family))
    largest = max(found.values())
    assert str(cfg.vocab_size // vocab_slices) in ",".join(found), "the head's slice is in this program"
    assert largest < all_logits_of_a_device, max(found, key=found.get)


@pytest.mark.parametrize("layout", [(("fsdp", 8),), (("fsdp", 4), ("tensor", 2))], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_collective_in_a_loop_has_the_size_of_the_head(family, layout):
    cfg, _ = model(family)
    bodies = "\n".join(loop_bodies(program(layout, family)).values())
    collectives = re.findall(r"= (\(?[^=\n]*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", bodies)
    assert collectives, "tokens are gathered inside the loop"
    head = cfg.vocab_size * cfg.hidden_size
    for shape in collectives:
        assert max(shapes(shape).values(), default=0) < head // 2, shape
    # Nor is the head gathered outside of it.
    everywhere = re.findall(r"= (\(?[^=\n]*?) all-gather(?:-start)?\(", program(layout, family))
    assert all(max(shapes(shape).values(), default=0) < head // 2 for shape in everywhere)


def test_the_heads_gradient_is_summed_in_float32_in_bfloat16_runs():
    import dataclasses

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
