"""Trains: `python -m jaxalign.train --config=configs/dpo_smollm2.py`, or `jaxalign.run(config)` from Python.

`run` tells what a run does, in order; `Training` holds what its steps share. The loop knows no algorithm: it moves
batches from a source through one jitted step, and looks, saves and stops at step edges.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from jaxalign import (
    build,
    checkpoint,
    diagnose,
    evals,
    hosts,
    lora,
    metrics,
    paths,
    reference,
    rollout,
    run_folder,
    sharding,
)
from jaxalign import config as config_lib
from jaxalign.signals import EXIT_PREEMPTED, Stopper
from jaxalign.step import TrainState

log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was told to stop and has saved; started again, it continues."""


class OutOfMemory(RuntimeError):
    """The devices' memory is not enough for this run."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
      folder: metrics.jsonl, completions.jsonl, curves.png, config.json, dropped.jsonl, checkpoints/, export/.
      metrics: the last metrics of training (`loss`) and evaluation (`eval_loss`), and those of the evaluation before
        training under `before_eval_...`.
      export: the Hugging Face folder, or None.
    """

    folder: epath.Path
    metrics: dict[str, float]
    export: epath.Path | None

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
      Preempted: SIGTERM or Ctrl-C came; the state is saved. (During start-up, compilation, evaluation and export, where
        the next step is far, the process saves and ends by itself with status 75.)
      diagnose.NonFinite: a loss or gradient was not finite; see the report that the message names.
      OutOfMemory: the devices' memory was not enough; the message holds preflight's table and a setting to try.
      RuntimeError: a checkpoint could not be written.
    """
    config = config_lib.validate(
        config, n_devices=jax.device_count(), has_dataset=dataset is not None, has_eval_dataset=eval_dataset is not None
    )
    use_compilation_cache(config.compilation_cache)
    folder = run_folder.check(config)
    with Stopper() as stopper:
        with stopper.during("start-up"):
            data = build.load_data(config, folder / "dropped.jsonl", dataset, eval_dataset)
        mesh = sharding.make_mesh(**config.mesh.to_dict())
        with sharding.use_mesh(mesh), run_folder.open_checkpoints(config, folder) as checkpoints:
            with contextlib.closing(build.Run(config, mesh, data)) as pieces:
                with explaining(pieces), Training(config, folder, pieces, stopper, checkpoints) as training:
                    with hosts.Watchdog(config.watchdog_minutes) as watchdog:
                        pieces.on_progress = watchdog.beat
                        training.begin()
                        training.loop()
                    return training.finish()


@dataclasses.dataclass
class Progress:
    """What the loop remembers beside the state; it is in every checkpoint."""

    step: int = 0
    num_tokens: int = 0
    looked_at: int = -1  # the last step whose evaluation and completions are written
    first_eval: dict[str, float] = dataclasses.field(default_factory=dict)
    last_eval: dict[str, float] = dataclasses.field(default_factory=dict)
    last_train: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float | None = None  # of early_stopping.metric
    evals_since_best: int = 0
    finished: bool = False  # the last step is done and looked at
    file_sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes of metrics.STEP_FILES


class Training:
    """The loop and what it shares: the state, what is pending, and where lines and pictures go."""

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.Path,
        pieces: build.Run,
        stopper: Stopper,
        checkpoints: checkpoint.Checkpoints,
    ):
        self.config, self.folder, self.run = config, folder, pieces
        self.stopper, self.checkpoints = stopper, checkpoints
        self.main = jax.process_index() == 0
        self.meta = {
            "config": json.loads(config_lib.to_json(config)),
            "data": pieces.data.fingerprint,
            "base": pieces.base_hash,
        }
        self.compiled: set[tuple[tuple[int, ...], ...]] = set()
        self.pending: tuple[int, metrics.Metrics, float, dict[str, float]] | None = None
        self.trace: run_folder.Trace | None = None
        self.clock = time.perf_counter()  # when the step before was fetched
        check_metrics(config, evals.names(pieces.objective, pieces.reward_names))

        self.state = pieces.state  # abstract, until there is one
        self.progress, self.former = Progress(), self.meta["config"]
        restored = self.restored()
        self.resumed = restored is not None
        if restored is not None:
            check_data(restored.meta["data"], self.meta["data"], force=config.resume == "force")
            if pieces.base_hash is not None:
                lora.check_base(restored.meta["base"], pieces.base_hash, what=f"the adapter of the run in {folder}")
            self.take_up(restored.state)
            self.former = restored.meta["config"]
            self.progress = Progress(**restored.meta["progress"])
        p, steps = self.progress, pieces.steps
        ended = p.step == steps or self.is_out_of_patience(p.evals_since_best)
        self.done = p.step > steps or (p.finished and ended)
        p.finished = self.done
        self.saved_at = time.monotonic()

    def __enter__(self) -> "Training":
        start = self.progress.step
        if self.main:
            run_folder.keep_config(self.config, self.folder)
        self.bar = metrics.Progress(self.run.steps, start=start, active=self.main)
        self.writer = metrics.MetricsWriter(
            self.folder,
            start_step=start if self.resumed else None,
            sizes=self.progress.file_sizes,
            tensorboard=self.config.log.tensorboard,
            active=self.main,
        )
        self.bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.trace is not None:
            self.trace.stop()
        self.bar.__exit__(*error)
        self.writer.close()

    # ---- before the first step

    def begin(self) -> None:
        """Scores the reference, makes or takes up the state, and looks at the model before the first step."""
        start, say = self.progress.step, self.bar.message
        if self.done:
            say(finished(self.config, self.folder, start))
            return
        say(describe(self.config, self.run))
        if self.resumed:
            say(f"continuing after step {start} of {self.run.steps}")
        with self.stopper.during("start-up"):
            self.run.score_reference(say)
            if not self.resumed:
                self.state = self.run.new_state()
            self.run.release()
        if not self.resumed:
            self.look(0)
        elif start == self.run.steps or (self.is_look_due(start) and self.progress.looked_at != start):
            self.edge(start)  # the run was stopped between this step and its evaluation, or now ends here

    # ---- the loop

    def loop(self) -> None:
        """Trains from the step after the last one to the end."""
        start, steps = self.progress.step, self.run.steps
        if self.progress.finished:
            return
        self.clock = time.perf_counter()
        with contextlib.closing(self.batches(start)) as batches:
            for n in range(start + 1, steps + 1):
                if self.stopper.should_stop(n - 1):
                    self.flush()
                    self.save_now()
                    raise Preempted(f"stopped and saved after step {self.progress.step} of {steps}")
                self.profile(n)
                self.step(n, next(batches))
                if self.is_look_due(n) or self.is_save_due(n):
                    self.flush()
                    self.edge(n)
                    if self.progress.finished:
                        break

    def batches(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        """The host batches from step `start` on: made ahead in threads, or with the weights when it is their turn."""
        if self.run.rollouts is None:
            from jaxalign.data.batching import prefetch

            return prefetch(self.run.source, start, self.run.steps)
        return (self.sampled(self.run.rollouts, n) for n in range(start, self.run.steps))

    def sampled(self, rollouts: rollout.Rollouts, n: int) -> dict[str, np.ndarray]:
        """The batch that step n + 1 learns from, sampled now if it begins a rollout; then a stop request is heard."""
        if rollouts.has(n):
            return rollouts.batch(n)
        self.flush()  # the weights are waited for anyway, and what is saved at a stop has to be of one step
        with self.stopper.during("generation", self.save_now):
            batch = rollouts(n, self.run.whole(self.state.params), self.run.reference_of(self.state))
        every = self.config.rollout.show_every
        if every and -n % every < rollouts.updates:
            rows = rollouts.shown()
            self.writer.completions(n + 1, rows)
            self.bar.message(evals.group(n + 1, rows))
        return batch

    def step(self, n: int, host_batch: dict[str, np.ndarray]) -> None:
        """Dispatches step n (the first is 1), then fetches and logs the one before: the device never waits."""
        run = self.run
        flops = self.flops(host_batch)
        batch = run.place(host_batch)
        ref_params = None if "ref_logps" in host_batch else run.reference_of(self.state)
        shapes = tuple(leaf.shape for leaf in batch.values())
        if shapes not in self.compiled:
            self.flush()
            self.compile(batch, ref_params)
            self.compiled.add(shapes)
        if ref_params is not None:
            batch["ref_logps"] = run.score(ref_params, batch)
        self.state, found = run.train_step(self.state, run.base, batch)
        if run.sync is not None and n % self.config.reference.sync_every == 0:
            self.state = run.sync(self.state)
        self.flush()
        self.pending = n, found, flops, self.of_rollout()

    def compile(self, batch: Mapping[str, Any], ref_params: Any) -> None:
        """Compiles the programs for batches of these shapes, for calls to find; a stop request is heard."""
        began = time.perf_counter()
        batch = dict(batch)
        with self.aside(), self.stopper.during("compilation", self.save_now):
            if ref_params is not None:
                self.run.score.lower(ref_params, batch).compile()
                batch["ref_logps"] = jax.ShapeDtypeStruct(
                    batch["tokens"].shape, np.float32, sharding=sharding.row_sharding(self.run.mesh)
                )
            self.run.train_step.lower(self.state, self.run.base, batch).compile()
        rows = f"{len(batch['tokens'])} packed rows" if "segment_ids" in batch else "rows"
        shared = f" ({batch['shared_prefix'].shape[1]} of them shared)" if "shared_prefix" in batch else ""
        seconds = time.perf_counter() - began
        self.bar.message(f"compiled for {rows} of {batch['tokens'].shape[1]} tokens{shared} in {seconds:.1f} s")

    def flush(self) -> None:
        """Fetches the metrics of the pending step, checks them and writes its line."""
        if self.pending is None:
            return
        (n, found, flops, sampled), self.pending = self.pending, None
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
        p, tokens, skipped = self.progress, int(values.pop("num_tokens")), int(values.pop("skipped"))
        p.step = n
        self.run.on_progress(f"step {n}")
        p.num_tokens += tokens
        values["epoch"] = n * self.run.examples_per_step / len(self.run.data.train)
        values["num_tokens"] = p.num_tokens
        if self.config.optim.nonfinite == "skip":
            values["skipped_steps"] = skipped
        parts = {name: x for name, x in sampled.items() if name.startswith("time/")}
        values |= {name: x for name, x in sampled.items() if name not in parts}
        first = ["loss", "reward", "reward_std", "grad_norm", "learning_rate"]
        first += [name for name in values if name.startswith("rewards/")]
        p.last_train = {name: values[name] for name in dict.fromkeys([*first, *values]) if name in values}
        update = seconds - sum(parts.values())
        values = {**p.last_train, "time/step": seconds, **parts, "time/tokens_per_second": tokens / seconds}
        if self.run.rollouts is not None:
            values["time/update"] = update
        values["time/model_flops_per_second"] = flops / update
        kind, n_devices = self.run.mesh.devices.flat[0].device_kind, self.run.mesh.size
        if (share := metrics.mfu(flops, update, device_kind=kind, n_devices=n_devices)) is not None:
            values["time/mfu"] = share
        if n % self.config.log.every == 0 or n == self.run.steps:
            self.writer.write(n, values)
        self.bar.update(n, values)

    def of_rollout(self) -> dict[str, float]:
        """What the rollout in use measured, and once the seconds that it took."""
        rollouts = self.run.rollouts
        if rollouts is None:
            return {}
        spent, rollouts.spent = rollouts.spent, {}
        return {**rollouts.metrics(), **spent}

    def flops(self, host_batch: dict[str, np.ndarray]) -> float:
        """Model FLOPs of a step over all processes: forward and backward of the policy, forward of a live reference.

        And where a loss looks at the whole batch, the forward pass that does so before the micro-batches. Frozen
        weights have half a backward pass, without a gradient of their own. KTO's mismatched sequences count as trained.
        """
        run, positions = self.run, host_batch["positions"]
        is_split = self.config.gradient_accumulation_steps > 1
        backward = 2 if run.frozen is None else 1
        scores = run.live_reference and "ref_logps" not in host_batch
        passes = 1 + backward + scores + (run.objective.couples and is_split)
        if "segment_ids" in host_batch:
            real = host_batch["segment_ids"] > 0
        else:
            real = positions < host_batch["lengths"][:, None]
        if "shared_prefix" in host_batch:  # computed once for both rows of a pair
            real[1::2, : host_batch["shared_prefix"].shape[1]] = False
        local = metrics.forward_flops(run.cfg, positions[real], int(host_batch["mask"].sum()))
        n_rows = len(positions)
        return passes * local * sharding.global_rows(run.mesh, n_rows) / n_rows

    def profile(self, n: int) -> None:
        """Begins or ends the profiler trace before step n."""
        steps = self.config.log.profile_steps
        if steps and n == steps[0]:
            self.trace = run_folder.Trace(self.folder / "profile")
        if self.trace is not None and n == steps[1] + 1:
            self.flush()
            self.trace.stop()
            self.trace = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside does not count as a step's time."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

    # ---- step edges

    def is_look_due(self, n: int) -> bool:
        """Whether the model is looked at after step n."""
        return self.is_eval_due(n) or self.is_sample_due(n)

    def is_eval_due(self, n: int) -> bool:
        """Whether the held-out rows are evaluated after step n."""
        if self.run.data.held_out is None:
            return False
        return self.config.eval.at_start if n == 0 else is_due(n, self.config.eval.every, self.run.steps)

    def is_sample_due(self, n: int) -> bool:
        """Whether completions of the fixed prompts are made after step n."""
        samples = self.config.samples
        if not samples.prompts:
            return False
        if not samples.every and self.is_eval_due(n):
            return True
        return is_due(n, samples.every, self.run.steps)

    def is_save_due(self, n: int) -> bool:
        """Whether a checkpoint is due after step n for its own sake."""
        every, minutes = self.config.checkpoint.every, self.config.checkpoint.every_minutes
        if is_due(n, every, self.run.steps):
            return True
        several = jax.process_count() > 1
        if not minutes or (several and n % 10):
            return False
        due = time.monotonic() - self.saved_at > 60 * minutes
        if several:  # clocks differ: the first process decides for all; being asked costs them a wait for the device
            from jax.experimental import multihost_utils

            due = bool(multihost_utils.broadcast_one_to_all(np.bool_(due)))
        return due

    def edge(self, n: int) -> None:
        """Looks at the model after step n and saves it, as far as that is due."""
        config = self.config.checkpoint
        found = self.look(n) if self.is_look_due(n) and self.progress.looked_at != n else {}
        self.progress.finished = n == self.run.steps or self.is_out_of_patience(self.progress.evals_since_best)
        if self.is_save_due(n) or self.progress.finished or (found and config.keep_best):
            self.save(**{name: x for name, x in found.items() if name == config.best_metric})

    def look(self, n: int) -> dict[str, float]:
        """Evaluation and completions after step n, as far as they are due; a stop request meanwhile saves first.

        What they find is written and remembered only when both are done, so that a run that was stopped here makes both
        again.
        """
        began = time.perf_counter()
        found: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        on_stop = self.save_now if n else None
        with self.aside():
            if self.is_eval_due(n):
                with self.stopper.during("evaluation", on_stop):
                    found = evals.evaluate(self.run, self.state, untrained=not n)
                    found["time/eval"] = time.perf_counter() - began
            best, since = self.patience(found)
            at_an_end = n == 0 or self.is_out_of_patience(since)
            if self.is_sample_due(n) or (self.config.samples.prompts and at_an_end):
                with self.stopper.during("generation", on_stop):
                    complete = evals.completions if n else evals.first_completions
                    rows = complete(self.run, self.state.params)
        if found:
            self.writer.write(n, found)
            self.bar.message(evals.line(n, found))
        self.writer.completions(n, rows)
        p = self.progress
        p.best, p.evals_since_best = best, since
        p.last_eval = {name: x for name, x in found.items() if not name.startswith("time/")} or p.last_eval
        p.first_eval = p.first_eval if n else p.last_eval
        p.looked_at = n
        if self.is_out_of_patience(since) and n != self.run.steps:
            metric = self.config.early_stopping.metric
            self.bar.message(f"step {n}: {metric} has not improved in {since} evaluations: stopping")
        return p.last_eval if found else {}

    def is_out_of_patience(self, evals_since_best: int) -> bool:
        """Whether early stopping ends the run."""
        stopping = self.config.early_stopping
        return stopping.metric is not None and evals_since_best >= stopping.patience

    def patience(self, found: Mapping[str, float]) -> tuple[float | None, int]:
        """The best early-stopping metric and the evaluations since, with `found` taken into account."""
        p, stopping = self.progress, self.config.early_stopping
        if stopping.metric is None or not found:
            return p.best, p.evals_since_best
        value, sign = found[stopping.metric], 1 if stopping.mode == "max" else -1
        if not math.isnan(value) and (p.best is None or sign * value > sign * p.best):
            return value, 0
        return p.best, p.evals_since_best + 1

    def kept(self) -> Any:
        """What a checkpoint holds: the state, beside it the rollout that a run is in the middle of where it samples."""
        rollouts = self.run.rollouts
        if rollouts is None:
            return self.state
        return {**self.state._asdict(), "rollout": rollouts.kept(self.progress.step)}

    def restored(self) -> checkpoint.Restored | None:
        """The newest valid checkpoint; by force without its rollout, where that is not of this run's shapes."""
        kept = self.kept()
        try:
            return self.checkpoints.restore(kept)
        except checkpoint.InvalidCheckpoint:
            raise
        except ValueError:
            if self.config.resume != "force" or self.run.rollouts is None:
                raise
        kept.pop("rollout")
        found = self.checkpoints.restore(kept, ignore=("rollout",))
        log.warning("the saved rollout has other shapes than those of this config: a new one takes its place")
        return found

    def take_up(self, kept: Any) -> None:
        """Goes on with what `kept` gave."""
        if self.run.rollouts is not None:
            if "rollout" in kept:
                self.run.rollouts.restore(kept.pop("rollout"))
            kept = TrainState(**kept)
        self.state = kept

    def save(self, **eval_metrics: float) -> None:
        """Begins to save the state after `progress.step`; one that was saved unlooked-at is saved anew."""
        p = self.progress
        self.writer.flush()
        p.file_sizes = self.writer.sizes()
        record = {**self.meta, "progress": dataclasses.asdict(p)}
        with self.aside():
            force = p.step in self.checkpoints.steps()
            self.checkpoints.save(p.step, self.kept(), record, metrics=eval_metrics, force=force)
        self.saved_at = time.monotonic()

    def save_now(self) -> None:
        """Saves and waits for it, at a stop request; before the first step there is nothing to save."""
        if self.progress.step and self.progress.step not in self.checkpoints.steps():
            self.save()
        self.checkpoints.wait()

    # ---- after the last step

    def finish(self) -> Result:
        """Waits for the last checkpoint, exports, draws, and says what came out."""
        self.checkpoints.wait()
        target = self.export() if self.config.export.enabled else None
        p = self.progress
        before = {f"before_{name}": x for name, x in p.first_eval.items()}
        result = Result(self.folder, {**p.last_train, **before, **p.last_eval}, target)
        if self.main:
            picture = metrics.plot(self.folder)
            self.bar.message(evals.summary(p.first_eval, p.last_eval, self.samples()))
            self.bar.message(f"curves {picture}\nmodel  {target or 'not exported (export.enabled is false)'}")
        return result

    def export(self) -> epath.Path:
        """Writes the Hugging Face folder, unless this finished run has it already."""
        from jaxalign import export

        target, wanted = self.folder / run_folder.EXPORT, self.meta["config"]["export"]
        if self.done and target.exists() and self.former["export"] == wanted:
            return target
        with self.stopper.during("export"):
            mesh = self.run.mesh if jax.process_count() > 1 else None
            return export.export(self.folder, target, step=wanted["step"], dtype=wanted["dtype"], mesh=mesh)

    def samples(self) -> list[tuple[str, str, str]]:
        """(prompt, completion before, completion after) of the fixed prompts."""
        rows = [row for row in metrics.read_completions(self.folder) if "advantage" not in row]
        first, last = ({r["prompt"]: r["completion"] for r in rows if r["step"] == n} for n in ends(rows))
        return [(prompt, first.get(prompt, ""), after) for prompt, after in last.items()]


