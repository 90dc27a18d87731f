"""One decoder for the Llama and Qwen families; what differs between them are fields of ModelConfig.

Flax Linen is used as a thin shell: it names and declares the weights and scans the layers. Everything above sees a
nested dict of arrays. Each weight is declared once, where it is used, with its shape, initializer and the logical
names of its dimensions; shapes, shardings and Hugging Face names all derive from that (`models.declare`).

Letters: R rows, T time, S cache slots, L layers, D model, N heads, K key/value heads, H head size, F MLP.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxalign import quantize, sharding
from jaxalign.models import attention, flash
from jaxalign.models.config import ModelConfig
from jaxalign.models.embedding import lookup

ACTIVATIONS = {"silu": jax.nn.silu}

REMAT_POLICIES = {
    "none": None,
    # Keep every matrix product's result, recompute what is cheap (norms, activations, softmax).
    "dots": jax.checkpoint_policies.dots_saveable,
    # The same without products that have batch dimensions: attention scores are recomputed.
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # Keep a layer's input only.
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Declared(nn.Partitioned):
    """A weight with the logical names of its dimensions; where it lies on a mesh is `sharding`'s business."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def _declare(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Any:
    given: Any = module.get_variable("params", name)
    if isinstance(given, quantize.Quantized):
        return given  # Linen would compare its arrays with the declared one

    def boxed(key: jax.Array) -> Any:
        return Declared(init(key, shape, jnp.float32), names=axes)

    return module.param(name, boxed)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in float32 (Zhang & Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _declare(self, "scale", nn.initializers.ones, (x.shape[-1],), (None,))
        x32 = x.astype(jnp.float32)
        x32 = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class Linear(nn.Module):
    """x @ kernel (+ bias), the kernel [in, out] cast to x's dtype where it is used."""

    features: int
    axes: tuple[str, str]
    stddev: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys_R: jax.Array | None = None) -> jax.Array:
        init = nn.initializers.normal(self.stddev)
        kernel = _declare(self, "kernel", init, (x.shape[-1], self.features), self.axes)
        y = _product(x, kernel)
        if self.use_bias:
            bias = _declare(self, "bias", nn.initializers.zeros, (self.features,), self.axes[1:])
            y = y + bias.astype(x.dtype)
        if self.has_variable("params", "lora_a"):  # an adapter was attached (lora.py), its output's scale is in b
            if dropout_keys_R is not None and self.has_variable("params", "lora_dropout"):
                own = fold_in(dropout_keys_R, zlib.crc32(str(self.name).encode()))
                x = dropout(x, own, self.get_variable("params", "lora_dropout"))
            y = y + _product(_product(x, self.get_variable("params", "lora_a")), self.get_variable("params", "lora_b"))
        return y


