"""Adapters: TRL's numbers, the same update for any mesh and split, dropout by row, and no leaf too many or too few."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import FAMILIES, GOLDEN, GRADIENT_NORM, LAYOUTS, LOSS, REWARD, SEQUENCE_LOGPS, case, model, pair_batch

from jaxalign import logprobs, lora, metrics, models, objectives, optim, peft_files, reference, sharding, step

TINY = models.config_from_hf(
    dict(model_type="llama", vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
         bos_token_id=1, eos_token_id=2, initializer_range=0.3)
)  # fmt: skip
SPEC = lora.Spec(rank=4, alpha=8)
QKV = ("q_proj", "v_proj", "down_proj")

score = jax.jit(lambda cfg, frozen, adapters, rows: logprobs.score(cfg, lora.attach(frozen, adapters), rows)["logps"],
                static_argnums=0)  # fmt: skip


@functools.cache
def tiny(cfg=TINY):
    """Weights of a random model."""
    return jax.jit(models.init, static_argnums=0)(cfg, jax.random.key(0))


def trained(cfg, spec, base=None, scale=0.1):
    """Adapters that do something, wherever one may."""
    adapters = lora.init(cfg, jax.random.key(1), spec, base)
    for target in lora.targets(models.declare(cfg), spec):
        leaves = lora.flat(adapters)
        b = leaves[*target.path, "lora_b"]
        noise = scale * jax.random.normal(jax.random.fold_in(jax.random.key(2), b.size), b.shape)
        used = jnp.arange(b.shape[1])[None, :, None] < jnp.array(target.ranks)[:, None, None]
        adapters = lora.nest({**leaves, (*target.path, "lora_b"): jnp.where(used, noise, 0)})
    return adapters


@functools.cache
def rows(n=4, length=12):
    """A batch of random pairs, ref_logps of the bare base."""
    random = np.random.default_rng(0)
    tokens = random.integers(3, 48, (2 * n, length)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    lengths = random.integers(6, length + 1, 2 * n).astype(np.int32)
    batch = {"tokens": tokens, "positions": places, "mask": (places >= 3) & (places < lengths[:, None]),
             "lengths": lengths}  # fmt: skip
    return {**batch, "ref_logps": np.asarray(score(TINY, lora.Frozen(tiny(), SPEC), {}, batch))}


# ---- TRL's numbers


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_beside_a_frozen_base_gives_trls_numbers_and_gradients(family):
    golden, a = case(family, "dpo_lora")
    cfg, base = model(family)
    spec, adapters = peft_files.load(GOLDEN / "models" / family / "lora", cfg)
    assert spec == lora.Spec(rank=4, alpha=8, targets=tuple(sorted(QKV)))
    frozen = lora.Frozen(base, spec)
    batch = pair_batch(a)
    batch["ref_logps"] = np.asarray(jax.jit(reference.make_score(cfg))(lora.attach(frozen, {}), batch))
    for side, both in (("chosen", batch["ref_logps"][0::2]), ("rejected", batch["ref_logps"][1::2])):
        np.testing.assert_allclose(both.sum(1), a[f"out.ref_logps.{side}"], **SEQUENCE_LOGPS)
    objective = objectives.make(cfg, "sigmoid", beta=golden["effective_config"]["beta"])
    loss, found, gradients = jax.jit(step.make_gradients(objective))(adapters, frozen, batch, {})
    np.testing.assert_allclose(loss, golden["loss"], **LOSS)
    values = metrics.reduce(found)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        np.testing.assert_allclose(values[name], golden["metrics"][name], **REWARD)
    flat = {"/".join(path): np.asarray(x) for path, x in lora.flat(gradients).items()}
    assert len(golden["grad_norms"]) == sum(len(x) for x in flat.values())  # these leaves, layer by layer, and no other
    for name, norm in golden["grad_norms"].items():
        layer, block, projection, leaf = name.removeprefix("base_model.model.model.layers.").split(".")[:4]
        ours = flat[f"layers/{block}/{projection}/{leaf.lower()}"][int(layer)]
        np.testing.assert_allclose(np.linalg.norm(ours), norm, **GRADIENT_NORM)
        if (full := f"out.grad.{name}") in a:
            np.testing.assert_allclose(ours.T, a[full], atol=2e-4 * np.abs(a[full]).max(), rtol=0)


# ---- what attach and merge compute


def test_new_adapters_change_nothing_and_the_reference_is_the_bare_base():
    adapters = lora.init(TINY, jax.random.key(1), SPEC)
    frozen = lora.Frozen(tiny(), SPEC)
    assert all(float(jnp.abs(x).max()) > 0 for path, x in lora.flat(adapters).items() if path[-1] == "lora_a")
    objective = objectives.make(TINY, "sigmoid", beta=0.1)
    loss = jax.jit(lambda adapters, batch: objective(adapters, frozen, batch, {}, None)[0])
    np.testing.assert_allclose(loss(adapters, rows()), math.log(2), rtol=1e-6)
    # ... and a run that begins with an adapter begins at base + adapter.
    begun = trained(TINY, SPEC)
    assert abs(loss(begun, rows()) - math.log(2)) > 1e-3
    own = {**rows(), "ref_logps": np.asarray(score(TINY, frozen, begun, rows()))}
    np.testing.assert_allclose(loss(begun, own), math.log(2), rtol=1e-6)


SPECS = {
    "all-linear": SPEC,
    "rslora": lora.Spec(rank=4, alpha=8, targets=("q_proj", "mlp.up_proj"), rslora=True),
    "regex": lora.Spec(rank=4, alpha=8, targets=(r"model\.layers\.[02]\..*\.(q|k)_proj",)),
    "patterns": lora.Spec(
        rank=4, alpha=8, targets=("q_proj", "o_proj"), layers=(0, 2), rank_pattern=(("layers.2.self_attn.q_proj", 6),),
        alpha_pattern=(("o_proj", 3.0),),
    ),
    "saved": lora.Spec(rank=4, alpha=8, targets=("q_proj",), modules_to_save=("embed_tokens", "norm")),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_the_forward_pass_is_that_of_the_merged_model(name):
    spec = SPECS[name]
    adapters = trained(TINY, spec, tiny())
    if spec.modules_to_save:
        adapters["embed_tokens"]["embedding"] *= 1.1
        adapters["norm"]["scale"] *= 0.9
    merged = lora.merge(tiny(), adapters, spec)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny())
    got = score(TINY, lora.Frozen(tiny(), spec), adapters, rows())
    np.testing.assert_allclose(got, score(TINY, None, merged, rows()), atol=2e-5, rtol=0)
    assert np.abs(got - rows()["ref_logps"]).max() > 1e-2
    # By hand, in numpy: scale * a b of each layer's own rank.
    for target in lora.targets(tiny(), spec):
        leaves = lora.flat(adapters)
        for layer, rank in enumerate(target.ranks):
            a, b = (np.asarray(leaves[*target.path, leaf])[layer] for leaf in ("lora_a", "lora_b"))
            alpha = 3.0 if name == "patterns" and target.path[-1] == "o_proj" else 8
            scale = 0 if not rank else alpha / math.sqrt(rank) if spec.rslora else alpha / rank
            change = lora.flat(merged)[*target.path, "kernel"][layer] - lora.flat(tiny())[*target.path, "kernel"][layer]
            np.testing.assert_allclose(change, scale * a[:, :rank] @ b[:rank], atol=1e-6)


def test_which_layers_and_ranks_a_spec_means():
    ranks = {target.path[-1]: target.ranks for target in lora.targets(models.declare(TINY), SPECS["patterns"])}
    assert ranks == {"q_proj": (4, 0, 6), "o_proj": (4, 0, 4)}
    ranks = {target.path[-1]: target.ranks for target in lora.targets(models.declare(TINY), SPECS["regex"])}
    assert ranks == {"q_proj": (4, 0, 4), "k_proj": (4, 0, 4)}
    assert len(lora.targets(models.declare(TINY), SPEC)) == 7


def test_what_a_layer_lacks_gets_no_gradient_and_stays_zero():
    spec, objective = SPECS["patterns"], objectives.make(TINY, "sigmoid", beta=0.1)
    adapters = trained(TINY, spec)
    gradients = jax.jit(jax.grad(lambda *args: objective(*args, {}, None)[0]))(
        adapters, lora.Frozen(tiny(), spec), rows()
    )
    for path, gradient in lora.flat(gradients).items():
        ours = lora.flat(adapters)[path]
        assert not np.any(gradient[1]) and not np.any(ours[1])  # layer 1 has none
        assert np.any(gradient[0]) and np.any(gradient[2])
        unused = (slice(None), slice(4, None)) if path[-1] == "lora_a" else (slice(4, None),)
        assert not np.any(ours[0][unused]) and not np.any(gradient[0][unused])  # of rank 4 beside one of 6


def test_a_cache_knows_adapters():
    frozen, adapters = lora.Frozen(tiny(), SPEC), trained(TINY, SPEC)
    tokens, places = rows()["tokens"], rows()["positions"]
    params = lora.attach(frozen, adapters)
    want = jax.jit(lambda p: models.apply(TINY, p, tokens, places)[0])(params)
    cached = jax.jit(lambda p: models.apply(TINY, p, tokens, places, cache=models.init_cache(TINY, 8, 16))[0])
    np.testing.assert_allclose(cached(params), want, atol=1e-5)


@pytest.mark.slow
def test_recomputed_layers_give_the_same_gradients():
    frozen, adapters = lora.Frozen(tiny(), SPEC), trained(TINY, SPEC)
    recomputed = dataclasses.replace(TINY, remat="full")
    batch = rows()

    def total(cfg, adapters):
        return logprobs.score(cfg, lora.attach(frozen, adapters), batch)["logps"].sum()

    plain, again = (jax.jit(jax.grad(functools.partial(total, cfg)))(adapters) for cfg in (TINY, recomputed))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), plain, again)


# ---- the step


def update(layout=None, *, begin=None, dropout=0.0, accumulation=1, batch=None, steps=2):
    """Adapters after some AdamW steps."""
    spec = dataclasses.replace(SPEC, dropout=dropout)
    mesh = sharding.make_mesh(**layout) if layout else None
    tx = optim.make_optimizer("adamw", schedule=optax.constant_schedule(1e-2), weight_decay=0.1, eps=1e-3)
    train_step = step.make_train_step(
        objectives.make(TINY, {"sigmoid": 1.0, "sft": 0.5}, beta=0.1), tx, gradient_accumulation_steps=accumulation,
        dropout_seed=7 if dropout else None,
    )  # fmt: skip
    base, adapters = tiny(), begin or trained(TINY, SPEC)
    batch = batch or rows()
    with sharding.use_mesh(mesh):
        if mesh is not None:
            base = jax.device_put(base, sharding.param_shardings(mesh, models.declare(TINY)))
            adapters = jax.device_put(adapters, lora.shardings(TINY, spec, mesh))
        state = step.init_state(adapters, tx)
        placed = sharding.place_batch(mesh, batch, len(batch["tokens"]))
        jitted = jax.jit(train_step)
        for _ in range(steps):
            state, _ = jitted(state, lora.Frozen(base, spec), placed)
    return jax.device_get(state.params)


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-5, rtol=0)


@functools.cache
def first_updates():
    return update(begin=lora.init(TINY, jax.random.key(1), SPEC), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_leaves_the_reference_as_one_device_does(layout):
    """New adapters, whose a gets no gradient at first: on one mesh of another program they stayed at log 2."""
    got = update(layout, begin=lora.init(TINY, jax.random.key(1), SPEC), steps=3)
    assert all(np.abs(x).max() > 1e-3 for path, x in lora.flat(got).items() if path[-1] == "lora_b")
    assert_same(got, first_updates())


def test_accumulation_padding_and_mesh_drop_the_same_inputs():
    want = update(dropout=0.5)
    wider = {name: x if x.ndim == 1 else np.pad(x, ((0, 0), (0, 4))) for name, x in rows().items()}
    assert_same(update({"data": 2, "fsdp": 2, "tensor": 2}, dropout=0.5, accumulation=2, batch=wider), want)


def test_dropout_drops_its_share_by_step_and_row_and_only_where_keys_are_given():
    keys = step.dropout_keys(7, 0, 8)
    assert len(np.unique(jax.random.key_data(jnp.concatenate([keys, step.dropout_keys(7, 1, 8)])), axis=0)) == 16
    np.testing.assert_array_equal(jax.random.key_data(step.dropout_keys(7, 0, 4)), jax.random.key_data(keys[:4]))
    from jaxalign.models.decoder import dropout

    found = np.asarray(dropout(jnp.ones((8, 50, 40)), keys, jnp.float32(0.25)))
    assert set(np.unique(found)) == {0, np.float32(1 / 0.75)} and abs((found == 0).mean() - 0.25) < 0.02
    assert len(np.unique(found, axis=0)) == 8
    # With keys a batch is scored otherwise; without (evaluation, reference, sampling) as by a spec without dropout.
    adapters = trained(TINY, SPEC)
    dropping = lora.Frozen(tiny(), dataclasses.replace(SPEC, dropout=0.5))
    usual = score(TINY, lora.Frozen(tiny(), SPEC), adapters, rows())
    np.testing.assert_array_equal(score(TINY, dropping, adapters, rows()), usual)
    assert np.abs(score(TINY, dropping, adapters, {**rows(), "dropout_keys": keys}) - usual).max() > 1e-2


def test_only_adapters_have_optimizer_state_and_it_lies_beside_them():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    abstract = lora.abstract(TINY, SPEC, mesh)
    tx = optim.make_optimizer("adamw", schedule=optax.constant_schedule(1e-2), weight_decay=0.1)
    state = jax.eval_shape(tx.init, abstract)
    n = sum(x.size for x in jax.tree.leaves(abstract))
    assert 2 * n <= sum(x.size for x in jax.tree.leaves(state)) <= 2 * n + 3  # two moments, and counts
    q = lora.flat(abstract)["layers", "self_attn", "q_proj", "lora_a"]
    assert tuple(q.sharding.spec) == (None, "fsdp", None) and q.dtype == jnp.float32
    b = lora.flat(abstract)["layers", "self_attn", "q_proj", "lora_b"]
    assert tuple(b.sharding.spec) == (None, None, "tensor")
    moments = [x for x in jax.tree.leaves(optim.state_shardings(tx, abstract)) if x == q.sharding]
    assert len(moments) >= 2
    assert all(jax.tree.leaves(optim.decay_mask(abstract)))


def test_a_tied_head_is_trained_with_the_embedding():
    spec = SPECS["saved"]
    assert TINY.tie_word_embeddings
    adapters = lora.init(TINY, jax.random.key(0), spec, tiny())
    np.testing.assert_array_equal(adapters["embed_tokens"]["embedding"], tiny()["embed_tokens"]["embedding"])

    def loss(adapters):
        return logprobs.score(TINY, lora.attach(lora.Frozen(tiny(), spec), adapters), rows())["logps"].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(adapters)["embed_tokens"]["embedding"])
    assert np.abs(gradient[0]).max() > 0  # token 0 is in no row: this is the head's part


def test_a_score_head_is_trained_whole_without_being_named():
    cfg = dataclasses.replace(TINY, num_labels=1)
    assert "score" in lora.declare(cfg, SPEC) and "score" not in lora.declare(TINY, SPEC)


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves.pop(("layers", "mlp", "up_proj", "lora_a")), "Missing: layers/mlp/up_proj/lora_a"),
        (lambda leaves: leaves.update({("layers", "mlp", "up_proj", "lora_c"): jnp.zeros(3)}),
         "Unexpected: layers/mlp/up_proj/lora_c; did you mean 'layers/mlp/up_proj/lora_"),
        (lambda leaves: leaves.update({("layers", "mlp", "up_proj", "kernel"): jnp.zeros((3, 32, 64))}),
         "Unexpected: layers/mlp/up_proj/kernel"),
        (lambda leaves: leaves.update({("layers", "mlp", "up_proj", "lora_b"): jnp.zeros((3, 5, 64))}),
         r"layers/mlp/up_proj/lora_b is \[3, 5, 64\], expected \[3, 4, 64\]"),
    ],
)  # fmt: skip
def test_a_leaf_too_few_too_many_or_of_another_shape_raises(change, message):
    leaves = lora.flat(trained(TINY, SPEC))
    change(leaves)
    for use in (lora.attach, lambda frozen, adapters: lora.merge(frozen.base, adapters, SPEC)):
        with pytest.raises(ValueError, match=message):
            use(lora.Frozen(tiny(), SPEC), lora.nest(leaves))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(targets=("q_prj",)), "'q_prj' fits no projection of the model; did you mean 'q_proj'"),
        (dict(targets=("q_proj", "lm_head")), "'lm_head'"),
        (dict(targets=("embed_tokens",)), "can't have an adapter.*modules_to_save"),
        (dict(targets=("(q",)), "no regular expression"),
        (dict(targets=()), "no projection"),
        (dict(modules_to_save=("embed_token",)), "no module 'embed_token'; did you mean 'embed_tokens'"),
        (dict(modules_to_save=("lm_head",)), "tied to embed_tokens"),
        (dict(layers=(3,)), "layer 3, and the model has layers 0 to 2"),
        (dict(rank_pattern=(("z_proj", 2),)), "'z_proj' fits no projection"),
        (dict(rank=0), "rank is 0"),
        (dict(alpha=-1.0), "alpha is -1.0"),
        (dict(dropout=1.0), "dropout is 1.0"),
    ],
    ids=str,
)
def test_names_that_fit_nothing_and_numbers_out_of_range_raise(spec, message):
    with pytest.raises(ValueError, match=message):
        lora.declare(TINY, lora.Spec(**spec))


def test_saved_modules_need_the_base_and_a_wrong_base_is_refused():
    with pytest.raises(ValueError, match="embed_tokens/embedding is trained whole"):
        lora.init(TINY, jax.random.key(0), SPECS["saved"])
    lora.check_base(None, "a")
    lora.check_base("a", "a")
    with pytest.raises(ValueError, match="another base.*model.path"):
        lora.check_base("a" * 64, "b" * 64)