@contextlib.contextmanager
def explaining(pieces: build.Run) -> Iterator[None]:
    """Makes of RESOURCE_EXHAUSTED what it takes to understand it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        from jaxalign import preflight

        log.error("%s\nout of memory: working out what this run needs, which may take as long as compiling it", error)
        raise OutOfMemory(preflight.explain(pieces, error)) from error


def describe(config: ConfigDict, run: build.Run) -> str:
    """One line: what a step holds."""
    a, mesh = config.gradient_accumulation_steps, run.mesh
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    kind, trained = run.data.train.kind, ""
    made = kind if run.rollouts is None else "sampled completions"
    rows = f"{run.rows // a} rows" if config.data.packing == "off" else "packed rows"
    if run.frozen is not None:
        weights = sum(x.size for x in jax.tree.leaves(run.state.params))
        trained = f"; {weights:,} trained weights beside frozen ones"
    return (
        f"a step: {config.batch_size} {made} = {rows} x {a} accumulation on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} ({axes}), {jax.process_count()} host(s); {run.steps} steps over "
        f"{len(run.data.train)} {kind}; {run.cfg.compute_dtype}, remat {run.cfg.remat}{trained}"
    )


def finished(config: ConfigDict, folder: epath.Path, step: int) -> str:
    """What to say of a run that has nothing left to do."""
    more = f"--config.steps={2 * step}" if config.steps else f"--config.epochs={2 * config.epochs:g}"
    if config.early_stopping.metric:
        more += f" and --config.early_stopping.patience={2 * config.early_stopping.patience}"
    return (
        f"{folder} is finished: {step} steps are done. To train on: {more} (or more); to begin anew: another "
        "--config.workdir"
    )


def is_due(n: int, every: int, steps: int) -> bool:
    """Whether what happens `every` steps (0: never) and at the end is due after step n."""
    return n == steps or (every > 0 and n % every == 0)


def ends(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """The first and the last step that rows belong to."""
    steps = [row["step"] for row in rows] or [0]
    return min(steps), max(steps)


def check_metrics(config: ConfigDict, known: list[str]) -> None:
    """Raises ValueError if a metric that decides something is none of the evaluation's."""
    for key, name in (
        ("early_stopping.metric", config.early_stopping.metric),
        ("checkpoint.best_metric", config.checkpoint.best_metric),
    ):
        if name is not None and name not in known:
            raise ValueError(f"{key} is {name!r}, expected one of {', '.join(known)}")


