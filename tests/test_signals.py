"""jaxalign.signals in real processes: a signal between steps, in a region, while XLA compiles, with two processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from jaxalign.signals import EXIT_ABORTED, EXIT_PREEMPTED, Stopper

HEAD = """
import os, signal, sys, threading, time
from jaxalign.signals import EXIT_PREEMPTED, Stopper
def say(text): print(text, flush=True)
"""


@contextlib.contextmanager
def program(body: str, *args: str) -> Iterator[subprocess.Popen]:
    code = HEAD + textwrap.dedent(body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], **pipes, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was not printed")


def finish(process: subprocess.Popen, timeout: float = 60) -> tuple[int, str, float]:
    """Exit status, the rest of the output, seconds until the end."""
    began = time.monotonic()
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output, time.monotonic() - began


LOOP = """
with Stopper() as stopper:
    for step in range(10_000):
        time.sleep(0.02)
        if step == 5: say("running")
        if stopper.should_stop(step):
            say("saved at a step's end")
            sys.exit(EXIT_PREEMPTED)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_between_steps_the_loop_sees_the_request_and_exits_75(number):
    with program(LOOP) as process:
        wait_for(process, "running")
        process.send_signal(number)
        status, output, _ = finish(process)
    assert status == EXIT_PREEMPTED == 75
    assert f"{number.name}: saving after this step, then exit 75; Ctrl-C again aborts" in output
    assert "saved at a step's end" in output and "Traceback" not in output


def test_a_second_ctrl_c_aborts_at_once_but_a_second_sigterm_does_not():
    body = "with Stopper() as stopper:\n    say('running')\n    time.sleep(60)\n"
    with program(body) as process:
        wait_for(process, "running")
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, output, seconds = finish(process)
    assert status == EXIT_ABORTED == 130 and seconds < 2 and output.count("saving after this step") == 1


