"""What a run measures: sums that travel, lines on disk and on the screen, curves, intervals, and model FLOP/s.

Inside jit a metric is a sum and its weight (or an extreme), never a mean: means are taken once, on the host, by
`reduce`. Names are TRL's; evaluation's begin with `eval_`; what may differ between equal runs stands under `time/`.
"""

import concurrent.futures
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxalign import paths

if TYPE_CHECKING:
    from jaxalign.models.config import ModelConfig


Number: TypeAlias = jax.Array | np.ndarray | np.floating | float
"""A scalar on the device or on the host."""


class Mean(NamedTuple):
    """A weighted mean on its way: the sum of weight * value, and the sum of the weights."""

    sum: Number
    weight: Number


class Min(NamedTuple):
    """A minimum on its way; inf when nothing was seen."""

    value: Number


class Max(NamedTuple):
    """A maximum on its way; -inf when nothing was seen."""

    value: Number


Metrics: TypeAlias = dict[str, Mean | Min | Max]


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Both together, as if measured at once; a name that only one side has is kept. Works inside jit.

    Raises:
      ValueError: a name is a mean on one side and an extreme on the other.
    """
    return a | {name: _merge(name, a[name], metric) if name in a else metric for name, metric in b.items()}


def _merge(name: str, a: Mean | Min | Max, b: Mean | Min | Max) -> Mean | Min | Max:
    if isinstance(a, Mean) and isinstance(b, Mean):
        return Mean(a.sum + b.sum, a.weight + b.weight)
    if isinstance(a, Min) and isinstance(b, Min):
        return Min(jnp.minimum(a.value, b.value))
    if isinstance(a, Max) and isinstance(b, Max):
        return Max(jnp.maximum(a.value, b.value))
    raise ValueError(f"metric {name!r} is a {type(a).__name__} on one side and a {type(b).__name__} on the other")


def reduce(metrics: Metrics) -> dict[str, float]:
    """Python floats, fetched from the devices in one go; a mean of no weight (a label that no row has) is left out."""
    fetched = jax.device_get(metrics)
    there = {name: x for name, x in fetched.items() if not isinstance(x, Mean) or float(x.weight)}
    return {name: _reduce(name, metric) for name, metric in there.items()}


def _reduce(name: str, metric: Mean | Min | Max) -> float:
    if isinstance(metric, Mean):
        return float(metric.sum) / float(metric.weight)
    if isinstance(metric, Min | Max):
        return float(metric.value)
    raise TypeError(f"metric {name!r} is a {type(metric).__name__}, expected Mean, Min or Max")


METRICS_FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
STEP_FILES = (METRICS_FILE, COMPLETIONS_FILE)
"""Files of a run whose lines each belong to a step: cut back to the restored step when a run resumes."""

UPLOAD_SECONDS = 30.0
"""How old a line may become before it is sent to a bucket."""


class _LineFile:
    """A file that grows by lines. On disk a line is there when `append` returns.

    What lies in a bucket can't be appended to: its lines are kept here, and `upload` writes the object anew.
    """

    def __init__(self, path: epath.Path, content: bytes):
        """Begin with `content`, in place of what is there."""
        self.path, self.size = path, len(content)
        paths.replace(path, content)
        self._remote = bytearray(content) if paths.is_remote(path) else None
        self._uploaded = self.size
        self._local = None if self._remote is not None else open(path, "ab")

    def append(self, line: bytes) -> None:
        # One write of the whole line: a kill leaves at most a last line without its end, which `whole_lines` removes.
        if self._local is not None:
            self._local.write(line)
            self._local.flush()
        if self._remote is not None:
            self._remote += line
        self.size += len(line)

    def upload(self) -> None:
        if self._remote is not None and self.size != self._uploaded:
            content = bytes(self._remote)
            paths.replace(self.path, content)
            self._uploaded = len(content)

    def close(self) -> None:
        if self._local is not None:
            self._local.close()


class MetricsWriter:
    """Writes a run's metrics.jsonl and completions.jsonl, one line at a time, each on disk when the call returns.

    In a bucket the lines are there after `flush`, or when the first of them is about `UPLOAD_SECONDS` old.

    A metrics line is `{"step": n, name: value, ...}`. A float is written with as many digits as give the same bits when
    read again; one that JSON has no number for is "NaN", "Infinity" or "-Infinity" (protobuf's convention;
    `read_metrics` turns them back).
    """

    def __init__(
        self,
        folder: paths.PathLike,
        *,
        start_step: int | None = None,
        sizes: Mapping[str, int] | None = None,
        tensorboard: bool = False,
        active: bool = True,
    ) -> None:
        """Open the files.

        Args:
          folder: the run's folder; made if needed.
          start_step: the step that the run resumes from: later lines, and one cut off by a crash, are removed. None: a
            new run, whose files begin empty.
          sizes: what `sizes` gave at that step: what was written after is removed.
          tensorboard: write TensorBoard's event files to `<folder>/tensorboard` too.
          active: False makes every call do nothing (all processes but the first).

        Raises:
          ValueError: tensorboard is wanted and tensorboardX is not installed; a file is not what a run wrote.
        """
        self._folder = paths.at(folder)
        self._files: dict[str, _LineFile] = {}
        self._uploader: concurrent.futures.ThreadPoolExecutor | None = None
        self._upload: concurrent.futures.Future[None] | None = None
        self._uploaded_at = time.monotonic()
        self._tensorboard: Any = None
        if not active:
            return
        paths.make_folder(self._folder)
        kept = {name: b"" for name in STEP_FILES}
        for name in STEP_FILES:
            path = self._folder / name
            if start_step is not None and path.exists():
                kept[name] = whole_lines(path.read_bytes()[: (sizes or {}).get(name)], start_step, path)
        self._files = {name: _LineFile(self._folder / name, content) for name, content in kept.items()}
        if paths.is_remote(self._folder):
            self._uploader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="metrics")
        if tensorboard:
            self._tensorboard = _event_writer(self._folder / "tensorboard", start_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics, and TensorBoard's points."""
        if not self._files:
            return
        self._append(METRICS_FILE, {"step": step, **{name: _number(value) for name, value in values.items()}})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._uploader is not None and time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self._wait()
            self._upload = self._uploader.submit(self._upload_all)
            self._uploaded_at = time.monotonic()

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line for each completion: `{"step": n, ...}` with the row's own entries."""
        if not self._files:
            return
        for row in rows:
            self._append(COMPLETIONS_FILE, {"step": step, **row})

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, with all lines so far; {} on a process that writes nothing."""
        return {name: file.size for name, file in self._files.items()}

    def flush(self) -> None:
        """Returns when all lines so far are where others can read them."""
        self._wait()
        self._upload_all()
        self._uploaded_at = time.monotonic()

    def _upload_all(self) -> None:
        for file in self._files.values():
            file.upload()

    def _wait(self) -> None:
        """Returns when the upload under way is done; raises what it raised."""
        if self._upload is not None:
            upload, self._upload = self._upload, None
            upload.result()

    def close(self) -> None:
        """Close the files; later calls do nothing."""
        self.flush()
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._uploader is not None:
            self._uploader.shutdown()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        self._files[name].append((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())


def whole_lines(content: bytes, last_step: float, path: paths.PathLike) -> bytes:
    """The whole lines of a jsonl file of a run whose step is at most `last_step`.

    Raises:
      ValueError: a line before the last can't be read: the file is not what a run wrote.
    """
    kept = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):  # the rest: nothing, or a line that a crash cut off
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no line of a run: {line[:100]!r}; move the file away") from error
        if step <= last_step:
            kept.append(line + b"\n")
    return b"".join(kept)


def read_metrics(folder: paths.PathLike) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, every value a number again."""
    lines = _read_lines(paths.at(folder) / METRICS_FILE)
    return [{name: float(v) if isinstance(v, str) else v for name, v in line.items()} for line in lines]


