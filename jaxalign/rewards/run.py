"""Reward functions in processes that can be killed: what one does wrong costs its rows, never the run.

A worker is no sandbox. It keeps a function's accidents from the run, not a malicious function from the user's files.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxalign.messages import did_you_mean, listed
from jaxalign.rewards.worker import TEXT_LIMIT

Row = tuple[float | None, str | None]
"""The reward of a completion (None: none), and what went wrong (None: nothing)."""

GIVEN = ("prompts", "completions", "completion_ids")
"""The arguments that are no columns of the data."""

PRINTED = "\nIt printed last:\n"
"""Stands in a failure's text between what went wrong and what was printed."""

_START_SECONDS = 300.0  # for what a user's file imports, from a cold disk
_LAST_WORDS_SECONDS = 1.0  # for the stack of one that is about to be killed
_POLL_SECONDS = 0.2
_RESTARTS = 8
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxalign.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class Lost(Exception):
    """A call brought no rewards; its text says why, with the function's traceback and the last that it printed."""


class Worker:
    """A process that runs one function. It is started now, and anew at the first call after it was killed or died.

    As a fresh interpreter it neither imports the caller's script again nor inherits a device runtime; it leads a
    process group, so that what it forks is killed with it. For one thread at a time.

    Args:
      name: of the function in messages.
      function: as `user_code.load` takes it.
      options: further keywords of every call.
      timeout: seconds that a call may take.
      memory_gb: address space of each of its processes, in GiB.
    """

    def __init__(self, name: str, function: str, options: Mapping[str, Any], *, timeout: float, memory_gb: float):
        self._name, self._timeout, self._options = name, timeout, options
        self._is_shipped = function.startswith(f"{__package__}.")
        self._setup: dict[str, Any] = {"function": function, "options": dict(options), "memory_gb": memory_gb}
        self._takes: dict[str, Any] = {}  # its arguments: see worker.py
        self._columns = frozenset[str]()  # that training rows have
        self._process: subprocess.Popen[bytes] | None = None
        self._starts, self._seconds = 0, 0.0  # of processes; that calls took
        self._start()

    def check(self, columns: Collection[str] | None = None, *, dry_call: bool = False) -> None:
        """Waits until the function is loaded, and looks at what it asks for.

        Args:
          columns: that there are; None: not known.
          dry_call: look at the options' values too: by a call without completions, with empty lists for all columns.

        Raises:
          ValueError: it can't be loaded, asks for a column that isn't there, names no argument like an option, or does
            not take its value.
        """
        try:
            self._load()
        except Lost as error:
            raise ValueError(f"rewards.functions: {self._name} can't be loaded: {error}") from None
        names = [*self._takes["columns"], *self._takes["options"]]
        for option in self._options:
            if option not in names:
                raise ValueError(
                    f"rewards.options: {self._name} has no argument {option!r}{did_you_mean(option, names)}; it has "
                    + ", ".join(names)
                )
        self._columns = frozenset(columns or ()) - {"prompt", "completion"}
        for name in self._takes["required"]:
            if columns is not None and name not in (*columns, *self._options, *GIVEN):
                raise ValueError(
                    f"rewards.functions: {self._name} asks for {name!r}, which is neither a column of the data "
                    f"({listed(sorted(columns))}) nor in rewards.options"
                )
        if dry_call:
            try:
                self._ask({name: [] for name in self._takes["columns"]}, 0, _START_SECONDS)
            except Lost as error:
                raise ValueError(f"rewards.options: {self._name}: {str(error).splitlines()[-1]}") from None

    def rewards(self, arguments: Mapping[str, Sequence[Any]], count: int) -> list[Row]:
        """The rewards of `count` completions; every argument is a list with an entry for each of them.

        The function is called once, with all. If that brings nothing (it raised, took too long, crashed), it is called
        with each row alone, so that only the rows which are to blame are lost: a quarter of the timeout for one, twice
        the timeout and 8 new processes for all; rows that are not reached are lost too. Another number of rewards than
        of completions is a mistake that no row is to blame for, and costs all. An async function is first called with
        all the single rows at once, for one timeout. A function that compares completions with each other sees single
        ones then, only then.
        """
        last_start, until = self._starts + _RESTARTS, self._seconds + 3 * self._timeout
        try:
            return self._ask(arguments, count, self._timeout)
        except Lost as error:
            if count == 1:
                return [(None, str(error))]
            why = str(error)
        if self._takes.get("async"):
            try:
                return self._ask(arguments, count, self._timeout, apart=True)
            except Lost as error:
                why = str(error)
        rows: list[Row] = []
        for row in range(count):
            left = until - self._seconds
            if left <= 0 or (self._process is None and self._starts >= last_start):
                return rows + [(None, why)] * (count - row)
            alone = {name: [column[row]] for name, column in arguments.items()}
            try:
                rows += self._ask(alone, 1, min(left, self._timeout / 4))
            except Lost as error:
                why = str(error)
                rows.append((None, why))
        return rows

    def close(self) -> None:
        """Kills the process and what it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for environment in Path("/proc").glob("[0-9]*/environ"):  # those that have left the group
            with contextlib.suppress(OSError):
                if self._mark.encode() in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a disk can't even be killed
            self._process.wait(_LAST_WORDS_SECONDS)
        self._process = None
        self._channel.close()
        for end in (self._pipe, self._output):
            os.close(end)

    def _start(self) -> None:
        self._starts += 1
        self._mark = os.urandom(16).hex()
        self._channel, channel = socket.socketpair()
        pipe, self._pipe = os.pipe()
        self._output, output = os.pipe()
        os.set_blocking(self._output, False)
        self._said = b""
        environment = {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "JAX_PLATFORMS": "cpu",  # should the function want JAX: the accelerator is the trainer's
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1",
            "JAXALIGN_REWARD_WORKER": self._mark,
        }
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, path, str(channel.fileno()), str(pipe)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            pass_fds=(channel.fileno(), pipe),
            start_new_session=True,
        )
        channel.close()
        for end in (pipe, output):
            os.close(end)
        self._poll = select.poll()
        for end in (self._channel.fileno(), self._output):
            self._poll.register(end, select.POLLIN)
        self._received = b""
        self._deadline = time.monotonic() + _START_SECONDS
        self._loading = True
        self._send(self._setup, _START_SECONDS)

    def _load(self) -> None:
        """Waits until the process has its function, if it hasn't yet."""
        if not self._loading:
            return
        try:
            reply = self._receive(self._deadline)
            if "error" in reply:
                self._lose(reply["error"])
        except Lost:
            self._starts += _RESTARTS  # no use in trying again soon
            raise
        self._takes, self._loading = reply, False

    def _ask(
        self, arguments: Mapping[str, Sequence[Any]], count: int, seconds: float, *, apart: bool = False
    ) -> list[Row]:
        """One call; `apart`: of an async function, with each row alone."""
        if self._process is None:
            self._start()
        self._load()
        names = arguments if self._takes["any"] else {*self._takes["columns"], *self._takes["options"]}
        # A column named like an option is not it: an option that is set, or of a shipped function any behind its star.
        options = {*self._options, *(self._takes["options"] if self._is_shipped else ())}
        taken = {name: values for name, values in arguments.items() if name in names and name not in options}
        # What training rows have, rows of an evaluation may lack.
        lacking = self._columns.intersection(self._takes["required"]) - {*options, *taken}
        taken |= {name: [None] * count for name in lacking}
        self._hear()
        self._said = b""
        begun = time.monotonic()
        try:
            self._send({"arguments": taken, "count": count, "seconds": seconds, "apart": apart}, seconds)
            reply = self._receive(begun + seconds)
        finally:
            self._seconds += min(time.monotonic() - begun, seconds)  # not the wait for its end
        if "error" in reply:
            self._hear()
            raise Lost(self._with_said(reply["error"]))
        return [(value, problem) for value, problem in reply["rows"]]

    def _send(self, message: Mapping[str, Any], seconds: float) -> None:
        self._channel.settimeout(seconds)
        with contextlib.suppress(OSError):  # it is gone, or does not read: what waits for the reply finds out
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next line that the process sends before `time.monotonic()` is `deadline`."""
        assert self._process is not None
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                os.kill(self._process.pid, signal.SIGABRT)
                until = time.monotonic() + _LAST_WORDS_SECONDS
                while not self._is_dead() and time.monotonic() < until:
                    self._hear()
                    time.sleep(0.01)
                self._lose("it took longer than it may (rewards.timeout) and was killed")
            dead = self._is_dead()  # known before what it sent is looked at; a child of it may keep the socket open
            ready = dict(self._poll.poll(1000 * min(left, _POLL_SECONDS)))
            if self._output in ready:
                self._hear()
            if self._channel.fileno() in ready:
                received = b""
                with contextlib.suppress(ConnectionError):
                    received = self._channel.recv(1 << 16)
                self._received += received
                dead = not received
            if dead:
                self._lose(None)
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _hear(self) -> None:
        """Takes what was printed, of which the end is kept; not all of it, should it never end."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                said = os.read(self._output, 1 << 16)
                if not said:
                    with contextlib.suppress(KeyError):
                        self._poll.unregister(self._output)
                    return
                self._said = (self._said + said)[-TEXT_LIMIT:]

    def _with_said(self, why: str) -> str:
        said = self._said.decode(errors="replace").strip()
        return f"{why}{PRINTED}{said}" if said else why

    def _is_dead(self) -> bool:
        """Without taking its status, so that its number stays its own until `close` has killed its group."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _lose(self, why: str | None) -> NoReturn:
        """Ends the process; `why` is None where it ended by itself."""
        assert self._process is not None
        process = self._process
        self._hear()
        self.close()
        if why is None:
            code = process.returncode
            why = "its process " + (
                f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with status {code}"
            )
        raise Lost(self._with_said(why))
