"""Packed rows: which examples stand in which, and that every number is that of unpacked rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import model
from made import make

from jaxalign import logprobs, models, reference, sharding
from jaxalign.data.batching import EvalBatches, ExampleSource
from jaxalign.data.packing import FILLER, Packer, best_fit

PACKED = ("on", "shared")


def placed_best(sizes, capacity, most):
    """Best fit decreasing as it is told."""
    bins = []
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        spaces = [capacity - sum(sizes[i] for i in b) if len(b) < most else -1 for b in bins]
        fitting = [space for space in spaces if space >= sizes[place] and space > 0]
        if fitting:
            bins[spaces.index(min(fitting))].append(place)
        else:
            bins.append([place])
    return bins


@pytest.mark.parametrize("most", [2, 100])
def test_best_fit_fills_bins_as_the_obvious_search_does(most):
    random = np.random.default_rng(0)
    for capacity in (7, 40, 1000):
        sizes = random.integers(1, capacity + 1, 120)
        bins = best_fit(sizes, capacity, most)
        assert sorted(place for b in bins for place in b) == list(range(120))
        assert all(sizes[b].sum() <= capacity and len(b) <= most for b in bins)
        want = placed_best(sizes.tolist(), capacity, most)
        assert len(bins) == len(want)
        assert sorted(sizes[b].sum() for b in bins) == sorted(sizes[b].sum() for b in want)
    assert best_fit(np.array([5, 5, 5, 5]), 10, 9) == [[0, 1], [2, 3]]


def sequences(prepared, batch):
    """(example, sequence, row, slot) of all that a packed batch holds."""
    for row, slot in np.argwhere(batch["row_ids"] != FILLER):
        yield int(batch["row_ids"][row, slot]), int(slot % prepared.width), row, slot


@pytest.mark.parametrize("packing_", PACKED)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_packed_batch_holds_what_the_contract_says(width, packing_):
    scores, label = np.arange(48, dtype=np.float32).reshape(24, 2), np.arange(24, dtype=np.float32)
    prepared = make(width, scores=scores, label=label)
    source = ExampleSource(prepared, batch_size=10, seed=0, packing=packing_, row_multiple=2)
    plain = ExampleSource(prepared, batch_size=10, seed=0)
    shared = packing_ == "shared" and width > 1
    for step in (3, 0):
        batch = source(step)
        n_rows, n_slots = batch["ends"].shape
        assert n_rows % 2 == 0 and n_slots % width == 0 and batch["tokens"].shape == (n_rows, source.packer.length)
        assert {name: leaf.dtype.name for name, leaf in batch.items()} == {
            "tokens": "int32", "mask": "bool", "positions": "int32", "lengths": "int32", "row_ids": "int64",
            "ends": "int32", "scores": "float32", "label": "float32", "segment_ids": "int32",
            **({"prefix_ids": "int32"} if shared else {}),
        }  # fmt: skip
        seen = [(example, sequence) for example, sequence, _, _ in sequences(prepared, batch)]
        unpacked = plain(step)
        assert sorted(seen) == sorted((int(example), row % width) for row, (example,) in enumerate(unpacked["row_ids"]))
        used = np.zeros(batch["tokens"].shape, int)
        for example, sequence, row, slot in sequences(prepared, batch):
            ids, mask = prepared.sequence(example, sequence)
            once = max(int(prepared.prompt_lengths[example]) - 1, 0) if shared else 0
            here = np.flatnonzero(batch["segment_ids"][row] == slot + 1)
            assert here.tolist() == list(range(here[0], here[0] + len(ids) - once))
            assert batch["ends"][row, slot] == here[-1]
            used[row, here] += 1
            assert batch["tokens"][row, here].tolist() == ids[once:].tolist()
            assert batch["mask"][row, here].tolist() == mask[once:].tolist()
            assert batch["positions"][row, here].tolist() == list(range(once, len(ids)))
            assert batch["scores"][row, slot].tolist() == scores[example].tolist()
            assert batch["label"][row, slot] == label[example]
            if once:
                prompt = n_slots + 1 + slot // width
                assert (batch["prefix_ids"][row, here] == prompt).all()
                before = np.flatnonzero(batch["segment_ids"][row] == prompt)
                assert before[-1] < here[0]
                assert batch["tokens"][row, before].tolist() == ids[:once].tolist()
                assert batch["positions"][row, before].tolist() == list(range(once))
                used[row, before] += sequence == 0
            elif shared:
                assert not batch["prefix_ids"][row, here].any()
        assert used.max() == 1 and (used.sum(axis=1) == batch["lengths"]).all()
        empty = used == 0
        assert not batch["mask"][empty].any() and not batch["segment_ids"][empty].any()
        assert (batch["tokens"][empty] == prepared.pad_id).all()
        filler = batch["row_ids"] == FILLER
        assert (batch["ends"][filler] == -1).all() and not batch["scores"][filler].any()
        # An example's sequences are neighbours: reshaped, a line is an example.
        by_example = batch["row_ids"].reshape(-1, width)
        assert (by_example == by_example[:, :1]).all()


@pytest.mark.parametrize("packing_", PACKED)
def test_a_step_is_the_same_whatever_was_asked_before_and_on_any_number_of_processes(packing_):
    prepared = make(2, n=50)
    options = dict(batch_size=8, seed=3, packing=packing_, row_multiple=4)
    whole = ExampleSource(prepared, **options)
    batches = [whole(step) for step in range(12)]
    again = ExampleSource(prepared, **options)
    thirds = [
        ExampleSource(prepared, **options, rows=lambda n, i=i: np.arange(n // 2) + i * (n // 2)) for i in range(2)
    ]
    for step in (11, 4, 7):
        for name, leaf in batches[step].items():
            np.testing.assert_array_equal(again(step)[name], leaf)
            np.testing.assert_array_equal(np.concatenate([part(step)[name] for part in thirds]), leaf)


def test_the_number_of_rows_has_few_values():
    packer = Packer(make(2), multiple=8)
    found = sorted({packer.rows_for(bins) for bins in range(1, 2049)})
    assert all(packer.rows_for(bins) >= bins and packer.rows_for(bins) % 8 == 0 for bins in range(1, 2049))
    assert all(packer.rows_for(bins) < max(1.125 * bins + 8, 16) for bins in range(1, 2049))
    for power in range(6, 11):
        assert len([rows for rows in found if 2**power < rows <= 2 ** (power + 1)]) <= 8


def test_rows_are_as_long_as_the_longest_example_or_max_length_asks():
    prepared = make(2, max_length=300, responses=(1, 20))
    assert Packer(prepared).length == 320 and Packer(prepared, length=100).length == 100
    long = make(2, max_length=60, prompts=(20, 21), responses=(39, 40))
    assert Packer(long).length == 128 and Packer(long, shared=True).length == 112
    assert Packer(long).slots == 1
    with pytest.raises(ValueError, match="packed_length is 100.*longest example takes 118 tokens.*at least 118"):
        Packer(long, length=100)


def test_weights_come_from_a_function_of_the_examples_and_the_step():
    prepared = make(2)

    def weigh(examples, step):
        assert len(examples) == 6
        return examples * 10.0 + step

    plain, packed = (ExampleSource(prepared, batch_size=6, seed=0, packing=p, weigh=weigh)(2) for p in ("off", "on"))
    for batch in (plain, packed):
        real = batch["row_ids"] != FILLER
        assert batch["weight"].dtype == np.float32 and not batch["weight"][~real].any()
        np.testing.assert_array_equal(batch["weight"][real], batch["row_ids"][real] * 10 + 2)


@pytest.mark.parametrize("packing_", PACKED)
@pytest.mark.parametrize("width", [1, 2])
def test_evaluation_sees_each_example_once_in_rows_of_one_shape(width, packing_):
    prepared = make(width, n=53)
    options = dict(batch_size=8, limit=47, packing=packing_, row_multiple=2)
    batches = EvalBatches(prepared, **options)
    assert {batch["tokens"].shape for batch in batches} == {(batches.n_rows, batches.packer.length)}
    assert batches.n_rows % 2 == 0 and 1 < len(batches) <= 8
    seen = np.concatenate([batch["row_ids"].reshape(-1, width)[:, 0] for batch in batches])
    assert sorted(seen[seen != FILLER]) == list(range(47))
    part = EvalBatches(prepared, **options, rows=lambda n: np.array([1]))
    np.testing.assert_array_equal(part[1]["tokens"], batches[1]["tokens"][[1]])


def test_what_packing_refuses():
    with pytest.raises(ValueError, match="data.packing is 'yes', expected one of off, on, shared"):
        ExampleSource(make(2), batch_size=2, seed=0, packing="yes")
    for width, packing_ in ((2, "on"), (1, "off")):
        with pytest.raises(ValueError, match=rf"data.prefixes is \(8,\).*{width} row"):
            ExampleSource(make(width), batch_size=2, seed=0, packing=packing_, prefixes=(8,))
    cfg, params = model("llama")
    batch = ExampleSource(make(2), batch_size=2, seed=0, packing="shared")(0)
    windowed = cfg.__class__(**{**vars(cfg), "sliding_windows": (8,) * cfg.num_hidden_layers})
    with pytest.raises(ValueError, match="data.packing is 'shared'.*sliding windows"):
        logprobs.score(windowed, params, batch)


# ---- the numbers


def loss_of(cfg, width):
    """Something in which every sequence's log-prob has a weight of its own."""

    def loss(params, batch):
        segments, n = batch.get("segment_ids"), batch["ends"].shape[1]
        logps = logprobs.score(cfg, params, batch)["logps"]
        found = logprobs.per_sequence(logps, batch["mask"], segments, num_segments=n)
        weight = batch["label"] * (1 + (jnp.arange(n) if segments is not None else _sides(batch, width)) % width)
        # Through the other way too: a sequence's value at its tokens.
        squares = logprobs.per_token(weight, segments) * jnp.where(batch["mask"], jnp.square(logps), 0)
        return (found * weight).sum() + squares.sum() / 10

    return loss


