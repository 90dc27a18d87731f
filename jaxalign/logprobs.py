"""Token log-probs from hidden states, without ever holding [R, T, V].

Only masked positions go through the head, a chunk of them at a time. On a mesh the head stays where it lies, split by
vocabulary over tensor x fsdp: each chunk's hidden states are gathered over the fsdp group, every device multiplies
them with its slice of the vocabulary, and the pieces of the softmax meet in two small sums. The backward pass makes
the chunk's logits again and accumulates the head's gradient in float32, split as the head is.

Letters: R rows, T time, D model, V vocabulary (v: a device's slice of it), C tokens of a chunk, Q tokens of a device.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxalign import models, sharding
from jaxalign.models.config import ModelConfig
from jaxalign.models.embedding import vocab_axes
from jaxalign.segments import per_sequence as per_sequence
from jaxalign.segments import per_token as per_token

STATISTICS = ("logps", "entropy", "mean_logit", "correct", "sum_p2")

# Float32 logits of one chunk on one device, by platform. The backward pass reads and writes the head's whole gradient
# once a chunk, which a GPU alone with a large vocabulary would feel (a figure by arithmetic: no GPU was at hand).
CHUNK_BYTES = {"cpu": 48 * 2**20, "tpu": 48 * 2**20, "gpu": 512 * 2**20}


class _Layout(NamedTuple):
    """Where things lie while the head works (static). Axis names are () or None where there is nothing to do."""

    rows: Any
    time: Any
    vocab: tuple[str, ...]  # the head's slices
    gather: tuple[str, ...]  # the part of `vocab` over which tokens are split too: they are gathered
    everywhere: tuple[str, ...]
    chunk: int  # tokens of one device in a chunk


def token_stats(
    cfg: ModelConfig,
    params: models.Params,
    hidden_RTD: jax.Array,
    tokens_RT: jax.Array,
    mask_RT: jax.Array,
    segment_ids_RT: jax.Array | None = None,
    *,
    temperature: jax.Array | float = 1.0,
    want: tuple[str, ...] = ("logps",),
    differentiate: tuple[str, ...] = ("logps",),
    chunk_tokens: int | None = None,
) -> dict[str, jax.Array]:
    """What the head says about each masked token given those before it.

    Args:
      hidden_RTD: from `models.apply` on the same tokens.
      tokens_RT: int32.
      mask_RT: bool; entry t is computed where mask[t] is True, and 0 elsewhere.
      segment_ids_RT: int32 or None (one segment a row). The first entry of a segment has nothing before it: 0.
      temperature: logits are divided by it; may be traced.
      want: names of STATISTICS: `logps` ln p(token) and `entropy` of the distribution, in nats; `mean_logit` over the
        vocabulary; `correct` (1.0 where no token is likelier); `sum_p2` (sum of squared probabilities).
      differentiate: those of `logps` and `entropy` through which a gradient flows; the others are constants. An
        entropy that is only looked at costs the backward pass nothing.
      chunk_tokens: tokens that go through the head at a time; by default as many as fit into CHUNK_BYTES.

    Returns:
      {name: [R, T] float32}.

    Raises:
      ValueError: a name in `want` or `differentiate` is unknown.
    """
    if unknown := set(want) - set(STATISTICS) or set(differentiate) - {"logps", "entropy"}:
        known = f"{', '.join(STATISTICS)}; the first two have a gradient"
        raise ValueError(f"token_stats does not know {sorted(unknown)}, it knows {known}")
    table_VD = models.head_table(cfg, params)
    n_rows, n_time = tokens_RT.shape
    # Position t's hidden state speaks about token t + 1: shift the integers, not the states.
    follows_RT = mask_RT[:, 1:].astype(bool)
    if segment_ids_RT is not None:
        follows_RT &= segment_ids_RT[:, 1:] == segment_ids_RT[:, :-1]
    follows_RT = jnp.pad(follows_RT, ((0, 0), (0, 1)))
    targets_RT = jnp.pad(tokens_RT[:, 1:], ((0, 0), (0, 1)))
    layout = _layout(table_VD, n_rows, n_time, chunk_tokens)
    hidden_RTD = sharding.constrain(hidden_RTD, sharding.ROWS, "sequence", None)
    temperature = jnp.asarray(temperature, jnp.float32)
    names = (tuple(want), tuple(differentiate))
    stats = _head_stats(layout, *names, hidden_RTD, table_VD, targets_RT, follows_RT, temperature)
    return {name: jnp.pad(x_RT[:, :-1], ((0, 0), (1, 0))) for name, x_RT in stats.items()}


def score(
    cfg: ModelConfig,
    params: models.Params,
    batch: Mapping[str, jax.Array],
    *,
    want: tuple[str, ...] = ("logps",),
    **options: Any,
) -> dict[str, jax.Array]:
    """`token_stats` of a batch under `params`: policy, reference, old policy and teacher are all scored by this.

    See `hidden` for the batch's leaves, and `mask` [R, T] bool: the tokens that are scored; `options`: temperature and
    differentiate.
    """
    hidden_RTD, segment_ids = hidden(cfg, params, batch), batch.get("segment_ids")
    return token_stats(cfg, params, hidden_RTD, batch["tokens"], batch["mask"], segment_ids, want=want, **options)


def hidden(cfg: ModelConfig, params: models.Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The decoder's last hidden states of a batch: [R, T, D] in cfg.compute_dtype.

    Leaves: tokens, positions [R, T] int32; segment_ids [R, T] where rows are packed, and prefix_ids [R, T] where a
    packed prompt stands once (see `models.apply`); dropout_keys [R] where adapters drop out; or shared_prefix [R, n],
    which says that rows 2i and 2i + 1 begin with the same n tokens, which are computed once.

    Raises:
      ValueError: packed prompts that stand once meet a model with sliding windows, which count slots.
    """
    if "shared_prefix" in batch:
        assert "segment_ids" not in batch, "rows with a shared prefix are not packed"
        return _hidden_of_pairs(cfg, params, batch)
    if "prefix_ids" in batch and any(cfg.sliding_windows):
        raise ValueError(
            "data.packing is 'shared', but the model has sliding windows, which count slots: set it to 'on'"
        )
    found, _ = models.apply(
        cfg,
        params,
        batch["tokens"],
        batch["positions"],
        batch.get("segment_ids"),
        prefix_ids_RT=batch.get("prefix_ids"),
        **_dropout(batch, 1),
    )
    return found


