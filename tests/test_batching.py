"""Batches of prepared examples, one sequence a row, and prefetching them."""

import math
import threading
import time

import numpy as np
import pytest
from common import load_tokenizer
from made import make

from jaxalign.data.batching import EvalBatches, ExampleSource, default_buckets, make_batch, prefetch
from jaxalign.data.sources import prepare, split_by_hash

WORDS = "cloud teach glass river light paper ocean sugar train garden lemon answer".split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("qwen3")


def row(i, words=3):
    generator = np.random.default_rng(i)

    def say(n):
        return " ".join(generator.choice(WORDS, n))

    return {"prompt": f"{say(4)} {i} ", "chosen": f"{say(words)} yes", "rejected": f"{say(words)} no"}


ROWS = [row(i, 1 + i % 9) for i in range(37)]


@pytest.fixture
def prepared(tokenizer, tmp_path):
    return prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)


def test_a_batch_holds_what_the_contract_says(prepared):
    batch = ExampleSource(prepared, batch_size=4, seed=0)(3)
    length = batch["tokens"].shape[1]
    dtypes = {name: (leaf.dtype.name, leaf.shape) for name, leaf in batch.items()}
    assert dtypes == {
        "tokens": ("int32", (8, length)),
        "mask": ("bool", (8, length)),
        "positions": ("int32", (8, length)),
        "lengths": ("int32", (8,)),
        "row_ids": ("int64", (8, 1)),
        "ends": ("int32", (8, 1)),
    }
    assert batch["row_ids"][::2].tolist() == batch["row_ids"][1::2].tolist()
    for i in range(8):
        example = int(batch["row_ids"][i, 0])
        ids, mask = prepared.sequence(example, i % 2)
        border = int(prepared.prompt_lengths[example])
        assert mask.tolist() == [place >= border for place in range(len(ids))]
        assert batch["lengths"][i] == len(ids) == batch["ends"][i, 0] + 1
        assert batch["tokens"][i, : len(ids)].tolist() == ids.tolist()
        assert (batch["tokens"][i, len(ids) :] == prepared.pad_id).all()
        assert np.flatnonzero(batch["mask"][i]).tolist() == list(range(border, len(ids)))
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(length), (8, 1)))


def test_every_epoch_has_each_pair_once_in_another_order(prepared):
    size, batch_size = len(prepared), 4
    source = ExampleSource(prepared, batch_size=batch_size, seed=5)
    stream = np.concatenate([source.examples_of(step) for step in range(source.steps(2.5))])
    assert source.steps(2.5) == math.ceil(2.5 * size / batch_size)
    epochs = [stream[:size], stream[size : 2 * size]]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(set(stream[2 * size :])) == len(stream[2 * size :])
    other = ExampleSource(prepared, batch_size=batch_size, seed=6)
    assert other.examples_of(0).tolist() != source.examples_of(0).tolist()
    plain = ExampleSource(prepared, batch_size=batch_size, seed=5, shuffle=False)
    assert plain.examples_of(9).tolist() == [36, 0, 1, 2]


@pytest.mark.parametrize("part", ["all", "subset"])
def test_resuming_at_any_step_gives_the_same_batches(tokenizer, tmp_path, prepared, part):
    data = prepared if part == "all" else split_by_hash(prepared, 0.4)[0]
    run = ExampleSource(data, batch_size=4, seed=1)
    steps = run.steps(2.5)
    whole = list(prefetch(run, 0, steps))
    assert len(whole) == steps
    epoch_edge = len(data) // 4
    for start in (1, epoch_edge, epoch_edge + 1, steps - 1, steps):
        again = prepare(ROWS, tokenizer=tokenizer, max_length=64, cache_dir=tmp_path)
        again = again if part == "all" else split_by_hash(again, 0.4)[0]
        rest = list(prefetch(ExampleSource(again, batch_size=4, seed=1), start, steps, depth=3))
        for left, right in zip(whole[start:], rest, strict=True):
            assert all(np.array_equal(left[name], right[name]) for name in left)


def test_two_processes_rows_are_the_whole(prepared):
    whole = ExampleSource(prepared, batch_size=4, seed=2)
    halves = [ExampleSource(prepared, batch_size=4, seed=2, rows=lambda n, i=i: np.arange(n)[i::2]) for i in range(2)]
    odd = ExampleSource(prepared, batch_size=4, seed=2, rows=lambda n: [1, 6])
    for step in range(12):
        batch, parts, some = whole(step), [half(step) for half in halves], odd(step)
        for name, leaf in batch.items():
            np.testing.assert_array_equal(np.stack([part[name] for part in parts], axis=1).reshape(leaf.shape), leaf)
            np.testing.assert_array_equal(some[name], leaf[[1, 6]])


