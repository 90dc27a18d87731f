"""What runs in a reward's worker process: a fresh interpreter that answers calls of one function over a socket.

It imports neither JAX nor numpy (the function may), and reads and writes lines of JSON, never pickles: the first line
says which function and within what limits, each further one is a call. What the function prints goes another way.
"""

import asyncio
import contextlib
import faulthandler
import fcntl
import inspect
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import user_code

TEXT_LIMIT = 4000
"""Characters of a traceback, and of what a worker printed, that are kept: the last ones."""

_LARGEST = 3.4028234e38  # of float32


def main(channel: int, pipe: int) -> None:
    """The worker's body.

    Args:
      channel: descriptor of a socket to the trainer.
      pipe: descriptor of a pipe's end that the trainer holds the other end of and writes nothing to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
    faulthandler.enable()  # a crash, and the SIGABRT that a call over its time gets, say where
    _end_with_the_trainer(pipe)
    connection = socket.socket(fileno=channel)
    lines = connection.makefile("rb")
    setup = json.loads(next(lines))
    _limit_memory(setup["memory_gb"])
    pid = os.getpid()
    try:
        function = user_code.load(setup["function"])
        reply = _arguments(function)
    except BaseException as error:
        reply = {"error": _text(error)}
    while True:
        if os.getpid() != pid:
            os._exit(0)  # the function forked, and its child came back too
        connection.sendall(json.dumps(reply).encode() + b"\n")
        line = next(lines, None)
        if line is None:
            return
        call = json.loads(line)
        _limit_cpu(call["seconds"])
        reply = _answer(function, call, setup["options"])


def _end_with_the_trainer(pipe: int) -> None:
    """Has the kernel kill this process group when the trainer is gone, however it went.

    A thread that waits for the pipe's end would not do: a regular expression that never ends holds the interpreter's
    lock. PR_SET_PDEATHSIG would not do either: it fires when the thread that started this process ends.
    """
    if sys.platform == "linux":
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | fcntl.FASYNC)


def _limit_memory(gigabytes: float) -> None:
    most = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # less is allowed anyway; or macOS, which has it in name only
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out all the same, this process goes and not the trainer


def _limit_cpu(seconds: float) -> None:
    """Of use where a process that the function started has left the group: it ends some time.

    There is no such limit for their number: RLIMIT_NPROC counts all of the user's threads, JAX's hundreds too.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    budget = int(used.ru_utime + used.ru_stime + 2 + seconds * (os.cpu_count() or 1))
    with contextlib.suppress(ValueError):  # less is allowed anyway
        resource.setrlimit(resource.RLIMIT_CPU, (budget, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function takes by name, before a star (`columns`) and behind it (`options`), what of that is `required`,
    and whether it takes `any` other name too; and whether it is `async`."""
    of = inspect.Parameter
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some that are written in C don't say
        return {"columns": [], "options": [], "required": [], "any": True, "async": False}
    columns = [parameter for parameter in parameters if parameter.kind == of.POSITIONAL_OR_KEYWORD]
    options = [parameter for parameter in parameters if parameter.kind == of.KEYWORD_ONLY]
    return {
        "columns": [parameter.name for parameter in columns],
        "options": [parameter.name for parameter in options],
        "required": [parameter.name for parameter in columns + options if parameter.default is of.empty],
        "any": any(parameter.kind == of.VAR_KEYWORD for parameter in parameters),
        "async": inspect.iscoroutinefunction(function),
    }


def _answer(function: Callable[..., Any], call: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`rows` of numbers and what is wrong with them, None where nothing is; or the `error` that lost them all."""
    arguments, count = call["arguments"], call["count"]
    try:
        if call["apart"]:
            found = asyncio.run(_apart(function, arguments, options, count, 0.75 * call["seconds"]))
            return {"rows": list(map(_row, found))}
        found = function(**arguments, **options)
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
        return {"rows": _rows(found, count)}
    except MemoryError:
        raise  # what is left of this process is not to be trusted: it ends, and another one takes its place
    except BaseException as error:
        return {"error": _text(error)}


async def _apart(
    function: Callable[..., Any], arguments: Mapping[str, Any], options: Mapping[str, Any], count: int, seconds: float
) -> list[Any]:
    """What an async function returns or raises for each row by itself, all at once."""
    calls = [function(**{name: [column[row]] for name, column in arguments.items()}, **options) for row in range(count)]
    return await asyncio.gather(*(asyncio.wait_for(call, seconds) for call in calls), return_exceptions=True)


def _row(found: Any) -> tuple[float | None, str | None]:
    try:
        if isinstance(found, BaseException):
            raise found
        return _rows(found, 1)[0]
    except Exception as error:
        return None, _text(error)


def _rows(found: Any, count: int) -> list[tuple[float | None, str | None]]:
    if isinstance(found, str | bytes | Mapping):
        raise TypeError(f"expected a list of {count} numbers or None, got {found!r:.200}")
    found = list(found)
    if len(found) != count:  # which of them is whose, nobody knows: all rows are lost, and asked for no second time
        return [(None, f"expected a list of {count} numbers or None, got {len(found)}")] * count
    return list(map(_number, found))


def _number(value: Any) -> tuple[float | None, str | None]:
    if value is None:
        return None, None
    try:
        number = float("nan") if isinstance(value, str | bytes) else float(value)
    except Exception as error:
        return None, f"a reward is a number or None, got {type(value).__name__} ({error!s:.200})"
    if abs(number) <= _LARGEST:  # not so for NaN
        return number, None
    return None, f"a reward is a finite float32 number or None, got {value!r:.200}"


def _text(error: BaseException) -> str:
    """The traceback of what a function raised, without the frames above the function."""
    ours = (__file__, user_code.__file__)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    if trace is None:
        return f"{type(error).__name__}: {error}"[:TEXT_LIMIT]
    return "".join(traceback.format_exception(type(error), error, trace)).strip()[-TEXT_LIMIT:]