REGION = """
def save():
    say("saving in " + threading.current_thread().name)
    time.sleep(float(sys.argv[1]))
    say("saved")
with Stopper() as stopper:
    with stopper.during("evaluation", save):
        say("running")
        time.sleep(float(sys.argv[2]))
    say("went on after the region")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_a_region_the_watcher_saves_and_exits_75_within_two_seconds(number):
    with program(REGION, "0.1", "60") as process:
        wait_for(process, "running")
        process.send_signal(number)
        status, output, seconds = finish(process)
    assert status == 75 and seconds < 2
    assert f"{number.name} during evaluation: saving now, then exit 75" in output
    assert "saving in on_stop" in output and "saved" in output


def test_the_main_thread_does_not_leave_a_region_that_is_being_saved_from():
    with program(REGION, "1.5", "0.5") as process:
        wait_for(process, "running")
        process.send_signal(signal.SIGTERM)
        status, output, _ = finish(process)
    assert status == 75 and "saved" in output and "went on" not in output


def test_a_second_ctrl_c_aborts_a_save_that_hangs():
    with program(REGION, "60", "60") as process:
        wait_for(process, "running")
        process.send_signal(signal.SIGINT)
        wait_for(process, "saving in")
        process.send_signal(signal.SIGINT)
        status, _, seconds = finish(process)
    assert status == 130 and seconds < 2


def test_a_save_that_fails_exits_1_with_its_traceback():
    body = """
    def save(): raise OSError("disk full")
    with Stopper() as stopper, stopper.during("first compile", save):
        say("running")
        time.sleep(60)
    """
    with program(body) as process:
        wait_for(process, "running")
        process.send_signal(signal.SIGTERM)
        status, output, _ = finish(process)
    assert status == 1 and "disk full" in output and "Traceback" in output


def test_a_request_before_a_region_acts_on_entering_it_and_none_to_save_exits():
    body = """
    with Stopper() as stopper:
        with stopper.during("reading", lambda: say("WRONG")):
            with stopper.during("inner"):
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopper.requested: time.sleep(0.01)
        with stopper.during("evaluation", lambda: say("saved in " + threading.current_thread().name)):
            say("WRONG")
    """
    with program(body) as process:
        status, output, _ = finish(process)
    assert status == 75 and "saved in MainThread" in output and "WRONG" not in output


def test_sigterm_during_a_compile_of_a_minute_saves_and_exits_in_seconds(tmp_path):
    body = """
    import jax, jax.numpy as jnp
    from jaxalign.checkpoint import Checkpoints
    state = {"params": {"w": jnp.arange(8.0)}}
    checkpoints = Checkpoints(sys.argv[1])
    def save():
        checkpoints.save(0, state, {"why": "preempted"})
        checkpoints.wait()
    @jax.jit
    def slow(x):
        for i in range(1200):
            x = jnp.sort(jnp.sin(x * i) + jnp.cumsum(x[::-1]))
        return x
    lowered = slow.lower(jnp.ones(64))
    with Stopper() as stopper:
        with stopper.during("first compile", save):
            say("compiling")
            began = time.monotonic()
            lowered.compile()
            say(f"COMPILED in {time.monotonic() - began:.1f} s")
            time.sleep(60)
    """
    with program(body, str(tmp_path / "ckpt")) as process:
        wait_for(process, "compiling")
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        status, output, seconds = finish(process, 120)
    assert "COMPILED" not in output, output
    assert status == 75 and seconds < 10, (seconds, output)  # 2 s on a quiet machine, most of it the save
    from jaxalign.checkpoint import list_steps, read_meta

    assert list_steps(tmp_path / "ckpt") == [0] and read_meta(tmp_path / "ckpt", 0) == {"why": "preempted"}


def test_a_forked_worker_neither_stops_the_run_nor_dies_of_ctrl_c():
    body = """
    import multiprocessing
    def work(seconds): time.sleep(seconds)
    with Stopper() as stopper:
        fork = multiprocessing.get_context("fork")
        workers = [fork.Process(target=work, args=(60,), daemon=True) for _ in range(2)]
        for worker in workers: worker.start()
        time.sleep(0.3)
        os.kill(workers[0].pid, signal.SIGINT)
        workers[1].terminate()
        workers[1].join(5)
        time.sleep(0.2)
        say(f"{workers[0].is_alive()} {workers[1].exitcode} {stopper.requested}")
    """
    with program(body) as process:
        status, output, _ = finish(process)
    assert status == 0 and "True -15 False" in output


def test_former_handlers_are_back_afterwards_and_another_thread_is_inert():
    def handler(number, frame):
        raise AssertionError("not called")

    former = signal.signal(signal.SIGTERM, handler)
    try:
        ctrl_c = signal.getsignal(signal.SIGINT)
        for _ in range(2):
            with Stopper() as stopper:
                assert signal.getsignal(signal.SIGTERM) is not handler
                assert not stopper.should_stop(0)
            assert signal.getsignal(signal.SIGTERM) is handler and signal.getsignal(signal.SIGINT) is ctrl_c
            assert signal.set_wakeup_fd(-1) == -1
        seen = []

        def elsewhere() -> None:
            with Stopper() as stopper, stopper.during("evaluation", lambda: seen.append("WRONG")):
                seen.append((stopper.requested, stopper.should_stop(3), signal.getsignal(signal.SIGTERM) is handler))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [(False, False, True)]
    finally:
        signal.signal(signal.SIGTERM, former)


def test_two_processes_agree_on_the_step_when_one_gets_sigterm():
    body = """
    import jax
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    with Stopper() as stopper, stopper.during("first compile", lambda: say("WRONG")):
        for step in range(1, 1000):
            time.sleep(0.03)
            if step == 5: say("running")
            if stopper.should_stop(step):
                assert stopper.requested and stopper.should_stop(step)
                say(f"stopped at {step}")
                jax.distributed.shutdown()
                sys.exit(EXIT_PREEMPTED)
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with program(body, address, "0") as first, program(body, address, "1") as second:
        wait_for(first, "running")
        wait_for(second, "running")
        second.send_signal(signal.SIGTERM)
        results = [finish(p) for p in (first, second)]
    stops = [[line for line in output.splitlines() if "stopped at" in line] for _, output, _ in results]
    assert [status for status, _, _ in results] == [75, 75], results
    assert stops[0] == stops[1] and stops[0] and "WRONG" not in results[0][1] + results[1][1]
