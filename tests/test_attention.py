"""The kernels equal XLA's attention, on one device and on meshes, and where one is chosen."""

import dataclasses
import functools
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxalign import config as config_lib
from jaxalign import models, programs, reference, sharding
from jaxalign.models import attention, decoder, embedding, flash

CFG = models.config_from_hf(
    dict(model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
         num_attention_heads=8, num_key_value_heads=2, head_dim=16, initializer_range=0.2, bos_token_id=1,
         eos_token_id=2)
)  # fmt: skip
WINDOWED = dataclasses.replace(CFG, sliding_windows=(5, None, 5))

MESHES = (
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
)


def arrays(rows, time, n_heads, n_kv, head_dim, segments=False):
    """q, k, v, cotangent, segment ids: rows of up to three segments and a few tokens of right padding, or None."""
    rng = np.random.default_rng(0)
    shapes = [(rows, time, n, head_dim) for n in (n_heads, n_kv, n_kv, n_heads)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    if not segments:
        return q, k, v, cotangent, None
    ids = np.sort(rng.integers(1, 4, (rows, time)), axis=1) * (np.arange(time) < time - 5)
    return q, k, v, cotangent, jnp.asarray(ids, jnp.int32)


def xla(q, k, v, segments, *, window):
    time = q.shape[1]
    mask = attention.attention_mask(attention.distance(time, time), segments, segments, window=window)
    return attention.attend(q, k, v, mask)


def with_gradients(function, q, k, v, cotangent):
    def both(q, k, v):
        out, back = jax.vjp(function, q, k, v)
        return out, *back(cotangent)

    return jax.device_get(jax.jit(both)(q, k, v))


def assert_equal(got, want, rtol=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=rtol * np.abs(w).max())


@pytest.fixture
def interpreted(monkeypatch):
    """The splash kernel runs without a TPU and is what every call without a cache chooses."""
    monkeypatch.setitem(flash.KERNELS, "splash", functools.partial(flash.splash, interpret=True))
    choose = attention.choose

    def chosen(cfg, mesh=None, **call):
        name, reason = choose(cfg, mesh, **call)
        return ("splash", "the test says so") if "there is no kernel" in reason else (name, reason)

    monkeypatch.setattr(attention, "choose", chosen)


@pytest.mark.parametrize(
    ("n_heads", "n_kv", "head_dim", "time", "window", "segments"),
    [
        (4, 2, 16, 128, None, False),
        (4, 1, 80, 100, 7, True),
        (2, 2, 128, 600, None, True),  # two blocks
        (2, 1, 24, 600, 300, False),
    ],
)
def test_splash_equals_xla_in_values_and_gradients(n_heads, n_kv, head_dim, time, window, segments):
    q, k, v, cotangent, ids = arrays(2, time, n_heads, n_kv, head_dim, segments)
    call = functools.partial(flash.splash, segment_ids_RT=ids, window=window, interpret=True)
    want = with_gradients(lambda *x: xla(*x, ids, window=window), q, k, v, cotangent)
    assert_equal(with_gradients(call, q, k, v, cotangent), want)


@pytest.mark.parametrize(("sizes", "n_kv"), [(MESHES[0], 4), (MESHES[1], 2)], ids=str)
def test_splash_on_a_mesh_equals_xla_on_one_device(interpreted, sizes, n_kv):
    q, k, v, cotangent, ids = arrays(8, 100, 8, n_kv, 16, segments=True)
    want = with_gradients(lambda *x: xla(*x, ids, window=9), q, k, v, cotangent)
    with sharding.use_mesh(sharding.make_mesh(**sizes)):
        got = with_gradients(lambda *x: flash.attend("splash", *x, ids, window=9), q, k, v, cotangent)
    assert_equal(got, want)


def loss_and_gradients(cfg, params, tokens, segments=None, mesh=None):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    weight = np.random.default_rng(1).normal(size=(*tokens.shape, cfg.hidden_size)).astype(np.float32)

    def loss(params):
        return (models.apply(cfg, params, tokens, positions, segments)[0] * weight).sum()

    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


def test_a_decoder_with_the_kernel_equals_one_without(request):
    """Scanned, rematerialised, on a mesh, some layers with a window and some without, packed rows."""
    cfg = dataclasses.replace(WINDOWED, remat="full")
    params = jax.jit(functools.partial(models.init, cfg))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (4, 40)).astype(np.int32)
    segments = np.repeat(np.array([[1, 2]], np.int32), 20, axis=1).repeat(4, axis=0)
    want = loss_and_gradients(cfg, params, tokens, segments)
    request.getfixturevalue("interpreted")
    got = loss_and_gradients(cfg, params, tokens, segments, sharding.make_mesh(**MESHES[1]))
    assert_equal(got, want, rtol=3e-5)