def test_row_lengths_come_from_few_buckets(prepared):
    source = ExampleSource(prepared, batch_size=2, seed=0, buckets=(16, 32, 64))
    lengths = {source(step)["tokens"].shape[1] for step in range(40)}
    assert lengths <= {16, 32, 64} and len(lengths) > 1
    for step in range(40):
        batch = source(step)
        needed = batch["lengths"].max()
        assert batch["tokens"].shape[1] == min(bucket for bucket in (16, 32, 64) if bucket >= needed)
    with pytest.raises(ValueError, match="end before the longest row"):
        ExampleSource(prepared, batch_size=2, seed=0, buckets=(8,))


@pytest.mark.parametrize("max_length", [2, 16, 100, 128, 200, 512, 1000, 1024, 2048, 3000, 8192, 32768])
def test_default_buckets_are_few_and_hold_the_longest(max_length):
    buckets = default_buckets(max_length)
    assert list(buckets) == sorted(set(buckets)) and len(buckets) <= 18
    assert max_length <= buckets[-1] < max_length + 128
    assert all(bucket % (128 if max_length >= 1024 else 16) == 0 for bucket in buckets)


def test_evaluation_sees_each_pair_once_and_fills_up(prepared):
    batches = EvalBatches(prepared, batch_size=4, buckets=(16, 32, 64))
    assert len(batches) == math.ceil(len(prepared) / 4)
    seen = np.concatenate([batch["row_ids"][::2, 0] for batch in batches])
    assert sorted(seen[seen >= 0]) == list(range(len(prepared)))
    assert all(batch["tokens"].shape[0] == 8 for batch in batches)
    last = batches[len(batches) - 1]
    filler = last["row_ids"][:, 0] == -1
    assert (last["ends"][filler] == -1).all()
    assert filler.sum() == 2 * (-len(prepared) % 4) > 0
    assert not last["mask"][filler].any() and not last["lengths"][filler].any()
    assert (last["tokens"][filler] == prepared.pad_id).all()
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    few = EvalBatches(prepared, batch_size=4, limit=6)
    assert sorted(np.concatenate([batch["row_ids"][::2, 0] for batch in few])) == [-1, -1, 0, 1, 2, 3, 4, 5]
    half = EvalBatches(prepared, batch_size=4, buckets=(16, 32, 64), rows=lambda n: [0, 1, 6])
    np.testing.assert_array_equal(half[2]["tokens"], batches[2]["tokens"][[0, 1, 6]])


def test_batches_refuse_what_cannot_be(prepared):
    with pytest.raises(ValueError, match="batch_size=0"):
        ExampleSource(prepared, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="no examples"):
        ExampleSource(prepared.select(np.arange(0)), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="rows reach from 0 to 8"):
        ExampleSource(prepared, batch_size=4, seed=0, rows=lambda n: [0, 8])(0)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_row_holds_one_sequence_of_its_example(width):
    scores, weight = np.arange(48, dtype=np.float32).reshape(24, 2), np.arange(24, dtype=np.float32)
    made = make(width, scores=scores, weight=weight)
    batch = make_batch(made, np.array([5, -1, 7]), 32)
    assert batch["row_ids"][:, 0].tolist() == [5] * width + [-1] * width + [7] * width
    for at, (example,) in enumerate(batch["row_ids"]):
        if example < 0:
            assert batch["ends"][at] == -1 and batch["lengths"][at] == 0 and not batch["mask"][at].any()
            assert not batch["weight"][at].any() and not batch["scores"][at].any()
            continue
        ids, mask = made.sequence(int(example), at % width)
        assert batch["tokens"][at, : len(ids)].tolist() == ids.tolist() and batch["ends"][at, 0] == len(ids) - 1
        assert np.flatnonzero(batch["mask"][at]).tolist() == np.flatnonzero(mask).tolist()
        assert batch["weight"][at].tolist() == [example] and batch["scores"][at].tolist() == [scores[example].tolist()]
    assert batch["scores"].shape == (3 * width, 1, 2) and batch["scores"].dtype == np.float32


# ---- prefetch


def test_prefetch_runs_ahead_in_another_thread():
    asked, main = [], threading.current_thread()

    def source(step, view):
        asked.append((step, view))
        assert threading.current_thread() is not main
        return {"step": np.asarray(step)}

    batches = prefetch(source, 3, 100, view="params", depth=2)
    assert next(batches)["step"] == 3
    deadline = time.time() + 10
    while len(asked) < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert sorted(asked) == [(3, "params"), (4, "params"), (5, "params")]
    batches.close()


def test_prefetch_raises_where_the_bad_batch_is_taken():
    def source(step, view):
        if step == 2:
            raise RuntimeError("batch 2 cannot be read")
        return {"step": np.asarray(step)}

    batches = prefetch(source, 0, 5)
    assert [int(next(batches)["step"]) for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="batch 2 cannot be read"):
        next(batches)


def test_closing_prefetch_ends_its_threads():
    before = threading.active_count()
    batches = prefetch(lambda step, view: {"step": np.asarray(step)}, 0, 1000)
    next(batches)
    batches.close()
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert list(prefetch(lambda step, view: {}, 4, 4)) == []
