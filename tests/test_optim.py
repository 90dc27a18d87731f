"""Schedules with transformers' values; optimizers that see stacked layers as separate; state beside its parameter."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import FAMILIES, case
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign import optim

LAYERS = 2


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_schedule_gives_the_golden_runs_learning_rates(family):
    steps = case(family, "dpo_train")[0]["steps"]
    schedule = optim.make_schedule("linear", 3e-4, steps=len(steps), warmup_steps=2)
    np.testing.assert_allclose([schedule(i) for i in range(len(steps))], [s["learning_rate"] for s in steps], rtol=1e-6)


def transformers_schedule(name, count, *, rate, steps, warmup, final):
    """transformers' lambdas in plain Python; its cosine_with_min_lr for a cosine with a final ratio."""
    if count < warmup:
        return rate * count / max(1, warmup)
    progress = min(1.0, (count - warmup) / max(1, steps - warmup))
    share = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[name]
    return rate * (final + (1 - final) * share)


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_equals_transformers_at_every_step_and_after_the_end(name, warmup, final):
    if name == "constant":
        final = 0.0
    schedule = optim.make_schedule(name, 2e-5, steps=10, warmup_steps=warmup, final_ratio=final)
    expected = [transformers_schedule(name, i, rate=2e-5, steps=10, warmup=warmup, final=final) for i in range(13)]
    np.testing.assert_allclose([schedule(i) for i in range(13)], expected, rtol=1e-5, atol=1e-11)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(13))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-11)


def test_warmup_ratio_is_a_share_of_the_steps_rounded_up():
    by_ratio = optim.make_schedule("cosine", 1.0, steps=25, warmup_ratio=0.1)
    by_steps = optim.make_schedule("cosine", 1.0, steps=25, warmup_steps=3)
    assert [float(by_ratio(i)) for i in range(26)] == [float(by_steps(i)) for i in range(26)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; there are: constant, linear, cosine"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup_steps": 11}, "warmup_steps is 11, expected 0 to steps=10"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "both set"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"final_ratio": 2.0}, "final_ratio is 2.0"),
        ({"name": "constant", "final_ratio": 0.1}, "no effect on a constant schedule"),
    ],
)
def test_a_schedule_that_can_not_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.make_schedule(**{"name": "linear", "learning_rate": 1e-4, "steps": 10} | arguments)


def stacked_shapes():
    """A decoder's tree in small; gate_proj is wide enough for adafactor to factor it."""
    return {
        "embed_tokens": {"embedding": (11, 8)},
        "layers": {
            "input_layernorm": {"scale": (LAYERS, 8)},
            "mlp": {"gate_proj": {"kernel": (LAYERS, 128, 130)}},
            "self_attn": {"q_proj": {"kernel": (LAYERS, 12, 6), "bias": (LAYERS, 6)}},
        },
        "norm": {"scale": (8,)},
        "score": {"kernel": (8, 1)},
    }


def random_tree(seed, spread):
    """Numbers whose size differs from leaf to leaf and, by `spread`, from layer to layer."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.normal(size=shape) * rng.uniform(0.1, 1)
        if path[0].key == "layers":
            values = values * spread ** np.arange(LAYERS).reshape(-1, *[1] * (len(shape) - 1))
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, stacked_shapes(), is_leaf=lambda x: isinstance(x, tuple))


def unstack(tree):
    """{"embed_tokens/embedding": ..., "layers.0/mlp/gate_proj/kernel": ...}: one array a tensor, as in a HF folder."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [entry.key for entry in path]
        if keys[0] == "layers":
            flat |= {"/".join([f"layers.{i}", *keys[1:]]): leaf[i] for i in range(LAYERS)}
        else:
            flat["/".join(keys)] = leaf
    return flat


def flat_decay(params):
    return {name: name.endswith(("kernel", "embedding")) for name in params}


def flat_labels(params):
    return {name: "muon" if name.startswith("layers.") and name.endswith("kernel") else "adam" for name in params}