def _dropout(batch: Mapping[str, jax.Array], every: int) -> dict[str, Any]:
    """The keyword of `models.apply` that makes adapters drop out, with the key of each row or of every n-th."""
    return {"dropout_keys_R": batch["dropout_keys"][::every]} if "dropout_keys" in batch else {}


def _hidden_of_pairs(cfg: ModelConfig, params: models.Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Hidden states [R, T, D] of pairs of rows that begin alike: a pair is one row of prefix, first and second rest.

    Both rests see the prefix and themselves and count positions on from it: every number is as without sharing.
    """
    n, time = batch["shared_prefix"].shape[1], batch["tokens"].shape[1]

    def join(x_RT: jax.Array) -> jax.Array:
        first, second = x_RT[0::2], x_RT[1::2]
        return jnp.concatenate([first, second[:, n:]], axis=1)

    rest = jnp.ones((1, time - n), jnp.int32)
    prefix = jnp.ones((1, n), jnp.int32)
    segments = jnp.concatenate([prefix, 2 * rest, 3 * rest], axis=1)  # the same in every row
    joined, _ = models.apply(
        cfg,
        params,
        join(batch["tokens"]),
        join(batch["positions"]),
        segments,
        prefix_ids_RT=jnp.ones_like(segments),
        **_dropout(batch, 2),
    )
    rows = jnp.stack([joined[:, :time], jnp.concatenate([joined[:, :n], joined[:, time:]], axis=1)], axis=1)
    return rows.reshape(-1, time, joined.shape[-1])


def _layout(table_VD: jax.Array, n_rows: int, n_time: int, chunk_tokens: int | None) -> _Layout:
    mesh = sharding.current_mesh()
    vocab: tuple[str, ...] = () if mesh is None else vocab_axes(table_VD, mesh)
    rows = None if mesh is None else sharding.fit(n_rows, sharding.ROWS, mesh)
    time = None if mesh is None else sharding.fit(n_time, "sequence", mesh)
    gather = tuple(axis for axis in vocab if (rows and axis in rows) or axis == time)
    fitting = CHUNK_BYTES[sharding.platform(mesh)] // 4 * sharding.axis_size(vocab) // table_VD.shape[0]
    chunk = chunk_tokens or max(fitting // 128, 1) * 128
    n_local = n_rows // sharding.axis_size(rows) * (n_time // sharding.axis_size(time))
    own = min(max(chunk // sharding.axis_size(gather), 1), n_local)
    return _Layout(rows, time, vocab, gather, () if mesh is None else tuple(mesh.axis_names), own)


def _mapped(layout: _Layout, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """`function` on each device's piece. Its collectives are written out, and no derivative is taken through it."""
    if not layout.everywhere:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _specs(layout: _Layout) -> tuple[PartitionSpec, PartitionSpec]:
    return PartitionSpec(layout.rows, layout.time), PartitionSpec(layout.vocab or None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _head_stats(
    layout: _Layout,
    want: tuple[str, ...],
    differentiate: tuple[str, ...],
    hidden_RTD: jax.Array,
    table_VD: jax.Array,
    targets_RT: jax.Array,
    mask_RT: jax.Array,
    temperature: jax.Array,
) -> dict[str, jax.Array]:
    return _forward(layout, want, differentiate, hidden_RTD, table_VD, targets_RT, mask_RT, temperature)[0]


def _forward(layout, want, differentiate, hidden_RTD, table_VD, targets_RT, mask_RT, temperature):  # type: ignore[no-untyped-def]
    tokens, vocab = _specs(layout)
    # The backward pass wants the log-sum-exp of every token, and the entropy where a gradient flows through it.
    names = tuple(dict.fromkeys((*want, *differentiate, "lse")))
    stats = _mapped(
        layout,
        functools.partial(_local_stats, layout, names),
        (tokens, vocab, tokens, tokens, PartitionSpec()),
        {name: tokens for name in names},
    )(hidden_RTD, table_VD, targets_RT, mask_RT, temperature)
    residuals = (hidden_RTD, table_VD, targets_RT, mask_RT, temperature, stats["lse"], stats.get("entropy"))
    return {name: stats[name] for name in want}, residuals


def _backward(layout, want, differentiate, residuals, cotangents):  # type: ignore[no-untyped-def]
    hidden_RTD, table_VD, targets_RT, mask_RT, temperature, lse_RT, entropy_RT = residuals
    tokens, vocab = _specs(layout)
    wanted = [name for name in differentiate if name in want]
    per_token = {"target": targets_RT, "lse": lse_RT} | {f"g_{name}": cotangents[name] for name in wanted}
    if "entropy" in wanted:
        per_token["entropy"] = entropy_RT
    d_hidden, d_table = _mapped(
        layout,
        functools.partial(_local_gradients, layout),
        (tokens, vocab, tokens, {name: tokens for name in per_token}, PartitionSpec()),
        (tokens, vocab),
    )(hidden_RTD, table_VD, mask_RT, per_token, temperature)
    return d_hidden, d_table.astype(table_VD.dtype), None, None, None


_head_stats.defvjp(_forward, _backward)


def _chunks(layout: _Layout, mask_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Flat indices [Q'] of this device's masked tokens, padded past the end with Q, and the number of chunks.

    All devices make the same number of rounds, so that collectives inside the loop always meet.
    """
    n = mask_RT.size
    padded = -(-n // layout.chunk) * layout.chunk
    (index,) = jnp.nonzero(mask_RT.reshape(-1), size=padded, fill_value=n)
    rounds = -(-mask_RT.sum(dtype=jnp.int32) // layout.chunk)
    return index, lax.pmax(rounds, layout.everywhere) if layout.everywhere else rounds


def _take(layout: _Layout, x: jax.Array, index_C: jax.Array) -> jax.Array:
    """Rows `index` of x [Q, ...] (0 past the end), of the whole group that shares this head: [C, ...]."""
    x = x.at[index_C].get(mode="fill", fill_value=0)
    return lax.all_gather(x, layout.gather, axis=0, tiled=True) if layout.gather else x


def _own(layout: _Layout, x_C: jax.Array) -> jax.Array:
    """This device's part of per-token results of the group."""
    if not layout.gather:
        return x_C
    return lax.dynamic_slice_in_dim(x_C, lax.axis_index(layout.gather) * layout.chunk, layout.chunk)


def _slice_logits(layout: _Layout, hidden_CD: jax.Array, table_vD: jax.Array, temperature: jax.Array) -> jax.Array:
    table_vD = table_vD.astype(hidden_CD.dtype)
    return jnp.einsum("CD,vD->Cv", hidden_CD, table_vD, preferred_element_type=jnp.float32) / temperature


def _is_target(layout: _Layout, target_C: jax.Array, n_slice: int) -> jax.Array:
    """One-hot of the targets within this device's slice of the vocabulary: bool [C, v]."""
    first = lax.axis_index(layout.vocab) * n_slice if layout.vocab else 0
    return (target_C - first)[:, None] == jnp.arange(n_slice)


def _local_stats(layout, names, hidden_RTD, table_vD, targets_RT, mask_RT, temperature):  # type: ignore[no-untyped-def]
    hidden_QD, targets_Q = hidden_RTD.reshape(mask_RT.size, -1), targets_RT.reshape(-1)
    index_Q, rounds = _chunks(layout, mask_RT)
    total = lambda x: lax.psum(x, layout.vocab) if layout.vocab else x  # noqa: E731
    largest = lambda x: lax.pmax(x, layout.vocab) if layout.vocab else x  # noqa: E731
    n_vocab = table_vD.shape[0] * sharding.axis_size(layout.vocab)

    def round_(i: jax.Array, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
        index_C = lax.dynamic_slice_in_dim(index_Q, i * layout.chunk, layout.chunk)
        logits = _slice_logits(layout, _take(layout, hidden_QD, index_C), table_vD, temperature)
        is_target = _is_target(layout, _take(layout, targets_Q, index_C), table_vD.shape[0])
        top = largest(logits.max(axis=-1))
        exp = jnp.exp(logits - top[:, None])
        mass = total(exp.sum(axis=-1))
        lse = top + jnp.log(mass)
        target = total(jnp.where(is_target, logits, 0).sum(axis=-1))
        found = {"lse": lse, "logps": target - lse}
        if "entropy" in names:
            found["entropy"] = lse - total((exp * logits).sum(axis=-1)) / mass
        if "mean_logit" in names:
            found["mean_logit"] = total(logits.sum(axis=-1)) / n_vocab
        if "correct" in names:
            found["correct"] = (target >= top).astype(jnp.float32)
        if "sum_p2" in names:
            found["sum_p2"] = total(jnp.square(exp).sum(axis=-1)) / jnp.square(mass)
        return {name: out[name].at[index_C].set(_own(layout, found[name]), mode="drop") for name in names}

    out = {name: jnp.zeros(mask_RT.size, jnp.float32) for name in names}
    return jax.tree.map(lambda x: x.reshape(mask_RT.shape), lax.fori_loop(0, rounds, round_, out))


def _local_gradients(layout, hidden_RTD, table_vD, mask_RT, per_token, temperature):  # type: ignore[no-untyped-def]
    hidden_QD = hidden_RTD.reshape(mask_RT.size, -1)
    per_token = {name: x.reshape(-1) for name, x in per_token.items()}
    index_Q, rounds = _chunks(layout, mask_RT)

    def round_(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        d_hidden, d_table = carry
        index_C = lax.dynamic_slice_in_dim(index_Q, i * layout.chunk, layout.chunk)
        hidden_CD = _take(layout, hidden_QD, index_C)
        token = {name: _take(layout, x, index_C)[:, None] for name, x in per_token.items()}
        logits = _slice_logits(layout, hidden_CD, table_vD, temperature)
        is_target = _is_target(layout, token["target"][:, 0], table_vD.shape[0])
        logp = logits - token["lse"]
        d_logits = jnp.zeros_like(logits)
        if "g_logps" in token:
            d_logits += jnp.where(is_target, token["g_logps"], 0) - jnp.exp(logp) * token["g_logps"]
        if "g_entropy" in token:  # entropy = lse - sum p * logit
            d_logits -= jnp.exp(logp) * (logp + token["entropy"]) * token["g_entropy"]
        d_logits = (d_logits / temperature).astype(hidden_CD.dtype)
        d_table += jnp.einsum("Cv,CD->vD", d_logits, hidden_CD, preferred_element_type=jnp.float32)
        d_CD = jnp.einsum("Cv,vD->CD", d_logits, table_vD.astype(d_logits.dtype), preferred_element_type=jnp.float32)
        if layout.gather:
            d_CD = sharding.sum_scatter(d_CD, layout.gather, 0)
        if rest := tuple(axis for axis in layout.vocab if axis not in layout.gather):
            d_CD = lax.psum(d_CD, rest)
        return d_hidden.at[index_C].set(d_CD.astype(d_hidden.dtype), mode="drop"), d_table

    start = (jnp.zeros_like(hidden_QD), jnp.zeros(table_vD.shape, jnp.float32))
    d_hidden, d_table = lax.fori_loop(0, rounds, round_, start)
    # Devices that hold the same slice saw different tokens.
    seen = tuple(layout.rows or ()) + ((layout.time,) if layout.time else ())
    if others := tuple(axis for axis in seen if axis not in layout.gather):
        d_table = lax.psum(d_table, others)
    return d_hidden.reshape(hidden_RTD.shape), d_table