def read_completions(folder: paths.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's completions.jsonl."""
    return _read_lines(paths.at(folder) / COMPLETIONS_FILE)


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _number(value: float) -> float | int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _event_writer(folder: epath.Path, start_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("log.tensorboard needs tensorboardX: pip install tensorboardX") from error
    # TensorBoard hides what an earlier, killed start wrote from this step on.
    return SummaryWriter(str(folder), purge_step=None if start_step is None else start_step + 1)


COLUMNS = ("loss", "reward", "rewards/margins", "rewards/accuracies", "time/tokens_per_second")
"""What the progress display shows of a line of metrics, in this order, as far as the line has it."""


class Progress:
    """A progress bar on a terminal, plain lines elsewhere: step, chosen metrics, time left. A context manager."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        columns: Sequence[str] = COLUMNS,
        stream: TextIO | None = None,
        active: bool = True,
    ) -> None:
        """Begin at step `start` of `total`, writing to `stream` (stderr when None); not `active`: silent."""
        self._total, self._start, self._columns, self._active = total, start, columns, active
        self._stream = stream if stream is not None else sys.stderr
        self._clock: tuple[int, float] | None = None
        self._bar: Any = None
        if active and self._stream.isatty():
            self._bar, self._task = _bar(self._stream, total, start)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` is done, and its metrics."""
        if not self._active:
            return
        text = "  ".join(_column(name, values[name]) for name in self._columns if name in values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            self.message(f"step {step}/{self._total}  {text}{self._time_left(step)}")

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._active:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _time_left(self, step: int) -> str:
        """Of the steps after the first one seen, so that compilation does not count."""
        now = time.monotonic()
        if self._clock is None:
            self._clock = (step, now)
        first, began = self._clock
        if step <= first or step >= self._total:
            return ""
        seconds = (now - began) / (step - first) * (self._total - step)
        return f"  ETA {_duration(seconds)}"


def _bar(stream: TextIO, total: int, start: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(file=stream),
    )
    return bar, bar.add_task("", total=total, completed=start, text="")


def _column(name: str, value: float) -> str:
    if name == "time/tokens_per_second":
        return f"{value:,.0f} tokens/s"
    return f"{name} {value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{name} {value:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


Z = 1.959964  # standard errors on either side of a mean: 95% of a normal distribution


def wilson(successes: float, n: float, *, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share, (low, high): 95% by default. It stays in [0, 1] and is not empty at 0 or n.

    Raises:
      ValueError: n is not positive or successes is not between 0 and n.

    References:
      Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    if not n > 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n}, expected 0 <= successes <= n and n > 0")
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def mean_se(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error (sample deviation over the root of n); one value has the error NaN.

    Raises:
      ValueError: there are no values.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("mean_se: no values")
    error = float(array.std(ddof=1) / math.sqrt(array.size)) if array.size > 1 else math.nan
    return float(array.mean()), error


PANELS = (("loss", "Loss"), ("reward", "Reward"), ("completions/mean_length", "Tokens of a completion"),
          ("rewards/margins", "Reward margin"), ("rewards/accuracies", "Reward accuracy"),
          ("margin", "Margin of scores"), ("accuracy", "Accuracy"), ("kl", "KL from the reference, in nats"),
          ("mean_token_accuracy", "Accuracy of tokens"), ("entropy", "Entropy of a token, in nats"),
          ("grad_norm", "Gradient norm"))  # fmt: skip
"""Metrics that are drawn, those that a run has, with their titles."""


def plot(folder: paths.PathLike, path: paths.PathLike | None = None) -> epath.Path:
    """Curves of a run as a PNG: those of PANELS that it has and that say something, of training and of evaluation.

    Args:
      folder: the run's folder.
      path: where the picture goes; `<folder>/curves.png` when None.

    Raises:
      ValueError: the file holds none of these metrics.
    """
    lines = read_metrics(folder)
    panels = [(name, title) for name, title in PANELS if any(name in x or f"eval_{name}" in x for x in lines)]
    if any("rewards/margins" in x for x in lines):  # then it says less than they do
        panels = [panel for panel in panels if panel[0] != "mean_token_accuracy"]
    if any("reward" in x for x in lines):  # a run that samples: its loss weighs advantages whose mean is 0
        panels = [panel for panel in panels if panel[0] != "loss"]
    if not panels:
        names = ", ".join(name for name, _ in PANELS)
        raise ValueError(f"{paths.at(folder) / METRICS_FILE} has none of {names}: no curve")
    target = paths.at(folder) / "curves.png" if path is None else paths.at(path)

    from matplotlib.figure import Figure  # a Figure without pyplot needs no display and leaves no global state

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 3.2 * rows), dpi=130, layout="constrained")
    for index, (name, title) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, min(2, len(panels)), index)
        _draw(axes, lines, name)
        axes.set_title(title, fontsize=11, loc="left", color="#222222")
        axes.set_xlabel("step", fontsize=9, color="#555555")
        axes.tick_params(labelsize=8, colors="#555555")
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color("#bbbbbb")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format=target.suffix[1:], facecolor="white")
    paths.replace(target, picture.getvalue())
    return target