def test_a_cache_and_shared_prefixes_are_xlas(interpreted, monkeypatch):
    monkeypatch.setitem(flash.KERNELS, "splash", None)  # calling it would raise
    tokens = np.ones((1, 8), np.int32)

    def trace(segments=tokens, **call):
        return jax.eval_shape(lambda p: models.apply(CFG, p, tokens, tokens, segments, **call), models.abstract(CFG))

    trace(None, cache=models.init_cache(CFG, 1, 16))
    trace(prefix_ids_RT=tokens)
    with pytest.raises(TypeError):
        trace()
    with pytest.raises(TypeError):  # what fills a cache looks at itself alone
        trace(None, cache=models.init_cache(CFG, 1, 8))


# What is chosen


def mesh_of(platform, **sizes):
    sizes = {axis: sizes.get(axis, 1) for axis in sharding.AXES}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=AbstractDevice(platform, 1, platform))


@pytest.fixture
def gpu(monkeypatch):
    device = types.SimpleNamespace(
        client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090"),
        compute_capability="9.0",
        device_kind="NVIDIA H100",
    )
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    return device


BF16 = dataclasses.replace(CFG, compute_dtype="bfloat16")


def test_the_platform_of_the_mesh_decides(gpu):
    assert attention.choose(BF16, mesh_of("tpu"))[0] == "splash"
    assert attention.choose(BF16, mesh_of("gpu"))[0] == "cudnn"
    assert attention.choose(BF16, mesh_of("cpu")) == ("xla", "there is no kernel for cpu")
    assert attention.choose(BF16, sharding.make_mesh(data=-1))[0] == attention.choose(BF16)[0] == "xla"
    assert attention.choose(dataclasses.replace(BF16, attention="xla"), mesh_of("tpu"))[0] == "xla"


def test_packed_rows_on_gpu_are_xlas_unless_cudnn_is_asked_for(gpu):
    name, reason = attention.choose(BF16, mesh_of("gpu"), packed=True)
    assert name == "xla" and "no segment ids" in reason
    assert attention.choose(dataclasses.replace(BF16, attention="cudnn"), mesh_of("gpu"), packed=True)[0] == "cudnn"
    assert attention.choose(BF16, mesh_of("tpu"), packed=True)[0] == "splash"


def test_calls_that_no_kernel_knows_are_xlas():
    forced = dataclasses.replace(BF16, attention="splash")
    assert attention.choose(BF16, mesh_of("tpu"), cached=True)[0] == "xla"
    assert "data.prefixes" in attention.choose(forced, mesh_of("tpu"), prefixes=True)[1]


@pytest.mark.parametrize(
    ("platform", "sizes", "fields", "device", "reason"),
    [
        ("tpu", {"tensor": 3}, {}, {}, "8 heads do not divide over mesh.tensor x mesh.sequence = 3"),
        ("gpu", {"sequence": 16}, {}, {}, "8 heads do not divide"),
        ("gpu", {}, {"compute_dtype": "float32"}, {}, "model.compute_dtype is float32"),
        ("gpu", {}, {}, {"compute_capability": "7.5"}, "compute capability 8.0"),
        ("gpu", {}, {"head_dim": 12}, {}, "head_dim is 12"),
        ("gpu", {}, {"head_dim": 264}, {}, "up to 256"),
        ("gpu", {}, {"head_dim": 136}, {"compute_capability": "8.9"}, "up to 128"),
        ("gpu", {}, {}, {"client": types.SimpleNamespace(platform_version="rocm 7")}, "NVIDIA"),
    ],
)
def test_an_obstacle_is_named_and_refused_when_forced(gpu, platform, sizes, fields, device, reason):
    for name, value in device.items():
        setattr(gpu, name, value)
    cfg, mesh = dataclasses.replace(BF16, **fields), mesh_of(platform, **sizes)
    name, why = attention.choose(cfg, mesh)
    assert name == "xla" and reason in why
    kernel = attention.KERNEL_OF[platform]
    with pytest.raises(ValueError, match=f"model.attention is '{kernel}', but .*Set it to 'auto'"):
        attention.choose(dataclasses.replace(cfg, attention=kernel), mesh)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_on_another_platform_is_refused_before_anything_runs(kernel):
    with pytest.raises(ValueError, match=f"model.attention is '{kernel}'.*platform cpu"):
        attention.choose(dataclasses.replace(BF16, attention=kernel), sharding.make_mesh(data=-1))


def test_a_choice_is_logged_once(caplog):
    attention.say.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention.say("xla", "the test says so")
    assert caplog.messages == ["attention: xla, because the test says so"]