def _product(x: jax.Array, kernel: Any) -> jax.Array:
    """x @ kernel in x's dtype.

    As a product of two matrices its backward pass is two more; with three dimensions XLA's CPU backend transposes
    copies (a quarter of a layer's time). Time that is split over devices has to stay a dimension of its own.
    """
    flat = x if sharding.axis_size("sequence") > 1 else x.reshape(-1, x.shape[-1])
    if isinstance(kernel, quantize.Quantized):
        y = quantize.product(flat, kernel)
    else:
        y = flat @ kernel.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def fold_in(keys_R: jax.Array, data: jax.Array | int) -> jax.Array:
    """`jax.random.fold_in` of each row's key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_R, data)


def dropout(x_RTI: jax.Array, keys_R: jax.Array, rate: jax.Array) -> jax.Array:
    """x with a share `rate` of its entries 0 and the others made larger for it; which, a row's key alone decides.

    Padding a row or moving it to another batch changes nothing: an entry's bits depend on its place in the row.
    """
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_RTI.shape[1:]))(keys_R)
    return jnp.where(kept, x_RTI * (1 / (1 - rate)).astype(x_RTI.dtype), 0)


class Table(nn.Module):
    """A weight that is used as it stands: the embedding [V, D] (look-up and head), a score head [D, labels]."""

    param_name: str
    shape: tuple[int, int]
    axes: tuple[str | None, str | None]
    stddev: float

    @nn.compact
    def __call__(self) -> Any:
        return _declare(self, self.param_name, nn.initializers.normal(self.stddev), self.shape, self.axes)


def rope_frequencies(cfg: ModelConfig) -> jax.Array:
    """Angle per position of each pair of dimensions, [H / 2] float32, with `cfg.rope_scaling` applied.

    "linear" divides all (Chen et al. 2023); "llama3" divides long wavelengths, keeps short ones and blends between
    (as Llama 3.1 was trained).
    """
    exponent = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    frequencies = 1.0 / (cfg.rope_theta**exponent)
    scaling = cfg.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None, "config_from_hf checks llama3's fields"
    wavelengths = 2 * math.pi / frequencies
    blend = jnp.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(x_RTNH: jax.Array, cos_RTH: jax.Array, sin_RTH: jax.Array) -> jax.Array:
    """Rotary embedding in Hugging Face's half-split layout: dimension i turns with i + H/2 (Su et al. 2021)."""
    first, second = jnp.split(x_RTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_RTH[:, :, None], sin_RTH[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_RTNH.dtype)


class Attention(nn.Module):
    """Self-attention, against this call's keys or against a cache that it extends in place."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_RTD: jax.Array,
        rope: Any,
        seen: Any,
        cache: Any,
        layer: Any,
        index: Any,
        window: Any,
        dropout_keys_R: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        linear = functools.partial(Linear, stddev=cfg.initializer_range)
        rows, time, _ = x_RTD.shape

        def heads(name: str, n_heads: int, axis: str) -> jax.Array:
            projection = linear(n_heads * cfg.head_dim, ("embed", axis), use_bias=cfg.attention_bias, name=name)
            flat = projection(x_RTD, dropout_keys_R)
            return flat.reshape(rows, time, n_heads, cfg.head_dim)

        q = heads("q_proj", cfg.num_attention_heads, "heads")
        k = heads("k_proj", cfg.num_key_value_heads, "kv_heads")
        v = heads("v_proj", cfg.num_key_value_heads, "kv_heads")
        if cfg.qk_norm:
            q = RMSNorm(cfg.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(cfg.rms_norm_eps, name="k_norm")(k)
        q, k, v = (attention.split_time(x) for x in (rotate(q, *rope), rotate(k, *rope), v))
        decoding = cache is not None and time < cache[0].shape[-1]
        if cache is not None:
            cache = (
                _extend(cache[0], k.transpose(0, 2, 3, 1), layer, index, axis=3),
                _extend(cache[1], v.transpose(0, 2, 1, 3), layer, index, axis=2),
            )
        if decoding:
            k, v = (x if layer is None else lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
            k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
        if cfg.attention == "xla":
            mask, distance = seen
            out = attention.attend(q, k, v, mask if window is None else mask & (distance < window))
        else:
            # A kernel is compiled for its window: one for each that the layers have, and the layer says which.
            kernels = [functools.partial(flash.attend, cfg.attention, window=w) for w in _windows(cfg)]
            out = lax.switch(window, kernels, q, k, v, seen)
        out = attention.split_time(out).reshape(rows, time, cfg.num_attention_heads * cfg.head_dim)
        if decoding:
            out = sharding.constrain(out, "data", None, "tensor")  # see `_activation`
        projection = linear(cfg.hidden_size, ("heads", "embed"), use_bias=cfg.attention_out_bias, name="o_proj")
        return projection(out, dropout_keys_R), cache


def _extend(cache: jax.Array, new: jax.Array, layer: Any, index: jax.Array, axis: int) -> jax.Array:
    """A cache of k or v (layer is None), or that of one of all layers, with new entries at index of its slots' axis: in
    place, and no step turns it around.
    """
    start, new = [jnp.zeros((), index.dtype)] * 4, new.astype(cache.dtype)
    start[axis] = index
    if layer is not None:
        start, new = [layer.astype(index.dtype), *start], new[None]
    return lax.dynamic_update_slice(cache, new, start)


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_RTD: jax.Array, dropout_keys_R: jax.Array | None) -> jax.Array:
        cfg = self.cfg
        linear = functools.partial(Linear, stddev=cfg.initializer_range, use_bias=cfg.mlp_bias)
        gate = linear(cfg.intermediate_size, ("embed", "mlp"), name="gate_proj")(x_RTD, dropout_keys_R)
        up = linear(cfg.intermediate_size, ("embed", "mlp"), name="up_proj")(x_RTD, dropout_keys_R)
        down = linear(cfg.hidden_size, ("mlp", "embed"), name="down_proj")
        return down(ACTIVATIONS[cfg.hidden_act](gate) * up, dropout_keys_R)


class Layer(nn.Module):
    """One pre-norm block; the body of the scan over layers."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, carry: Any, rope: Any, seen: Any, index: Any, dropout_keys_R: Any, layer: Any, window: Any
    ) -> tuple[Any, None]:
        cfg = self.cfg
        x, cache = carry
        decoding = cache is not None and x.shape[1] < cache[0].shape[-1]
        keys_R = None if dropout_keys_R is None else fold_in(dropout_keys_R, layer)
        norm = functools.partial(RMSNorm, cfg.rms_norm_eps)
        attended, cache = Attention(cfg, name="self_attn")(
            norm(name="input_layernorm")(x), rope, seen, cache, layer, index, window, keys_R
        )
        x = _activation(x + attended, decoding)
        x = x + MLP(cfg, name="mlp")(norm(name="post_attention_layernorm")(x), keys_R)
        return (_activation(x, decoding), cache), None


def look_up(table: Any, tokens_RT: jax.Array, dtype: Any) -> jax.Array:
    """table[tokens] as [R, T, D] in `dtype`; of a quantised table only these rows are decoded."""
    if not isinstance(table, quantize.Quantized):
        return lookup(table, tokens_RT, dtype)
    codes, scales = (lookup(x, tokens_RT, jnp.float32) for x in (table.codes, table.scales))
    return quantize.rows(codes, scales, dtype)


def _windows(cfg: ModelConfig) -> tuple[int | None, ...]:
    """The windows that layers have, each once."""
    return tuple(dict.fromkeys(cfg.sliding_windows))


