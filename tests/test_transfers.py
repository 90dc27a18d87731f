"""The device never waits for Python: what a step of the loop sends, fetches and compiles.

A step dispatches its programs on a batch that it has put on the devices explicitly, and fetches nothing but the metrics
of the step before, which are done by then. On a GPU, `scripts/benchmark_gpu.py --only=profile` shows the same in time.
"""

import contextlib

import jax
import jax.monitoring
import numpy as np
import pytest
import runs

from jaxalign import build, config, metrics, run_folder, sharding, train
from jaxalign.data.batching import prefetch
from jaxalign.signals import Stopper

STEPS, FIRST = 6, 3  # steps of the run, and the first one that is looked at: two were dispatched, one was fetched


class Watch:
    """Counts what passes between host and devices by JAX's explicit ways, and programs that are compiled."""

    def __init__(self, monkeypatch):
        self.events = []
        for name in ("device_put", "device_get", "make_array_from_process_local_data"):
            real = getattr(jax, name)

            def counted(*args, real=real, name=name, **kwargs):
                self.events.append((name, args))
                return real(*args, **kwargs)

            monkeypatch.setattr(jax, name, counted)

        def compiled(event, seconds, **kwargs):
            if event == "/jax/core/compile/backend_compile_duration":
                self.events.append(("compile", ()))

        jax.monitoring.register_event_duration_secs_listener(compiled)

    def named(self, name):
        return [args for event, args in self.events if event == name]


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A run before its first step: nothing is evaluated, sampled or saved on the way."""
    monkeypatch.setattr(metrics, "plot", lambda folder: folder / "curves.png")
    values = runs.config(
        tmp_path / "run", steps=STEPS, epochs=None, checkpoint__every=0, eval__every=None, data__eval__path=None,
        samples__prompts=0, samples__max_new_tokens=None, reference__mode="live",
    )  # fmt: skip
    checked = config.validate(values, n_devices=jax.device_count())
    folder = run_folder.check(checked)
    mesh = sharding.make_mesh(data=-1)
    data = build.load_data(checked, folder / "dropped.jsonl")
    with contextlib.ExitStack() as stack:
        stopper = stack.enter_context(Stopper())
        stack.enter_context(sharding.use_mesh(mesh))
        checkpoints = stack.enter_context(run_folder.open_checkpoints(checked, folder))
        pieces = build.Run(checked, mesh, data)
        one = stack.enter_context(train.Training(checked, folder, pieces, stopper, checkpoints))
        one.begin()
        yield one


def steps_of(training, watch, guard):
    """Runs the loop's body, steps within `guard`; yields (n, host batch) after each step from FIRST on."""
    with contextlib.closing(prefetch(training.run.source, 0, STEPS)) as batches:
        for n, batch in enumerate(batches, 1):
            watch.events.clear()
            # From the step before on, because a guard is part of what JAX finds a compiled program by.
            with guard() if n >= FIRST - 1 else contextlib.nullcontext():
                training.step(n, batch)
            if n >= FIRST:
                yield n, batch


def disallowed():
    """No transfer that is not asked for by name, to the devices, from them, or between them."""
    return jax.transfer_guard("disallow")


def test_a_step_sends_its_batch_and_fetches_the_metrics_of_the_step_before(training, monkeypatch):
    watch = Watch(monkeypatch)
    for n, batch in steps_of(training, watch, disallowed):
        sent = [args[1] for args in watch.named("make_array_from_process_local_data")]
        expected = [leaf for name, leaf in batch.items() if name != "row_ids"]
        assert len(sent) == len(expected) and all(x is y for x, y in zip(sent, expected, strict=True))
        assert watch.named("device_put") == []
        (fetched,) = watch.named("device_get")
        assert all(x.shape == () for x in jax.tree.leaves(fetched)) and "loss" in fetched[0]
        assert watch.named("compile") == []
        # The fetch comes when this step is on its way already.
        assert watch.events[-1][0] == "device_get"
        assert training.progress.step == n - 1 and training.pending[0] == n


def test_nothing_is_sent_but_the_batch_even_by_name(training, monkeypatch):
    """With the batch placed outside of it, the step runs under a guard that forbids every transfer to the devices."""
    watch = Watch(monkeypatch)
    real = training.run.place

    def place(batch):
        with jax.transfer_guard_host_to_device("allow"):
            return real(batch)

    monkeypatch.setattr(training.run, "place", place)
    guard = lambda: jax.transfer_guard_host_to_device("disallow_explicit")  # noqa: E731
    assert [n for n, _ in steps_of(training, watch, guard)] == list(range(FIRST, STEPS + 1))


def test_a_step_that_sends_something_on_its_own_is_found(training, monkeypatch):
    watch = Watch(monkeypatch)
    real = training.run.train_step

    def careless(state, frozen, batch):
        return real(state, frozen, {**batch, "mask": np.asarray(batch["mask"])})

    monkeypatch.setattr(training.run, "train_step", careless)
    careless.lower = real.lower
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        list(steps_of(training, watch, disallowed))