def test_the_key_reaches_the_model_and_no_config_json_or_reference(tmp_path):
    config = config_lib.base()
    config.model.random = {"model_type": "llama"}
    config.model.attention = "splash"
    cfg = programs.model_config(config, path=None, platform="tpu")
    auto = dataclasses.replace(cfg, attention="auto")
    assert cfg.attention == "splash" and models.config_to_hf(cfg) == models.config_to_hf(auto)
    assert models.declare(cfg) == models.declare(auto)  # whatever the devices are
    prepared = types.SimpleNamespace(kind="pairs", fingerprint="f", meta={"max_length": 8})
    files = {reference.cache_file(tmp_path, model="m", prepared=prepared, cfg=c) for c in (cfg, auto)}
    assert len(files) == 1
    choices = config_lib.BY_NAME["model.attention"].choices
    assert set(choices) == {"auto", "xla", *flash.KERNELS} and set(attention.KERNEL_OF.values()) == set(flash.KERNELS)


# cuDNN: what it is asked for, computed by the same function's XLA implementation


@pytest.mark.parametrize(
    ("time", "window", "segments"), [(16, None, False), (16, 5, False), (17, None, True), (17, 5, True)]
)
def test_cudnn_is_asked_for_what_xla_computes(monkeypatch, time, window, segments):
    asked, dot_product_attention = [], jax.nn.dot_product_attention

    def recorded(*args, implementation, **options):
        asked.append(implementation)
        return dot_product_attention(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q, k, v, cotangent, ids = arrays(2, time, 4, 2, 8, segments)
    want = with_gradients(lambda *x: xla(*x, ids, window=window), q, k, v, cotangent)
    got = with_gradients(lambda *x: flash.cudnn(*x, ids, window=window), q, k, v, cotangent)
    assert_equal(got, want)
    assert asked == ["cudnn"]


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "segments"), [(None, False), (20, False), (None, True), (20, True)])
def test_cudnn_equals_xla_on_a_gpu(window, segments):
    q, k, v, cotangent, ids = arrays(2, 256, 8, 2, 64, segments)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v, cotangent)]
    got = with_gradients(lambda *x: flash.cudnn(*x, ids, window=window), *half)
    want = with_gradients(lambda *x: xla(*x, ids, window=window), *half)
    assert_equal([x.astype(np.float32) for x in got], [x.astype(np.float32) for x in want], rtol=0.02)


# The sequence axis


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_time_is_exchanged_for_heads_and_never_gathered(interpreted, name):
    """q, k and v go to heads and the output comes back, by all-to-all; nothing else of a whole row is assembled."""
    cfg = dataclasses.replace(CFG, num_hidden_layers=1, sliding_windows=(None,))
    mesh = sharding.make_mesh(fsdp=2, sequence=2, devices=jax.devices()[:4])
    time = 56  # no weight has a dimension of this size
    with sharding.use_mesh(mesh):
        params = models.abstract(cfg, np.float32, sharding.param_shardings(mesh, models.declare(cfg)))
        x = jax.ShapeDtypeStruct((4, time, 64), jnp.float32, sharding=sharding.row_sharding(mesh))
        weights = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), params["layers"])["self_attn"]
        seen = (attention.attention_mask(attention.distance(time, time)), None) if name == "xla" else None
        window = None if name == "xla" else 0  # for a kernel, which of the model's windows
        rope = (jnp.ones((4, time, 16 // 2)),) * 2

        def attend(weights, x):
            x = decoder._activation(x)
            module = decoder.Attention(dataclasses.replace(cfg, attention=name))
            out, _ = module.apply({"params": weights}, x, rope, seen, None, 0, None, window, None)
            return decoder._activation(out)

        text = jax.jit(attend).lower(weights, x).compile().as_text()
    exchanged = re.findall(r"= (?:\(.*?\)|\S+) all-to-all\(", text)
    assert len(exchanged) == 4
    gathered = re.findall(r"= \S*\[([\d,]*)\]\S* all-gather\(", text)
    assert not [dims for dims in gathered if str(time) in dims.split(",")]


def test_weights_are_split_over_the_sequence_axis_too():
    mesh = mesh_of("cpu", fsdp=2, sequence=4)
    for logical in ("embed", "vocab"):
        split = sharding.partition((64,), (logical,), mesh)[0]
        assert sharding.axis_size(split, mesh) == 8


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}], ids=str)
def test_a_look_up_in_parts_equals_a_whole_one(monkeypatch, sizes):
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(64, 16)).astype(np.float32), rng.integers(0, 64, (8, 14)).astype(np.int32)
    cotangent = rng.normal(size=(8, 14, 16)).astype(np.float32)

    def both(table):
        found, back = jax.vjp(lambda table: embedding.lookup(table, tokens, jnp.float32), table)
        return found, *back(cotangent)

    want = both(jnp.asarray(table))
    monkeypatch.setattr(embedding, "GROUP_BYTES", 8 * 5 * 16 * 4)  # three parts, the last one shorter
    with sharding.use_mesh(sharding.make_mesh(**sizes)):
        lowered = jax.jit(both).lower(table)
        assert "while" in lowered.as_text()
        assert_equal(jax.device_get(lowered.compile()(table)), jax.device_get(want))
