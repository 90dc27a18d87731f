"""Metrics: sums and weights are merged exactly, files survive a crash bit for bit, statistics equal hand-made ones."""

import io
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import metrics as M
from jaxalign.metrics import Max, Mean, MetricsWriter, Min, Progress


def test_merged_metrics_equal_those_of_all_values_at_once():
    values, weights = np.array([1.0, 5.0, -2.0, 7.0]), np.array([1.0, 2.0, 0.0, 3.0])

    def measure(s):
        return {"m": Mean((values[s] * weights[s]).sum(), weights[s].sum()), "lo": Min(values[s].min()),
                "hi": Max(values[s].max())}  # fmt: skip

    merged = M.reduce(M.merge(measure(slice(0, 1)), measure(slice(1, 4))))
    assert merged == M.reduce(measure(slice(0, 4)))
    assert merged == {"m": np.average(values, weights=weights), "lo": -2.0, "hi": 7.0}


def test_merge_keeps_names_of_one_side_and_refuses_other_kinds():
    assert M.reduce(M.merge({"a": Mean(1.0, 2.0)}, {"b": Min(3.0)})) == {"a": 0.5, "b": 3.0}
    assert M.merge({}, {"b": Min(3.0)}) == {"b": Min(3.0)}
    with pytest.raises(ValueError, match="'a' is a Mean on one side and a Max"):
        M.merge({"a": Mean(1.0, 1.0)}, {"a": Max(1.0)})
    with pytest.raises(TypeError, match="'a' is a float"):
        M.reduce({"a": 1.0})


def test_metrics_are_pytrees_that_scan_and_jit_carry():
    def step(carry, x):
        return M.merge(carry, {"x": Mean(x, 1.0), "min": Min(x), "max": Max(x)}), None

    start = {"x": Mean(0.0, 0.0), "min": Min(jnp.inf), "max": Max(-jnp.inf)}
    total, _ = jax.jit(lambda xs: jax.lax.scan(step, start, xs))(jnp.array([1.0, 2.0, 6.0]))
    assert M.reduce(total) == {"x": 3.0, "min": 1.0, "max": 6.0}


def test_a_mean_of_nothing_is_left_out():
    assert M.reduce({"x": Mean(jnp.float32(0), jnp.float32(0)), "y": Mean(1.0, 2.0)}) == {"y": 0.5}


# Files


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_on_disk_at_once_and_floats_keep_their_bits(tmp_path):
    value = float(np.float32(1) / np.float32(3))
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value, "tokens": 7, "np": np.float32(0.1)})
        assert (tmp_path / "metrics.jsonl").read_text() == (
            f'{{"step": 1, "loss": {value!r}, "tokens": 7, "np": {float(np.float32(0.1))!r}}}\n'
        )
    rows = M.read_metrics(tmp_path)
    assert rows[0]["loss"] == value and np.float32(rows[0]["np"]) == np.float32(0.1)


def test_numbers_that_json_lacks_are_written_as_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda _: pytest.fail("not JSON")) == {
        "step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}  # fmt: skip
    row = M.read_metrics(tmp_path)[0]
    assert math.isnan(row["a"]) and (row["b"], row["c"]) == (math.inf, -math.inf)


def write_run(folder, steps, start_step=None):
    with MetricsWriter(folder, start_step=start_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / (step + 1)})
            writer.completions(step, [{"prompt": "p", "text": "ä\n"}] * 2)


@pytest.mark.parametrize("cut", [0, 1, 9, 10**9])
def test_a_resumed_run_leaves_the_files_of_one_never_interrupted(tmp_path, cut):
    write_run(tmp_path / "whole", range(8))
    write_run(tmp_path / "killed", range(6))
    for name in M.STEP_FILES:  # the kill came while a line was written
        path = tmp_path / "killed" / name
        path.write_bytes(path.read_bytes() + b'{"step": 6, "loss": 0.14}'[:cut])
    write_run(tmp_path / "killed", range(4, 8), start_step=3)
    for name in M.STEP_FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_line_is_whole_only_with_its_newline(tmp_path):
    content = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}'  # 0.25 may have been 0.2512
    assert M.whole_lines(content, 5, "metrics.jsonl") == b'{"step": 1, "loss": 0.5}\n'


def test_a_new_run_begins_with_empty_files_and_step_0_is_kept_when_resumed_from(tmp_path):
    write_run(tmp_path, range(3))
    write_run(tmp_path, [], start_step=0)
    assert [row["step"] for row in M.read_metrics(tmp_path)] == [0]
    write_run(tmp_path, [])
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_file_that_no_run_wrote_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, start_step=1)
    assert "hello" in path.read_text()


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.completions(1, [{"text": "x"}])
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_points(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, tensorboard=True, start_step=4) as writer:
        writer.write(5, {"rewards/margins": 0.5})
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert b"rewards/margins" in file.read_bytes()


