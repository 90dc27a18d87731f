"""Codes are the nearest values, a quantised base computes what its decoded weights do, and never decodes them all."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import GOLDEN, LAYOUTS, model
from test_lora import SPEC, TINY, rows, score, tiny, trained

from jaxalign import frozen, hf, logprobs, lora, models, objectives, quantize, sharding

SAVED = dataclasses.replace(SPEC, modules_to_save=("embed_tokens",))


def weight(*shape):
    return np.random.default_rng(0).normal(0, 0.05, shape).astype(np.float32)


@functools.cache
def kept(kind, layout=None, spec=SPEC):
    """The tiny model as a LoRA run keeps it."""
    mesh = sharding.make_mesh(**dict(layout)) if layout else sharding.make_mesh(devices=jax.devices()[:1])
    keep = frozen.keeper(TINY, spec, mesh, kind)
    placed = jax.device_put(jax.tree.map(jnp.copy, tiny()), sharding.param_shardings(mesh, models.declare(TINY)))
    return lora.Frozen(lora.nest({path: keep(path, leaf) for path, leaf in lora.flat(placed).items()}), spec)


def decoded(tree):
    """The same tree with its weights decoded."""
    return jax.tree.map(
        lambda x: quantize.dequantize(x, jnp.float32) if isinstance(x, quantize.Quantized) else x,
        tree,
        is_leaf=lambda x: isinstance(x, quantize.Quantized),
    )


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("n_in", [192, 40])
def test_each_weight_becomes_the_nearest_value_of_its_block(kind, n_in):
    w = weight(n_in, 6)
    block = math.gcd(n_in, 64)
    got = np.asarray(quantize.dequantize(quantize.quantize(jnp.asarray(w), kind), jnp.float32))
    values = np.array(quantize.NF4, np.float32) if kind == "nf4" else np.arange(-127, 128, dtype=np.float32) / 127
    blocks = w.reshape(-1, block, 6)
    scales = np.asarray(jnp.asarray(np.abs(blocks).max(1, keepdims=True)).astype(jnp.bfloat16).astype(jnp.float32))
    nearest = values[np.abs((blocks / scales)[..., None] - values).argmin(-1)] * scales
    np.testing.assert_allclose(got, nearest.reshape(w.shape), rtol=1e-6, atol=1e-9)


def test_a_table_is_cut_along_its_rows():
    table = weight(5, 128)
    stored = quantize.quantize_table(jnp.asarray(table))
    assert (stored.codes.shape, stored.scales.shape, stored.shape) == ((5, 128), (5, 2), (5, 128))
    got = np.asarray(quantize.dequantize(stored, jnp.float32))
    limits = np.abs(table.reshape(5, 2, 64)).max(-1).repeat(64, axis=1) * 0.007  # half a step, and the scale's rounding
    assert np.all(np.abs(got - table) <= limits)
    np.testing.assert_array_equal(quantize.rows(stored.codes[1:3], stored.scales[1:3], jnp.float32), got[1:3])


def test_two_codes_of_nf4_stand_in_a_byte():
    stored = quantize.quantize(jnp.asarray(weight(3, 128, 8)), "nf4")
    assert (stored.codes.shape, stored.codes.dtype) == ((3, 64, 8), jnp.uint8) and stored.shape == (3, 128, 8)
    assert (stored.scales.shape, stored.scales.dtype) == ((3, 2, 8), jnp.bfloat16)
    bits = 8 * sum(x.nbytes for x in jax.tree.leaves(stored)) / (3 * 128 * 8)
    assert bits == 4.25


def test_zeros_stay_zero_and_an_odd_side_is_refused():
    for kind in quantize.KINDS:
        assert not np.any(quantize.dequantize(quantize.quantize(jnp.zeros((64, 2)), kind), jnp.float32))
    assert not np.any(quantize.dequantize(quantize.quantize_table(jnp.zeros((3, 4))), jnp.float32))
    with pytest.raises(ValueError, match="use int8"):
        quantize.quantize(jnp.ones((33, 2)), "nf4")


def test_nf4_is_that_of_qwix():
    qwix = pytest.importorskip("qwix")
    w = jnp.asarray(weight(128, 8))
    theirs = qwix.dequantize(qwix.quantize(w, "nf4", tiled_axes={0: 64}, channelwise_axes=(1,)))
    ours = quantize.dequantize(quantize.quantize(w, "nf4"), jnp.float32)
    assert np.mean(np.abs(ours - theirs) < 2**-8 * np.abs(theirs) + 1e-9) > 0.99  # scales in 8 bits of mantissa
    np.testing.assert_allclose(ours, theirs, atol=0.05)  # of those between two values some go the other way


def test_a_product_and_its_gradient_are_those_of_the_decoded_weight():
    stored = quantize.quantize(jnp.asarray(weight(64, 8)), "nf4")
    whole, x = quantize.dequantize(stored, jnp.float32), jnp.asarray(weight(5, 64))
    value, gradient = jax.value_and_grad(lambda x: (quantize.product(x, stored) ** 2).sum())(x)
    want, want_gradient = jax.value_and_grad(lambda x: ((x @ whole) ** 2).sum())(x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_quantised_model_computes_what_its_decoded_weights_do(kind):
    base, adapters, batch = kept(kind), trained(TINY, SPEC), rows()
    got = score(TINY, base, adapters, batch)
    np.testing.assert_allclose(got, score(TINY, lora.Frozen(decoded(base.base), SPEC), adapters, batch), atol=2e-5)
    error = np.abs(got - score(TINY, lora.Frozen(tiny(), SPEC), adapters, batch)).max()
    assert 0 < error < {"int8": 0.5, "nf4": 5}[kind]


def test_on_a_mesh_codes_and_scales_are_split_and_the_numbers_are_the_same():
    layout = (("fsdp", 4), ("tensor", 2))
    base, mesh = kept("nf4", layout), sharding.make_mesh(**dict(layout))
    up = base.base["layers"]["mlp"]["up_proj"]["kernel"]
    # One block of 32 inputs can't be split over fsdp; the outputs are, over tensor. A table's rows are over both.
    assert up.codes.sharding.shard_shape(up.codes.shape) == (3, 16, 32) and up.scales.sharding == up.codes.sharding
    table = base.base["embed_tokens"]["embedding"]
    assert table.codes.sharding.shard_shape(table.codes.shape) == (6, 32)
    assert table.scales.sharding.shard_shape(table.scales.shape) == (6, 1)
    batch, adapters = rows(), trained(TINY, SPEC)
    want = score(TINY, kept("nf4"), adapters, batch)
    with sharding.use_mesh(mesh):
        placed = jax.device_put(adapters, lora.shardings(TINY, SPEC, mesh))
        np.testing.assert_allclose(score(TINY, base, placed, sharding.place_batch(mesh, batch, 8)), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gives_the_gradients_of_one_device(layout):
    mesh, batch = sharding.make_mesh(**layout), rows()

    def total(adapters, base, batch):
        return logprobs.score(TINY, lora.attach(base, adapters), batch)["logps"].sum()

    gradients = jax.jit(jax.grad(total))
    want = jax.device_get(gradients(trained(TINY, SPEC), kept("nf4"), batch))
    with sharding.use_mesh(mesh):
        placed = jax.device_put(trained(TINY, SPEC), lora.shardings(TINY, SPEC, mesh))
        got = gradients(placed, kept("nf4", tuple(layout.items())), sharding.place_batch(mesh, batch, 8))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max()), jax.device_get(got), want)


def test_large_kernels_are_split_along_their_inputs():
    cfg = dataclasses.replace(TINY, hidden_size=512, intermediate_size=1024)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    base = frozen.abstract(cfg, SPEC, mesh, "nf4").base
    up, down = (base["layers"]["mlp"][name]["kernel"] for name in ("up_proj", "down_proj"))
    assert up.codes.sharding.shard_shape(up.codes.shape) == (3, 64, 512)  # 512 inputs over 4, two to a byte
    assert up.scales.sharding.shard_shape(up.scales.shape) == (3, 2, 512)
    assert down.codes.sharding.shard_shape(down.codes.shape) == (3, 256, 128)


def test_what_is_trained_whole_is_not_quantised_and_begins_at_the_reference():
    base = kept("nf4", spec=SAVED)
    assert isinstance(base.base["embed_tokens"]["embedding"], jax.Array)
    assert isinstance(base.base["layers"]["mlp"]["up_proj"]["kernel"], quantize.Quantized)
    adapters = lora.init(TINY, jax.random.key(0), SAVED, base.base)
    objective = objectives.make(TINY, "sigmoid", beta=0.1)
    batch = {**rows(), "ref_logps": score(TINY, base, {}, rows())}
    loss, _ = jax.jit(objective)(adapters, base, batch, {}, None)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-5)


def test_no_program_ever_holds_all_layers_of_a_kernel_decoded():
    """Neither forward, nor kept for the backward pass where layers are not recomputed."""
    adapters, batch = trained(TINY, SPEC), rows()

    def text(base):
        total = lambda adapters: logprobs.score(TINY, lora.attach(base, adapters), batch)["logps"].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(total))(adapters))

    assert "f32[3,32,64]" in text(lora.Frozen(tiny(), SPEC))  # all layers of up_proj
    assert "f32[3,32,64]" not in text(kept("nf4")) and "f32[32,64]" in text(kept("nf4"))


def test_leaves_are_quantised_as_they_are_read_and_let_go():
    cfg, whole = model("llama")
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    keep, seen = frozen.keeper(cfg, SPEC, mesh, "int8"), []

    def watched(path, leaf):
        assert all(one.is_deleted() for one in seen)  # one leaf in float32 at a time
        seen.append(leaf)
        return keep(path, leaf)

    shardings = sharding.param_shardings(mesh, models.declare(cfg))
    _, base = hf.load(GOLDEN / "models" / "llama" / "policy", cfg, shardings=shardings, keep=watched)
    abstract = frozen.abstract(cfg, SPEC, mesh, "int8").base
    assert jax.tree.structure(base) == jax.tree.structure(abstract)
    jax.tree.map(lambda x, a: (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding) or 1 / 0, base, abstract)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=np.abs(y).max() / 120), decoded(base), whole)


def test_without_quantising_the_base_has_the_compute_dtype_and_norms_float32():
    cfg = dataclasses.replace(TINY, compute_dtype="bfloat16")
    found = lora.flat(frozen.abstract(cfg, SPEC, sharding.make_mesh(data=8)).base)
    assert {leaf.dtype for path, leaf in found.items() if path[-1] != "scale"} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for path, leaf in found.items() if path[-1] == "scale"} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="model.quantize is 'int4', expected one of int8, nf4"):
        frozen.abstract(cfg, SPEC, sharding.make_mesh(data=8), "int4")


LLAMA_3_8B = """
import dataclasses, functools, json
import jax, numpy as np, optax
from jaxalign import frozen, lora, models, objectives, optim, preflight, sharding, step