SCHEDULE = optim.make_schedule("linear", 1e-2, steps=5, final_ratio=0.5)
DECAY = 0.1


def after(*direction):
    decay = optax.add_decayed_weights(DECAY, mask=flat_decay)
    return optax.chain(*direction, decay, optax.scale_by_learning_rate(SCHEDULE))


def muon(momentum=0.95, b1=0.9, b2=0.999, eps=1e-8):
    orthogonal = optax.contrib.muon(1.0, beta=momentum, eps=eps, consistent_rms=0.2)
    parts = {"muon": optax.chain(orthogonal, optax.scale(-1)), "adam": optax.scale_by_adam(b1, b2, eps)}
    return after(optax.partition(parts, flat_labels))


ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
decayed = {"weight_decay": DECAY, "mask": flat_decay}
# optax's own optimizer, run on separate layers, is what ours has to equal on stacked ones; with its defaults, and with
# every option away from them.
ORACLES = {
    "adafactor": (
        lambda eps=1e-30: after(optax.scale_by_factored_rms(epsilon=eps), optax.clip_by_block_rms(1.0)),
        {"eps": 1e-2},
    ),
    "adagrad": (lambda **o: after(optax.scale_by_rss(**o)), {"eps": 1e-2}),
    "adam": (lambda **o: optax.adam(SCHEDULE, **o), ADAM),
    "adamw": (lambda **o: optax.adamw(SCHEDULE, **o, **decayed), ADAM),
    "lamb": (lambda **o: optax.lamb(SCHEDULE, **o, **decayed), ADAM),
    "lion": (lambda **o: optax.lion(SCHEDULE, **o, **decayed), {"b1": 0.7, "b2": 0.8}),
    "muon": (muon, ADAM | {"momentum": 0.8}),
    "nadamw": (lambda **o: optax.nadamw(SCHEDULE, **o, **decayed), ADAM),
    "radam": (lambda **o: after(optax.scale_by_radam(**o)), ADAM),
    "rmsprop": (
        lambda b2=0.99, eps=1e-8: after(optax.scale_by_rms(b2, eps, eps_in_sqrt=False)),
        {"b2": 0.9, "eps": 1e-2},
    ),
    "sgd": (lambda momentum=0.0: after(optax.trace(momentum)), {"momentum": 0.9}),
}


