"""Tests run on eight pretended CPU devices (`pytest -m gpu`: on the GPUs that are there) and never on the network."""

import logging
import os
from collections.abc import Iterator

import pytest

PRETENDED = (
    # Tests spend their time in compilations: without LLVM's optimisations those take half of it.
    "--xla_backend_optimization_level=0",
    # Being slow on the way to a collective, on a busy machine, is no reason to abort (XLA does so after 40 s).
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

# Threads of XLA's pool. With one a core, devices that wait in a collective leave none to those that they wait for.
THREADS = "64"


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports JAX."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if config.getoption("markexpr") == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the card
        return
    os.environ.setdefault("NPROC", THREADS)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flags = ("--xla_force_host_platform_device_count=8", *PRETENDED)
        os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """A command that a test has called in this process has said what it logs; the next test is to hear all."""
    yield
    logging.getLogger("jaxalign").setLevel(logging.NOTSET)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` need one."""
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU")
