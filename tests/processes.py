"""Programs in two real processes that form one group, as two hosts would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PRELUDE = """
import json, os, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(os.environ["COORDINATOR"], 2, int(os.environ["PROCESS"]))
import numpy as np
from jaxalign import export, hf, models, paths, sharding

def tell(value):  # not by print: the collectives' library writes to stdout too
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(value) + "\\n")

def load(source, layout, **options):
    mesh = sharding.make_mesh(**layout)
    shardings = sharding.param_shardings(mesh, models.declare(hf.read_config(source)))
    return mesh, *hf.load(source, shardings=shardings, **options)
"""


def two_processes(program: str, folder: Path, *arguments: Any, devices: int = 4) -> list[list[Any]]:
    """What each of two processes told; `folder` is for the files that they tell it by."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "COORDINATOR": address, "XLA_FLAGS": flags}
    told = [folder / f"told-{number}" for number in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, *map(str, arguments)],
            env={**environment, "PROCESS": str(number), "TOLD": str(told[number])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        found = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors for _, errors in found)
    return [[json.loads(line) for line in open(file)] if file.exists() else [] for file in told]
