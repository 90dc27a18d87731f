"""Trains: `python -m jaxalign.train --config=configs/dpo_smollm2.py`, or `jaxalign.run(config)` from Python.

`run` tells what a run does, in order; `Training` holds what its steps share. The loop knows no algorithm: it moves
batches from a source through one jitted step, and looks, saves and stops at step edges.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxalign import build, checkpoint, diagnose, evals, metrics, reference, sharding
from jaxalign import config as config_lib
from jaxalign.signals import EXIT_PREEMPTED, Stopper

log = logging.getLogger(__name__)

CONFIG_FILE, CHECKPOINTS, EXPORT = "config.json", "checkpoints", "export"


class Preempted(Exception):
    """The run was told to stop and has saved; started again, it continues."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      folder: metrics.jsonl, completions.jsonl, curves.png, config.json, dropped.jsonl, checkpoints/, export/.
      metrics: the last metrics of training (`loss`) and evaluation (`eval_loss`), and those of the evaluation before
        training under `before_eval_...`.
      export: the Hugging Face folder, or None.
    """

    folder: Path
    metrics: dict[str, float]
    export: Path | None

    def generate(self, prompt: Any, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0) -> str:
        """The trained model's answer to a text, or to a list of chat messages."""
        from jaxalign import export, generate

        cfg, params, tokenizer = export.load_run(self.folder)
        return generate.complete(
            cfg, params, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )[0]


def run(config: ConfigDict | Mapping[str, Any], dataset: Any = None, eval_dataset: Any = None) -> Result:
    """Trains as the command does. A run that is already in `workdir` is continued.

    Args:
      config: see `jaxalign.config`.
      dataset: training rows (a list of dicts or a `datasets.Dataset`) in place of data.path.
      eval_dataset: the same for evaluation.

    Raises:
      ValueError: the config, the data or the model can't be used; nothing was compiled yet.
      Preempted: SIGTERM or Ctrl-C; the state is saved.
      diagnose.NonFinite: a loss or gradient was not finite; see the report that the message names.
    """
    config = config_lib.validate(
        config, n_devices=jax.device_count(), has_dataset=dataset is not None, has_eval_dataset=eval_dataset is not None
    )
    use_compilation_cache(config.compilation_cache)
    folder = open_folder(config)
    data = build.load_data(config, folder / "dropped.jsonl", dataset, eval_dataset)
    mesh = sharding.make_mesh(**config.mesh.to_dict())
    with sharding.use_mesh(mesh), Stopper() as stopper, open_checkpoints(config, folder) as checkpoints:
        pieces = build.Run(config, mesh, data)
        training = Training(config, folder, pieces, stopper, checkpoints)
        with training:
            training.begin()
            training.loop()
            return training.finish()