def three_steps(tx, params, gradients):
    """Parameters after three updates."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


def gradients_of_a_run():
    # Growing gradients make adafactor's RMS clipping bite, and bite differently in each layer.
    return [jax.tree.map(lambda x, s=s: x * s, random_tree(10 + i, 4.0 - i)) for i, s in enumerate((0.1, 1.0, 3.0))]


def largest_difference(stacked, separate):
    flat = unstack(stacked)
    assert flat.keys() == separate.keys()
    return max(float(jnp.abs(flat[name] - separate[name]).max()) for name in flat)


@pytest.mark.parametrize("set_options", [False, True], ids=["defaults", "options"])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_three_steps_on_stacked_layers_equal_optax_on_separate_layers(name, set_options):
    build, options = ORACLES[name]
    options = options if set_options else {}
    weight_decay = 0.0 if name == "adam" else DECAY
    params, gradients = random_tree(0, 1.5), gradients_of_a_run()
    ours = optim.make_optimizer(name, schedule=SCHEDULE, weight_decay=weight_decay, **options)
    stacked = three_steps(ours, params, gradients)
    separate = three_steps(build(**options), unstack(params), [unstack(g) for g in gradients])
    assert largest_difference(params, unstack(stacked)) > 1e-3, "the optimizer moved nothing"
    assert largest_difference(stacked, separate) < 1e-6


def test_the_options_that_are_tested_are_all_that_there_are():
    for name, (_, options) in ORACLES.items():
        assert optim.options(name).keys() - {"moments_dtype"} == options.keys()


@pytest.mark.parametrize(
    "naive",
    [
        pytest.param(lambda: optax.adafactor(1e-2, multiply_by_parameter_scale=False), id="adafactor"),
        pytest.param(lambda: optax.lamb(1e-2), id="lamb"),
        pytest.param(lambda: optax.contrib.muon(1e-2, consistent_rms=0.2), id="muon"),
    ],
)
def test_the_naive_optimizer_differs_on_stacked_layers_so_the_equality_above_can_fail(naive):
    params, gradients = random_tree(0, 1.5), gradients_of_a_run()
    stacked = three_steps(naive(), params, gradients)
    separate = three_steps(naive(), unstack(params), [unstack(g) for g in gradients])
    assert largest_difference(stacked, separate) > 1e-3


def test_muon_orthogonalises_layer_kernels_and_runs_adam_on_all_else():
    params = random_tree(0, 1.0)
    gradient = random_tree(1, 5.0)
    tx = optim.make_optimizer("muon", schedule=lambda count: 1.0)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    tall = updates["layers"]["self_attn"]["q_proj"]["kernel"] / (0.2 * math.sqrt(12))
    for i in range(LAYERS):
        singular = np.linalg.svd(np.asarray(tall[i]), compute_uv=False)
        assert singular.min() > 0.4 and singular.max() < 1.3
    # Adam's first update is the gradient's sign.
    for path in (("embed_tokens", "embedding"), ("score", "kernel"), ("norm", "scale")):
        leaf, wanted = updates[path[0]][path[1]], -jnp.sign(gradient[path[0]][path[1]])
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4)
    bias = updates["layers"]["self_attn"]["q_proj"]["bias"]
    np.testing.assert_allclose(bias, -jnp.sign(gradient["layers"]["self_attn"]["q_proj"]["bias"]), rtol=1e-4)


def test_weight_decay_goes_by_name_never_by_rank():
    mask = optim.decay_mask(random_tree(0, 1.0))
    decays = {name: bool(value) for name, value in unstack_names(mask).items()}
    assert decays == {
        "embed_tokens/embedding": True,
        "layers/input_layernorm/scale": False,
        "layers/mlp/gate_proj/kernel": True,
        "layers/self_attn/q_proj/kernel": True,
        "layers/self_attn/q_proj/bias": False,
        "norm/scale": False,
        "score/kernel": True,
    }


def unstack_names(tree):
    return {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", sorted(set(optim.OPTIMIZERS) - {"adam", "lamb"}))
def test_zero_gradient_leaves_decay_alone_on_decayed_leaves_alone(name):
    params = random_tree(0, 1.5)
    tx = optim.make_optimizer(name, schedule=lambda count: 0.5, weight_decay=0.1)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for path, update in unstack_names(updates).items():
        wanted = -0.05 * unstack_names(params)[path] if path.endswith(("kernel", "embedding")) else 0
        np.testing.assert_allclose(update, jnp.broadcast_to(wanted, update.shape), rtol=1e-5, atol=1e-9, err_msg=path)


def test_an_unknown_leaf_name_is_refused_with_its_path():
    params = random_tree(0, 1.0) | {"norm": {"weight": jnp.ones(8)}}
    with pytest.raises(ValueError, match="parameter norm/weight ends in 'weight', expected one of kernel, embedding"):
        optim.decay_mask(params)
    with pytest.raises(ValueError, match="norm/weight"):
        optim.make_optimizer("adamw", schedule=SCHEDULE, weight_decay=0.1).init(params)
    with pytest.raises(ValueError, match="norm/weight"):
        optim.make_optimizer("muon", schedule=SCHEDULE).init(params)


@pytest.mark.parametrize("name", sorted(n for n in optim.OPTIMIZERS if "moments_dtype" in optim.options(n)))
def test_moments_dtype_stores_first_moments_alone_and_keeps_updates_in_float32(name):
    params, gradients = random_tree(0, 1.0), gradients_of_a_run()
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    tx = optim.make_optimizer(name, schedule=SCHEDULE, moments_dtype="bfloat16", **momentum)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(gradients[0], state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    first = {jax.tree_util.keystr(path) for path, leaf in leaves if leaf.dtype == jnp.bfloat16}
    assert len(first) == len(jax.tree.leaves(params)) and all(".mu" in path or ".trace" in path for path in first)
    assert all(leaf.dtype == jnp.float32 for path, leaf in leaves if ".nu" in jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamv", {}, "unknown optimizer 'adamv'; there are: adafactor, adagrad, adam, adamw"),
        ("adafactor", {"moments_dtype": "bfloat16"}, "moments_dtype=bfloat16 has no effect on adafactor"),
        ("rmsprop", {"b1": 0.9}, "b1=0.9 has no effect on rmsprop, whose options are: b2, eps"),
        ("adamw", {"momentum": 0.9}, "momentum=0.9 has no effect on adamw"),
        ("sgd", {"moments_dtype": "bfloat16"}, "moments_dtype=bfloat16 has no effect on sgd with momentum 0"),
        ("adam", {"weight_decay": 0.1}, "adamw is Adam with weight decay"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay is -1.0"),
        ("adamw", {"b2": 1.0}, "b2 is 1.0, expected a decay rate"),
        ("adamw", {"eps": -1e-8}, "eps is -1e-08"),
        ("adamw", {"moments_dtype": "int8"}, "moments_dtype is 'int8', expected a floating dtype"),
        ("adamw", {"moments_dtype": "bf16"}, "moments_dtype is 'bf16', expected a floating dtype"),
    ],
)
def test_an_option_that_can_not_be_or_does_nothing_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.make_optimizer(name, schedule=SCHEDULE, **arguments)


def placed_params(mesh):
    """Parameters sharded as a decoder's: kernels over fsdp x tensor, the rest replicated."""

    def spec(path, leaf):
        name = path[-1].key
        wanted = {"kernel": P(None, "fsdp", "tensor"), "embedding": P("tensor", "fsdp")}.get(name, P())
        axes = [a if a and size % mesh.shape[a] == 0 else None for a, size in zip(wanted, leaf.shape, strict=False)]
        return NamedSharding(mesh, P(*axes))

    params = random_tree(0, 1.5)
    return jax.device_put(params, jax.tree_util.tree_map_with_path(spec, params))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_lives_beside_its_parameter_and_a_sharded_update_equals_one_device(name):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    params, gradients = placed_params(mesh), gradients_of_a_run()
    options = {"momentum": 0.9} if name == "sgd" else {}
    tx = optim.make_optimizer(name, schedule=SCHEDULE, weight_decay=0.0 if name == "adam" else DECAY, **options)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    shardings = optim.state_shardings(tx, abstract)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    owners = unstack_names(params)
    followed = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        spelled = "/".join(e.key for e in path if isinstance(e, jax.tree_util.DictKey))
        owner = max((n for n in owners if f"/{spelled}".endswith(f"/{n}")), key=len, default=None)
        if owner is not None and owners[owner].shape == leaf.shape:
            assert leaf.sharding == owners[owner].sharding, jax.tree_util.keystr(path)
            followed.add(owner)
        else:
            assert leaf.sharding.is_fully_replicated and leaf.size <= 1000, jax.tree_util.keystr(path)
    factored_leaf = {"layers/mlp/gate_proj/kernel"} if name == "adafactor" else set()
    assert followed == owners.keys() - factored_leaf

    sharded = jax.jit(tx.update, out_shardings=(jax.tree.map(lambda x: x.sharding, params), shardings))
    for gradient in gradients:
        updates, state = sharded(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert largest_difference(jax.device_get(params), unstack(three_steps(tx, random_tree(0, 1.5), gradients))) < 1e-5


def test_state_shardings_need_placed_parameters():
    with pytest.raises(ValueError, match="parameter norm/scale has sharding .*, expected a NamedSharding"):
        optim.state_shardings(optax.adam(1e-3), {"norm": {"scale": jnp.ones(4)}})