def check_data(old: Mapping[str, Any], new: Mapping[str, Any], *, force: bool) -> None:
    """Raises ValueError if a resumed run would see other training rows than it began with."""
    if old["train"] != new["train"] and not force:
        raise ValueError(
            f"the training rows (or their template, tokenizer or lengths) changed: fingerprint {old['train']} -> "
            f"{new['train']}. Take another workdir, bring the old rows back, or go on with the new by --resume=force"
        )


def use_compilation_cache(setting: str) -> None:
    """Turns JAX's compilation cache on, in a folder that only the user can read (programs are run from it), or off."""
    from jax.experimental.compilation_cache import compilation_cache

    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign" / "compiled"
    folder = None if setting == "none" else default if setting == "auto" else setting
    if folder is not None:
        folder = paths.make_folder(folder, private=True)
    compilation_cache.reset_cache()  # or the folder of an earlier run in this process would stay
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a hundred small ones take seconds too
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class _Lines(logging.Handler):
    """Log lines to whatever sys.stderr is at the time: while the progress bar is on, that is above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def quiet() -> None:
    """Plain log lines of ours; of the libraries only what went wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Lines()])
    for name in ("absl", "jax", "orbax", "grain", "fsspec", "gcsfs", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news


def main() -> None:
    """The command. Exit status 0 only when the last step is done; 75: stopped and saved; 1 or 2: an error."""
    gc.freeze()  # what the imports made stays
    gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the million: at Python's 700 it is an eighth slower
    config = config_lib.parse()
    quiet()
    try:
        hosts.connect()
        if jax.process_index():
            logging.getLogger().setLevel(logging.WARNING)  # the first process speaks for all
        run(config)
    except Preempted as stopped:
        print(f"{stopped}; the same command continues", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except BaseException as error:
        if isinstance(error, ValueError | diagnose.NonFinite | OutOfMemory):
            text = f"jaxalign: {error}"
        else:
            text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        if jax.distributed.is_initialized():
            # An orderly end waits for the other processes, which wait for this one in the middle of a step.
            hosts.fail(text)
        sys.exit(1)


if __name__ == "__main__":
    main()