@dataclasses.dataclass
class Progress:
    """What the loop remembers beside the state; it is in every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    looked_at: int = -1  # the last step whose evaluation and samples are written
    first_eval: dict[str, float] = dataclasses.field(default_factory=dict)
    last_eval: dict[str, float] = dataclasses.field(default_factory=dict)
    last_train: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float | None = None
    evals_since_best: int = 0
    finished: bool = False


class Training:
    """The loop and what it shares: the state, what is pending, and where lines and pictures go."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        pieces: build.Run,
        stopper: Stopper,
        checkpoints: checkpoint.Checkpoints,
    ):
        self.config, self.folder, self.run = config, folder, pieces
        self.stopper, self.checkpoints = stopper, checkpoints
        self.main = jax.process_index() == 0
        self.progress = Progress()
        self.meta = {"config": json.loads(config_lib.to_json(config)), "data": pieces.data.fingerprint}
        self.compiled: set[int] = set()
        self.pending: tuple[int, metrics.Metrics, float] | None = None
        self.resumed = False

        restored = checkpoints.restore(pieces.state)
        if restored is not None:
            self.resumed = True
            self.state = restored.state
            self.progress = Progress(**restored.meta["progress"])
            check_data(restored.meta["data"], self.meta["data"], force=config.resume == "force")
        self.done = self.progress.finished and self.progress.step >= pieces.steps
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Training":
        start = self.progress.step
        self.bar = metrics.Progress(self.run.steps, start=start, active=self.main)
        self.writer = metrics.MetricsWriter(
            self.folder,
            start_step=start if self.resumed else None,
            tensorboard=self.config.log.tensorboard,
            active=self.main,
        )
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.__exit__(*error)
        self.writer.close()

    # ---- before the first step

    def begin(self) -> None:
        """Scores the reference, makes or takes up the state, and looks at the model before the first step."""
        start, say = self.progress.step, self.bar.message
        if self.done:
            say(
                f"{self.folder} is finished: {start} steps are done. To train on: --config.steps={2 * start} (or more); "
                "to begin anew: another --config.workdir"
            )
            return
        say(describe(self.config, self.run))
        if self.resumed:
            say(f"continuing after step {start} of {self.run.steps}")
        with self.stopper.during("scoring of the reference", self.save_now if self.resumed else None):
            self.run.score_reference(say)
        if not self.resumed:
            self.state = self.run.new_state()
            if self.config.eval.at_start:
                self.look(0)
        elif self.progress.looked_at != start and self.is_due(start):
            self.edge(start)  # the run was stopped between this step and its evaluation

    # ---- the loop

    def loop(self) -> None:
        """Trains from the step after the last one to the end."""
        from jaxalign.data.batching import prefetch

        start, steps = self.progress.step, self.run.steps
        if self.done:
            return
        self.clock = time.perf_counter()
        with contextlib.closing(prefetch(self.run.source, start, steps)) as batches:
            for n, host_batch in enumerate(batches, start + 1):
                if self.stopper.should_stop(n - 1):
                    self.flush()
                    self.save_now()
                    raise Preempted(f"stopped and saved after step {self.progress.step} of {steps}")
                self.profile(n)
                self.step(n, host_batch)
                if self.is_due(n) or self.is_save_due(n):
                    self.flush()
                    self.edge(n)
                    if self.progress.finished:
                        break

    def step(self, n: int, host_batch: dict[str, np.ndarray]) -> None:
        """Dispatches step n (the first is 1), then fetches and logs the one before: the device never waits."""
        run = self.run
        flops = self.flops(host_batch)
        batch = run.place(host_batch)
        ref_params = run.reference_of(self.state)
        length = host_batch["tokens"].shape[1]
        if length not in self.compiled:
            self.flush()
            self.compile(length, batch, ref_params)
        if ref_params is not None:
            batch["ref_logps"] = run.score(ref_params, batch)
        self.state, found = run.train_step(self.state, None, batch)
        if run.sync is not None and n % self.config.reference.sync_every == 0:
            self.state = run.sync(self.state)
        self.flush()
        self.pending = n, found, flops

    def compile(self, length: int, batch: dict[str, jax.Array], ref_params: Any) -> None:
        """Compiles the programs for rows of `length` where a stop request is heard meanwhile."""
        began = time.perf_counter()
        batch = dict(batch)
        with self.stopper.during("compilation", self.save_now):
            if ref_params is not None:
                self.run.score.lower(ref_params, batch).compile()
                batch["ref_logps"] = jax.ShapeDtypeStruct(
                    batch["tokens"].shape, np.float32, sharding=sharding.row_sharding(self.run.mesh)
                )
            self.run.train_step.lower(self.state, None, batch).compile()
        seconds = time.perf_counter() - began
        self.compiled.add(length)
        self.clock += seconds
        self.bar.message(f"compiled for rows of {length} tokens in {seconds:.1f} s")

    def flush(self) -> None:
        """Fetches the metrics of the pending step, checks them and writes its line."""
        if self.pending is None:
            return
        (n, found, flops), self.pending = self.pending, None
        values = metrics.reduce(found)
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if values.pop("halted"):
            error = diagnose.report(self.run, self.state, n, values, self.folder)
            running = jax.device_put(np.zeros((), bool), self.state.aux["halted"].sharding)
            self.state = self.state._replace(aux={**self.state.aux, "halted": running})
            self.save_now()
            raise error
        if n == 1 and self.run.begins_at_reference:
            reference.check_start(values["ref_logps_difference/max"], compute_dtype=self.run.cfg.compute_dtype)
        tokens, skipped = int(values.pop("num_tokens")), int(values.pop("skipped"))
        self.progress.step = n
        self.progress.num_tokens += tokens
        values["learning_rate"] = float(self.run.schedule(n - 1 - skipped))
        values["epoch"] = n * self.config.batch_size / len(self.run.data.train)
        values["num_tokens"] = self.progress.num_tokens
        if self.config.optim.nonfinite == "skip":
            values["skipped_steps"] = skipped
        self.progress.last_train = dict(values)
        values |= {"time/step": seconds, "time/tokens_per_second": tokens / seconds}
        values["time/model_flops_per_second"] = flops / seconds
        kind, n_devices = self.run.mesh.devices.flat[0].device_kind, self.run.mesh.size
        if (share := metrics.mfu(flops, seconds, device_kind=kind, n_devices=n_devices)) is not None:
            values["time/mfu"] = share
        if n % self.config.log.every == 0 or n == self.run.steps:
            self.writer.write(n, values)
        self.bar.update(n, values)

    def flops(self, host_batch: dict[str, np.ndarray]) -> float:
        """Model FLOPs of a step over all processes: forward and backward of the policy, forward of a live reference."""
        passes = 3 if self.run.cached_reference else 4
        local = metrics.forward_flops(self.run.cfg, host_batch["lengths"], int(host_batch["mask"].sum()))
        return passes * local * self.run.rows / len(host_batch["tokens"])

    def profile(self, n: int) -> None:
        """Begins or ends the profiler trace before step n."""
        steps = self.config.log.profile_steps
        if steps and n == steps[0]:
            jax.profiler.start_trace(str(self.folder / "profile"))
        if steps and n == steps[1] + 1:
            self.flush()
            jax.profiler.stop_trace()

    # ---- step edges

    def is_due(self, n: int) -> bool:
        """Whether the model is looked at after step n: evaluation, samples."""
        every = (self.config.eval.every if self.run.data.held_out is not None else 0, self.config.samples.every)
        return n == self.run.steps or any(step and n % step == 0 for step in every)

    def is_save_due(self, n: int) -> bool:
        """Whether a checkpoint is due after step n for its own sake."""
        config = self.config
        if config.checkpoint.every and n % config.checkpoint.every == 0:
            return True
        if not config.checkpoint.every_minutes:
            return False
        due = time.monotonic() - self.saved_at > 60 * config.checkpoint.every_minutes
        if jax.process_count() > 1:  # clocks differ: the first process decides for all
            from jax.experimental import multihost_utils

            due = bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
        return due

    def edge(self, n: int) -> None:
        """Evaluates, samples and saves after step n, as far as they are due."""
        found = self.look(n) if self.is_due(n) else {}
        self.progress.finished = n == self.run.steps or self.out_of_patience()
        best = self.config.checkpoint.best_metric
        if best is not None and found and best not in found:
            raise ValueError(f"checkpoint.best_metric={best!r} is none of the evaluation's {', '.join(sorted(found))}")
        self.save(**{name: x for name, x in found.items() if name == best})
        if self.progress.finished and n != self.run.steps:
            stopping = self.config.early_stopping
            self.bar.message(f"step {n}: {stopping.metric} has not improved in {stopping.patience} evaluations: stopping")

    def look(self, n: int) -> dict[str, float]:
        """Evaluation and completions of the fixed prompts after step n; a stop request in between saves first."""
        config, found = self.config, {}
        last = n == self.run.steps
        began = time.perf_counter()
        with self.stopper.during("evaluation", self.save_now if n else None):
            evaluating = self.run.data.held_out is not None
            if evaluating and (n == 0 or last or (config.eval.every and n % config.eval.every == 0)):
                examples = evals.collect(self.run.examples, self.state.params, self.run.eval_batches(self.state))
                found = evals.summarize(examples, self.run.objective.total(examples))
            every = config.samples.every or config.eval.every
            sampling = config.samples.prompts and (n == 0 or last or (every and n % every == 0))
            rows = evals.completions(self.run, self.state.params) if sampling else []
        if found:
            self.writer.write(n, {**found, "time/eval": time.perf_counter() - began})
            self.note(n, found)
            self.bar.message(evals.line(n, found))
        self.writer.completions(n, rows)
        self.progress.looked_at = n
        if hasattr(self, "clock"):
            self.clock += time.perf_counter() - began
        return found

    def note(self, n: int, found: dict[str, float]) -> None:
        """Remembers an evaluation, and how long the early-stopping metric has not improved."""
        p, stopping = self.progress, self.config.early_stopping
        if n == 0:
            p.first_eval = found
        p.last_eval = found
        if stopping.metric is None:
            return
        if stopping.metric not in found:
            raise ValueError(f"early_stopping.metric={stopping.metric!r} is none of {', '.join(sorted(found))}")
        sign = 1 if stopping.mode == "max" else -1
        if p.best is None or sign * found[stopping.metric] > sign * p.best:
            p.best, p.evals_since_best = found[stopping.metric], 0
        elif n:
            p.evals_since_best += 1

    def out_of_patience(self) -> bool:
        """Whether early stopping ends the run."""
        stopping = self.config.early_stopping
        return stopping.metric is not None and self.progress.evals_since_best >= stopping.patience

    def save(self, **eval_metrics: float) -> None:
        """Begins to save the state after `progress.step`; one that was saved unlooked-at is saved anew."""
        step = self.progress.step
        record = {**self.meta, "progress": dataclasses.asdict(self.progress)}
        self.checkpoints.save(step, self.state, record, metrics=eval_metrics, force=step in self.checkpoints.steps())
        self.saved_at = time.monotonic()

    def save_now(self) -> None:
        """Saves and waits for it, at a stop request; before the first step there is nothing to save."""
        if self.progress.step and self.progress.step not in self.checkpoints.steps():
            self.save()
        self.checkpoints.wait()

    # ---- after the last step

    def finish(self) -> Result:
        """Waits for the last checkpoint, exports, draws, and says what came out."""
        from jaxalign import export

        self.checkpoints.wait()
        target, config = None, self.config
        if config.export.enabled:
            target = self.folder / EXPORT
            if not (self.done and target.exists()):
                with self.stopper.during("export"):
                    export.export(self.folder, target, step=config.export.step, dtype=config.export.dtype)
        p = self.progress
        before = {f"before_{name}": x for name, x in p.first_eval.items()}
        result = Result(self.folder, {**p.last_train, **before, **p.last_eval}, target)
        if self.main:
            picture = metrics.plot(self.folder)
            self.bar.message(evals.summary(p.first_eval, p.last_eval, self.samples()))
            self.bar.message(f"curves {picture}\nmodel  {target or 'not exported (export.enabled is false)'}")
        return result

    def samples(self) -> list[tuple[str, str, str]]:
        """(prompt, completion before, completion after) of the fixed prompts."""
        rows = metrics.read_completions(self.folder)
        steps = [row["step"] for row in rows]
        first = [row for row in rows if row["step"] == min(steps)]
        last = [row for row in rows if row["step"] == max(steps)]
        return [(a["prompt"], a["completion"], b["completion"]) for a, b in zip(first, last, strict=True)]