mesh = sharding.make_mesh(devices=preflight.tpu_devices("v5p:1x1x1")[:1])
cfg = dataclasses.replace(models.config_from_hf(dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5,
)), compute_dtype="bfloat16", remat="full")
spec = lora.Spec(rank=16, alpha=16.0)
whole = sharding.replicated(mesh)
put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
leaves = dict(tokens=np.int32, positions=np.int32, mask=np.bool_, ref_logps=np.float32)
batch = {name: put(jax.ShapeDtypeStruct((2, 2048), dtype)) for name, dtype in leaves.items()}
batch["lengths"] = put(jax.ShapeDtypeStruct((2,), np.int32))
with sharding.use_mesh(mesh):
    tx = optim.make_optimizer("adamw", schedule=optax.constant_schedule(1e-4))
    adapters = lora.abstract(cfg, spec, mesh)
    state = jax.tree.map(put, jax.eval_shape(functools.partial(step.init_state, tx=tx), adapters))
    train_step = jax.jit(step.make_train_step(objectives.make(cfg, "sigmoid", beta=0.1), tx), donate_argnums=0)
    arguments = (state, frozen.abstract(cfg, spec, mesh, "nf4"), batch)
    need = preflight.measure(
        preflight.Job("nf4", (2, 2048), lambda: train_step.lower(*arguments), arguments, None), "tpu"
    )
    plain = preflight.device_bytes((state, frozen.abstract(cfg, spec, mesh), batch))
print(json.dumps(dict(arguments=need.arguments, total=need.total, exhausted=need.exhausted, plain=plain)))
"""


@pytest.mark.slow
@pytest.mark.skipif("JAXALIGN_LIBTPU" not in os.environ, reason="JAXALIGN_LIBTPU names the folder that holds libtpu")
def test_llama_3_8b_in_nf4_takes_a_third_of_bfloat16_and_fits_24_gb():
    """A DPO step, r = 16, a pair of 2,048 tokens, by the TPU compiler for one chip."""
    folders = f"{os.environ['JAXALIGN_LIBTPU']}{os.pathsep}{Path(__file__).parent.parent}"
    environment = {**os.environ, "PYTHONPATH": folders, "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run([sys.executable, "-c", LLAMA_3_8B], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    need = json.loads(done.stdout.splitlines()[-1])
    assert need["arguments"] <= 0.35 * need["plain"] and need["total"] < 24e9 and not need["exhausted"]