def _draw(axes: Any, lines: list[dict[str, float]], name: str) -> None:
    """One panel: single steps pale, their running mean strong, evaluations as points."""
    steps, values = _series(lines, name)
    window = max(1, len(steps) // 20)
    if window > 1:
        axes.plot(steps, values, color="#4878a8", alpha=0.3, linewidth=0.8)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="#4878a8", linewidth=1.8, label=f"train, mean of {window}")
    elif steps.size:
        axes.plot(steps, values, color="#4878a8", linewidth=1.5, label="train")
    steps, values = _series(lines, f"eval_{name}")
    if steps.size:
        axes.plot(steps, values, color="#d1603d", linewidth=1.5, marker="o", markersize=4, label="held out")
    if name in ("rewards/accuracies", "accuracy"):
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")


def _series(lines: list[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]
    array = np.asarray(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def forward_flops(cfg: "ModelConfig", positions: np.ndarray, scored_tokens: int) -> float:
    """Floating-point operations (a multiply and an add are two) that a forward pass over these tokens needs.

    Counted are the matrix products: the layers' weights for every real token, the head for scored tokens only,
    attention for the pairs of tokens that see each other (causal, within the window). Padding, the masked half of
    attention, recomputation and element-wise work are not: this is the work that the model needs, not what a program
    does. A backward pass needs twice as much, so a DPO step 3 (policy) + 1 (live reference) times this.

    Args:
      cfg: the model.
      positions: of each real token in its sequence, from 0, in any order and shape: it sees as many before it.
      scored_tokens: tokens whose log-prob is taken.
    """
    visible = np.asarray(positions, np.int64) + 1
    queries = cfg.num_attention_heads * cfg.head_dim
    keys = cfg.num_key_value_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * queries + 2 * keys + 3 * cfg.intermediate_size)
    weights = 2.0 * layer * cfg.num_hidden_layers * visible.size
    largest = visible.max(initial=1)
    sums = {window: int(np.minimum(visible, window or largest).sum()) for window in set(cfg.sliding_windows)}
    pairs = sum(sums[window] for window in cfg.sliding_windows)
    attention = 4.0 * queries * pairs
    head = 2.0 * cfg.hidden_size * (cfg.num_labels or cfg.vocab_size) * scored_tokens
    return weights + attention + head


# bfloat16 without sparsity, in FLOP/s of one JAX device. Google: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}
# ("peak compute per chip (BF16)"); a TPU7x chip is two devices. NVIDIA: data sheets of A100, H100 and H200, whose
# figures with sparsity are twice these. The first name that a device's kind begins with counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device of `jax.Device.device_kind`; None for one that is not in the table."""
    if device_kind.startswith("TPU v4 lite") or " MIG " in device_kind:  # an inference chip; a slice of a GPU
        return None
    return next((peak for kind, peak in PEAK_FLOPS if device_kind.startswith(kind)), None)


def mfu(flops: float, seconds: float, *, device_kind: str, n_devices: int) -> float | None:
    """Share of the devices' bfloat16 peak that `flops` in `seconds` reach; None where the peak is not known."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops / seconds / (peak * n_devices)
