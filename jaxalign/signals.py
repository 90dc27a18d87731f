"""Being told to stop: SIGTERM or Ctrl-C saves and exits 75, during a compilation too; a second Ctrl-C aborts.

A Python signal handler runs between two bytecodes of the main thread, so not before a compilation of minutes is over,
which is longer than a scheduler waits before it kills. The C half of the handler, however, writes the signal's number
to a file descriptor at once (`signal.set_wakeup_fd`); a thread of ours reads it there. Between steps the loop asks
`should_stop`; where no step's end is near (first compile, evaluation, generation) it declares a region with what to do,
and the thread does that itself and ends the process.

With several processes no handler of ours is installed: JAX's preemption service catches SIGTERM on any of them and
makes all agree on one step to stop after, and Ctrl-C stays Python's own.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
EXIT_ABORTED = 130  # as a shell reports a process that SIGINT killed
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Region(NamedTuple):
    name: str
    on_stop: Callable[[], object] | None


def _ignore(number: int, frame: FrameType | None) -> None:
    """The Python half of the handlers: its being there makes the C half write to the descriptor, where all happens."""


def say(text: str) -> None:
    """Straight to the descriptor: the main thread may hold sys.stderr's lock, a progress bar may have replaced it."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def end_process(code: int) -> None:
    """Ends the process without the main thread's help, and the workers that it would have stopped."""
    if os.isatty(2):
        with contextlib.suppress(OSError):
            os.write(2, b"\x1b[?25h")  # a progress bar has hidden the cursor
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class Stopper:
    """Installs itself on `with`, in the main thread; elsewhere (a notebook's worker thread) `requested` stays False.

    On several processes enter it after `jax.distributed.initialize()`. The former handlers come back at the end.
    """

    requested: bool = False
    """A stop was asked for. On several processes: the step to stop after is reached."""

    def __init__(self) -> None:
        self._lock = (
            threading.Lock()
        )  # held while a region begins or ends, and while a request finds out whether it is in one
        self._region: _Region | None = None
        self._acting = False
        self._several = False
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Stopper":
        self._several = jax.distributed.is_initialized() and jax.process_count() > 1
        if self._several or threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._watcher.start()
        self._former_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._former: dict[signal.Signals, Any] = {number: signal.signal(number, _ignore) for number in SIGNALS}
        _installed.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is None:
            return
        _installed.remove(self)
        for number, handler in self._former.items():
            signal.signal(
                number, signal.SIG_DFL if handler is None else handler
            )  # None: it was not installed from Python
        signal.set_wakeup_fd(self._former_fd)
        self._writer.shutdown(
            socket.SHUT_WR
        )  # the watcher reads the end and returns; a close would not do if a worker was forked
        self._watcher.join()
        self._writer.close()
        self._reader.close()
        self._watcher = None

    def should_stop(self, step: int) -> bool:
        """Whether to save now and exit 75. To be asked after every step, by every process, with the step's number."""
        if self._several and not self.requested:
            from jax.experimental import multihost_utils

            self.requested = bool(multihost_utils.reached_preemption_sync_point(step))
        return self.requested

    @contextlib.contextmanager
    def during(self, name: str, on_stop: Callable[[], object] | None = None) -> Iterator[None]:
        """While inside, a stop request runs `on_stop()` in another thread at once and exits 75 (1 if it raises).

        `on_stop` may save and wait; the main thread can't leave the region meanwhile, but it goes on until then, so
        what `on_stop` reads must not be what the region changes or donates. None: there is nothing to save. A request
        that came before the region acts on entering it. Regions may be nested; the inner one counts. On several
        processes a region does nothing: the request is found after the step.
        """
        if self._watcher is None:
            yield
            return
        region = _Region(name, on_stop)
        with self._lock:
            outer, self._region = self._region, region
            self._acting = self._acting or self.requested
            pending = self.requested
        if pending:
            self._act(region, "the stop request")
        try:
            yield
        finally:
            with self._lock:
                self._region = outer
                acting = self._acting
            if acting:
                threading.Event().wait()  # until the other thread ends the process

    def _watch(self) -> None:
        while received := self._reader.recv(64):
            for number in received:
                if number in SIGNALS:
                    self._on_signal(signal.Signals(number))

    def _on_signal(self, number: signal.Signals) -> None:
        with self._lock:
            again, self.requested = self.requested, True
            region = self._region
            self._acting = self._acting or region is not None
        if again:
            if number == signal.SIGINT:
                say("Ctrl-C again: aborting now; the last complete checkpoint stays valid")
                end_process(EXIT_ABORTED)
            return
        if region is None:
            say(f"{number.name}: saving after this step, then exit {EXIT_PREEMPTED}; Ctrl-C again aborts")
        else:  # in a further thread, because this one has to hear the second Ctrl-C
            threading.Thread(target=self._act, args=(region, number.name), name="on_stop", daemon=True).start()

    def _act(self, region: _Region, cause: str) -> None:
        what = "exit" if region.on_stop is None else "saving now, then exit"
        say(f"{cause} during {region.name}: {what} {EXIT_PREEMPTED}; Ctrl-C again aborts")
        code = EXIT_PREEMPTED
        try:
            if region.on_stop is not None:
                region.on_stop()
        except BaseException:  # whatever it was, the process must end, and not as if it had saved
            code = 1
            say(f"saving failed, exit 1; the last complete checkpoint stays valid\n{traceback.format_exc()}")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        end_process(code)


_installed: list[Stopper] = []


def _in_forked_child() -> None:
    """A forked worker shares the descriptor: the SIGTERM that ends it would stop the run. Ctrl-C is its parent's."""
    if _installed:
        _installed.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_forked_child)