def describe(config: ConfigDict, run: build.Run) -> str:
    """One line: what a step holds."""
    a, mesh = config.gradient_accumulation_steps, run.mesh
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    return (
        f"a step: {config.batch_size} pairs = {run.rows // a} rows x {a} accumulation on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} host(s); {run.steps} steps over "
        f"{len(run.data.train)} pairs; {run.cfg.compute_dtype}, remat {run.cfg.remat}"
    )


def open_folder(config: ConfigDict) -> Path:
    """The run's folder, with its config.json; a run that is already there must be the same one.

    Raises:
      ValueError: another run is there, or `resume=never` and one is there.
    """
    folder = Path(config.workdir).expanduser()
    file = folder / CONFIG_FILE
    if file.exists():
        if config.resume == "never":
            raise ValueError(f"{folder} holds a run already and resume is never: take another workdir")
        for name, old, new in config_lib.check_resume(json.loads(file.read_text()), config):
            log.warning("resuming with %s changed: %r -> %r", name, old, new)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(config_lib.to_json(config))
        os.replace(temporary, file)
    return folder


def open_checkpoints(config: ConfigDict, folder: Path) -> checkpoint.Checkpoints:
    """The run's checkpoints, kept as the config says."""
    return checkpoint.Checkpoints(
        folder / CHECKPOINTS,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        best_metric=config.checkpoint.best_metric,
        best_mode=config.checkpoint.best_mode or "max",
    )


def check_data(old: Mapping[str, Any], new: Mapping[str, Any], *, force: bool) -> None:
    """Raises ValueError if a resumed run would see other training rows than it began with."""
    if old["train"] != new["train"] and not force:
        raise ValueError(
            f"the training rows (or their template, tokenizer or lengths) changed: fingerprint {old['train']} -> "
            f"{new['train']}. Take another workdir, bring the old rows back, or go on with the new ones by --resume=force"
        )


def use_compilation_cache(setting: str) -> None:
    """Turns JAX's compilation cache on, in a folder that only the user can read (programs are run from it)."""
    if setting == "none":
        return
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign" / "compiled"
    folder = default if setting == "auto" else Path(setting).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def connect() -> None:
    """Joins the other processes where the environment says that there are any."""
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def main() -> None:
    """The command. Exit status 0 only when the last step is done; 75: stopped and saved; 1 or 2: an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("absl", "jax", "orbax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = config_lib.parse()
    try:
        connect()
        run(config)
    except Preempted as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except (ValueError, diagnose.NonFinite) as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