def _activation(x_RTD: jax.Array, decoding: bool = False) -> jax.Array:
    """Where activations lie between layers.

    While decoding they are few and the weights many: states are split as the kernels' inputs are, so that it is they
    that travel, at every token, and not the weights (Pope et al. 2022, weight-stationary).
    """
    if decoding:
        return sharding.constrain(x_RTD, "data", None, ("fsdp", "sequence"))
    return sharding.constrain(x_RTD, sharding.ROWS, "sequence", None)


class Decoder(nn.Module):
    """Tokens -> normed hidden states [R, T, D]; declares the head (or score) weight too."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_RT: jax.Array,
        positions_RT: jax.Array,
        segment_ids_RT: jax.Array | None,
        prefix_ids_RT: jax.Array | None,
        cache: Any,
        dropout_keys_R: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        n_queries = tokens_RT.shape[1]
        index: Any = None
        buffers: Any = None
        decoding = False
        if cache is not None:
            assert segment_ids_RT is None, "a cache says itself what its rows see"
            index, buffers = cache["index"], (cache["k"], cache["v"])
            # What fills a cache begins it and sees itself alone: that is attention as without one.
            decoding = n_queries < jax.tree.leaves(buffers)[0].shape[-1]
        name, reason = attention.choose(
            self.cfg, packed=segment_ids_RT is not None, prefixes=prefix_ids_RT is not None, cached=decoding
        )
        if not decoding and sharding.platform() != "cpu":  # where there is nothing to choose, nothing is said
            attention.say(name, reason)
        cfg = dataclasses.replace(self.cfg, attention=name)
        dtype = jnp.dtype(cfg.compute_dtype)
        shape = (cfg.vocab_size, cfg.hidden_size)
        table = functools.partial(Table, "embedding", shape, ("vocab", None), cfg.initializer_range)
        x = _activation(look_up(table(name="embed_tokens")(), tokens_RT, dtype), decoding)

        angles = positions_RT[..., None].astype(jnp.float32) * rope_frequencies(cfg)
        rope = (jnp.cos(angles), jnp.sin(angles))

        n_keys = jax.tree.leaves(buffers)[0].shape[-1] if decoding else n_queries
        windows = _windows(cfg)
        if cfg.attention == "xla":
            uniform = len(windows) == 1  # one static window, or none: the mask is made once, outside of the scan
            window = windows[0] if uniform else None
            if decoding:
                distance_TS = attention.age(n_queries, n_keys, index)
                mask = attention.cache_mask(distance_TS, cache["lengths"], window=window)
            else:
                distance_TS = attention.distance(n_queries, n_keys)
                mask = attention.attention_mask(
                    distance_TS, segment_ids_RT, segment_ids_RT, prefixes_RT=prefix_ids_RT, window=window
                )
            seen: Any = (mask, distance_TS)
            window_L = None if uniform else jnp.array([w or n_keys for w in cfg.sliding_windows], jnp.int32)
        else:
            seen = segment_ids_RT
            window_L = jnp.array([windows.index(w) for w in cfg.sliding_windows], jnp.int32)

        body = Layer
        if REMAT_POLICIES[cfg.remat] is not None and cache is None:
            body = nn.remat(Layer, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        unstacked: Any = self.get_variable("params", "layers")
        if isinstance(unstacked, tuple):  # models.unstacked: a layer after the other, each with a cache of its own
            new = []
            if sharding.platform() == "cpu":
                # XLA would compute them anew for each element of each head that they turn, in each layer: it copies
                # what it takes for cheap into the loops that read it. A loop of its own it does not copy.
                rope = tuple(lax.map(lambda i: lax.switch(i, (jnp.cos, jnp.sin), angles), jnp.arange(2)))
            for n, (weights, k, v) in enumerate(zip(unstacked, *buffers, strict=True)):
                its_window = None if window_L is None else window_L[n]
                layer: Any = functools.partial(Layer(cfg, parent=None).apply, {"params": weights})
                (x, own), _ = layer((x, (k, v)), rope, seen, index, dropout_keys_R, None, its_window)
                new.append(own)
            buffers = tuple(zip(*new, strict=True))
        else:
            layers = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
                length=cfg.num_hidden_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
                check_constancy_invariants=False,  # would trace the body once more
            )(cfg, name="layers")
            layer_L = jnp.arange(cfg.num_hidden_layers)
            (x, buffers), _ = layers((x, buffers), rope, seen, index, dropout_keys_R, layer_L, window_L)

        x = RMSNorm(cfg.rms_norm_eps, name="norm")(x)
        if cfg.num_labels:
            Table("kernel", (cfg.hidden_size, cfg.num_labels), (None, "labels"), cfg.initializer_range, name="score")()
        elif not cfg.tie_word_embeddings:
            table(name="lm_head")()
        if cache is not None:
            cache = {
                "k": buffers[0],
                "v": buffers[1],
                "index": (index + n_queries) % jax.tree.leaves(buffers)[0].shape[-1],
                "lengths": cache["lengths"] + n_queries,
            }
        return x, cache