def _sides(batch, width):
    return jnp.arange(batch["ends"].shape[0])[:, None] % width


@functools.cache
def unpacked(family, width):
    cfg, params = model(family)
    prepared = made(width)
    batch = device(ExampleSource(prepared, batch_size=12, seed=0)(1))
    return jax.device_get(jax.jit(jax.value_and_grad(loss_of(cfg, width)))(params, batch))


def made(width):
    label = 1 + np.arange(24, dtype=np.float32) / 24
    return make(width, label=label, max_length=32)


def device(batch):
    return {name: x for name, x in batch.items() if name != "row_ids"}


def check(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(), rtol=0)


TENSOR, SEQUENCE = {"fsdp": 4, "tensor": 2}, {"fsdp": 4, "sequence": 2}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("packing_", "family", "width", "layout"),
    [
        ("on", "llama", 2, None),
        ("shared", "llama", 2, None),
        ("shared", "llama", 2, TENSOR),
        ("shared", "llama", 2, SEQUENCE),
        ("on", "llama", 1, None),
        ("shared", "qwen3", 3, None),
        pytest.param("on", "qwen3", 3, None, marks=SLOW),
        pytest.param("shared", "qwen2", 2, None, marks=SLOW),
        pytest.param("on", "llama", 2, TENSOR, marks=SLOW),
        pytest.param("on", "llama", 2, SEQUENCE, marks=SLOW),
        pytest.param("shared", "llama", 2, {"data": 2, "fsdp": 2, "tensor": 2}, marks=SLOW),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_unpacked_rows(packing_, family, width, layout):
    cfg, params = model(family)
    source = ExampleSource(made(width), batch_size=12, seed=0, packing=packing_, row_multiple=8 if layout else 1)
    batch = source(1)
    assert batch["tokens"].size < 12 * width * 32 or layout
    mesh = sharding.make_mesh(**layout) if layout else None
    with sharding.use_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, sharding.param_shardings(mesh, models.declare(cfg)))
            batch = reference.place(mesh, batch)
        got = jax.device_get(jax.jit(jax.value_and_grad(loss_of(cfg, width)))(params, device(batch)))
    check(got, unpacked(family, width))