# The screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_each_update_is_a_plain_line_with_the_time_left():
    stream = io.StringIO()
    with Progress(30, columns=("loss", "time/tokens_per_second"), stream=stream) as progress:
        progress.update(1, {"loss": 0.69314, "time/tokens_per_second": 1234.6, "other": 1.0})
        progress.update(2, {"loss": 2e-7})
        progress.message("saved")
    first, second, third = stream.getvalue().splitlines()
    assert first == "step 1/30  loss 0.6931  1,235 tokens/s"
    assert second.startswith("step 2/30  loss 2.00e-07  ETA 0:0")
    assert third == "saved"


def test_on_a_terminal_there_is_a_bar():
    stream = Terminal()
    with Progress(30, start=3, stream=stream) as progress:
        progress.update(4, {"loss": 0.5})
        progress.message("saved [x]")
    assert "4/30" in stream.getvalue() and "loss 0.5000" in stream.getvalue() and "saved [x]" in stream.getvalue()


def test_a_silent_progress_writes_nothing():
    stream = Terminal()
    with Progress(3, stream=stream, active=False) as progress:
        progress.update(1, {"loss": 1.0})
        progress.message("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_durations_are_written_as_clocks(seconds, text):
    assert M._duration(seconds) == text


# Statistics


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I (Wilson's score method): 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_intervals(successes, n, low, high):
    assert M.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_refuses_nonsense():
    low, high = M.wilson(30, 64)
    assert M.wilson(34, 64) == pytest.approx((1 - high, 1 - low))
    for successes, n in [(3, 2), (-1, 2), (0, 0)]:
        with pytest.raises(ValueError, match="wilson"):
            M.wilson(successes, n)


def test_mean_se_equals_the_formula():
    mean, error = M.mean_se([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0 and error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert math.isnan(M.mean_se([1.0])[1])
    with pytest.raises(ValueError, match="no values"):
        M.mean_se([])


# Curves


def test_plot_draws_what_there_is(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 60):
            norm = math.nan if step == 3 else 1
            writer.write(step, {"loss": 1 / step, "rewards/margins": step / 60, "grad_norm": norm})
            if step % 20 == 0:
                writer.write(step, {"eval_loss": 1.5 / step, "eval_rewards/accuracies": 0.6})
    path = M.plot(tmp_path)
    assert path == tmp_path / "curves.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_plot_without_any_curve_says_so(tmp_path):
    write = MetricsWriter(tmp_path)
    write.write(1, {"x": 1.0})
    write.close()
    with pytest.raises(ValueError, match="no curve"):
        M.plot(tmp_path)


# FLOPs


def model(**changes):
    fields = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 32, "num_labels": 0,
              "sliding_windows": (None, None)}  # fmt: skip
    return SimpleNamespace(**(fields | changes))


def count_flops(cfg, lengths, scored):
    """The same by walking over every product: the slow obvious version."""
    total = 0
    heads, d = cfg.num_attention_heads * cfg.head_dim, cfg.hidden_size
    for length in lengths:
        for window in cfg.sliding_windows:
            for query in range(length):
                total += 2 * d * heads  # q
                total += 2 * 2 * d * cfg.num_key_value_heads * cfg.head_dim  # k, v
                total += 2 * heads * d  # o
                total += 3 * 2 * d * cfg.intermediate_size
                seen = query + 1 if window is None else min(query + 1, window)
                total += 2 * 2 * heads * seen  # scores and their sum of values
    return total + 2 * d * (cfg.num_labels or cfg.vocab_size) * scored


@pytest.mark.parametrize("changes", [{}, {"sliding_windows": (3, None)}, {"head_dim": 6}, {"num_labels": 1}])
def test_forward_flops_equal_a_walk_over_every_product(changes):
    cfg = model(**changes)
    assert M.forward_flops(cfg, np.array([0, 1, 2, 3, 4, 0, 1]), 4) == count_flops(cfg, [5, 0, 2], 4)


def test_forward_flops_are_about_two_per_weight_and_token():
    llama8b = model(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                    num_key_value_heads=8, head_dim=128, vocab_size=128256, sliding_windows=(None,) * 32)  # fmt: skip
    weights = 8.03e9 - 128256 * 4096  # without the input embedding, which is looked up
    assert M.forward_flops(llama8b, np.zeros(1), 1) == pytest.approx(2 * weights, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12),
     ("TPU7x", 1153.5e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("cpu", None), ("TPU v4 lite", None),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
)  # fmt: skip
def test_peak_flops_by_the_kind_of_device(kind, peak):
    assert M.peak_flops(kind) == peak


def test_mfu_is_a_share_of_all_devices_and_none_where_the_peak_is_unknown():
    assert M.mfu(275e12, 2.0, device_kind="TPU v4", n_devices=2) == 0.25
    assert M.mfu(1e12, 1.0, device_kind="cpu", n_devices=1) is None
