"""Several processes: how they find each other, and how they end together when one fails or none gets on.

JAX by itself lets the others wait: for a peer that raised until its heartbeats are missed for 100 s, for one that hangs
for ever.
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign.signals import end_process, say

EXIT_STUCK = 76  # EX_PROTOCOL: no step was finished for watchdog_minutes
_FAILED = "jaxalign/failed"
_POLL_SECONDS = 2.0
_GRACE_SECONDS = 10.0  # so that the stacks of all processes are printed before the first one's end ends the others


def connect() -> None:
    """Joins the other processes where there are any, and from then on ends with any of them that fails.

    Found by themselves: TPU pods, SLURM's srun, Open MPI. Elsewhere the environment names them: JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID. Call it before anything touches a device.

    Raises:
      ValueError: the environment names a coordinator but not which of how many processes this is.
    """
    env = os.environ
    explicit: dict[str, Any] = {}
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            explicit = {
                "num_processes": int(env["JAX_NUM_PROCESSES"]),
                "process_id": int(env["JAX_PROCESS_ID"]),
            }
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS is {env['JAX_COORDINATOR_ADDRESS']!r}, so JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID have to be numbers too ({error} is not); set all three, or none of them"
            ) from error
    elif not is_cluster(env):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # no other device looks at it
    jax.distributed.initialize(**explicit)
    if jax.process_count() > 1:
        threading.Thread(target=_listen, name="peers", daemon=True).start()


def is_cluster(env: Mapping[str, str]) -> bool:
    """Whether an environment (after jax was imported) is that of one of several processes which JAX can find."""
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:  # within srun, not in sbatch's script
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if "TPU_ML_PLATFORM" not in env or env.get("JAX_PLATFORMS") == "cpu":  # jax sets it where it finds chips and libtpu
        return False
    names = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if "MEGASCALE_COORDINATOR_ADDRESS" in env or names is not None:
        return "MEGASCALE_COORDINATOR_ADDRESS" in env or "," in str(names)
    return "TPU_SKIP_MDS_QUERY" not in env  # a TPU VM: its metadata server knows the hosts, be it one


def _client() -> Any:
    # The store of small texts that all processes share has no public name in JAX (Orbax takes it from here too).
    from jax._src import distributed

    return distributed.global_state.client


def fail(text: str) -> None:
    """Ends this process with status 1, and all others with `text` on their consoles. `text` is printed here already."""
    if jax.distributed.is_initialized():
        with contextlib.suppress(Exception):  # one that failed before said it, or the store's process is gone
            _client().key_value_set(_FAILED, f"process {jax.process_index()} of {jax.process_count()} failed:\n{text}")
        if jax.process_index() == 0:
            time.sleep(2 * _POLL_SECONDS)  # the store ends with this process
    end_process(1)


def _listen() -> None:
    """In a thread: ends this process when another one has failed."""
    while True:
        time.sleep(_POLL_SECONDS)
        try:
            text = _client().key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:
            continue  # NOT_FOUND; if it is the store that is gone, JAX ends the process
        if text.startswith(f"process {jax.process_index()} of"):
            return
        say(f"ending, because {text}")
        end_process(1)


class Watchdog:
    """Ends the process with status 76 when no step was finished for `minutes`; on `with`, 0 never does.

    Then every process prints the stacks of its threads, its index and its last step: the one that differs from the
    others is the culprit.

    Args:
      minutes: between two calls of `beat`.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self._beaten = threading.Event()
        self._over = False
        self._what = "the start"
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Something was finished; `what` it was."""
        self._what = what
        self._beaten.set()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._beaten.set()

    def _watch(self) -> None:
        while self._beaten.wait(self._seconds):
            self._beaten.clear()
            if self._over:
                return
        say(
            f"process {jax.process_index()} of {jax.process_count()}: nothing was finished in {self._seconds / 60:g} "
            f"minutes (watchdog_minutes); the last was {self._what}. Ending with status {EXIT_STUCK}; stacks:"
        )
        faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(min(_GRACE_SECONDS, self._seconds))
        end_process(EXIT_STUCK)
