"""XLA's options for overlapping communication with computation: the one place where jaxalign sets any.

They are given to `jax.jit` (compiler_options) and not to the process's environment: so they hold for a run's own
programs alone, and whenever the backend began. One that the user has set in XLA_FLAGS is left to the user. Nothing is
set on CPU, and nothing on a single device, which has nothing to overlap.
"""

import logging
import os
from typing import Any

from jaxalign import sharding

log = logging.getLogger(__name__)

# GPU: off by default; NVIDIA's own JAX images set it, and it alone, and JAX's GPU performance tips name it first:
#   https://docs.nvidia.com/jax-toolbox/environment-variables, https://docs.jax.dev/en/latest/gpu_performance_tips.html
#   Both leave thresholds for combining collectives, and pipelined collectives, to be tuned for a workload: not set.
# TPU: the latency-hiding scheduler and asynchronous collectives are on by default; of what the guide suggests against
#   its default, asynchronous all-to-all changed nothing in a program compiled with libtpu 0.0.42: not set.
#   https://openxla.org/xla/flags_guidance
OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def options(mesh: Any) -> dict[str, Any] | None:
    """What to give `jax.jit` as compiler_options for programs on `mesh`; None where it is nothing."""
    users = os.environ.get("XLA_FLAGS", "")
    found = {name: value for name, value in OPTIONS.get(sharding.platform(mesh), {}).items() if name not in users}
    if mesh.size == 1 or not found:
        return None
    log.info("XLA options: %s", " ".join(f"{name}={value}" for name, value in found.items()))
    return found