@pytest.mark.parametrize("packing_", PACKED)
def test_the_hidden_state_at_a_sequences_end_is_that_of_unpacked_rows(packing_):
    cfg, params = model("qwen3")
    prepared = made(2)

    @jax.jit
    def last(batch):
        hidden = logprobs.hidden(cfg, params, batch)
        return jnp.take_along_axis(hidden, jnp.maximum(batch["ends"], 0)[..., None], axis=1)

    packed, plain = (ExampleSource(prepared, batch_size=8, seed=0, packing=p)(0) for p in (packing_, "off"))
    want = dict(zip(plain["row_ids"][::2, 0].tolist(), last(device(plain)).reshape(8, 2, -1), strict=True))
    found = last(device(packed))
    for example, sequence, row, slot in sequences(prepared, packed):
        np.testing.assert_allclose(found[row, slot], want[example][sequence], atol=1e-5)


# ---- the reference's log-probs


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cached_log_probs_stand_where_their_tokens_do_packed_or_not(width, tmp_path):
    prepared = made(width)
    mesh = sharding.make_mesh(data=2, devices=jax.devices()[:2])

    def score(weights, batch):  # something that depends on the token and its position alone
        return jnp.where(batch["mask"], batch["tokens"] + batch["positions"] / 64, 0).astype(jnp.float32)

    caches = {}
    with sharding.use_mesh(mesh):
        for packing_ in ("off", *PACKED):
            caches[packing_] = reference.cached(
                tmp_path / f"{packing_}.npz", prepared, score, lambda: None, mesh=mesh, batch_size=4, packing=packing_
            )
    for i in range(24):
        for j in range(width):
            ids, mask = prepared.sequence(i, j)
            want = np.where(mask, ids + np.arange(len(ids)) / 64, 0)
            for cache in caches.values():
                np.testing.assert_allclose(cache.logps[cache.span(i, j)], want)
    few = np.array([1, 2])
    for packing_ in ("off", *PACKED):
        batch = ExampleSource(prepared, batch_size=8, seed=0, packing=packing_)(1)
        np.testing.assert_allclose(caches["off"](batch), score(None, batch))
        part = ExampleSource(prepared, batch_size=8, seed=0, packing=packing_, rows=lambda n: few)(1)
        np.testing.assert_allclose(caches["off"](part, few), score(None, part))


def test_a_cache_belongs_to_one_kind_and_order(tmp_path):
    from etils import epath

    cfg, _ = model("llama")
    prepared = made(2)
    others = [prepared, make(2, kind="labelled", max_length=32), prepared.select(np.arange(24)[::-1])]
    files = [reference.cache_file(epath.Path(tmp_path), model="m", prepared=p, cfg=cfg) for p in others]
    assert len(set(files)) == 3


@pytest.mark.parametrize("packing_", ["off", *PACKED])
def test_scoring_in_parts_gives_the_log_probs_of_the_whole(packing_):
    cfg, params = model("llama")
    batch = device(ExampleSource(made(3), batch_size=12, seed=0, packing=packing_, row_multiple=2)(0))
    whole = jax.jit(reference.make_score(cfg, width=3))(params, batch)
    parts = jax.jit(reference.make_score(cfg, width=3, micro_batches=2))(params, batch)
    np.testing.assert_allclose(parts, whole, atol=2e-5)
