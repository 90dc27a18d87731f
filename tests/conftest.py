"""Every test runs on eight pretended CPU devices and never on the network."""

import os

PRETENDED = (
    # Tests spend their time in compilations: without LLVM's optimisations those take half of it.
    "--xla_backend_optimization_level=0",
    # Being slow on the way to a collective, on a busy machine, is no reason to abort (XLA does so after 40 s).
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

# Threads of XLA's pool. With one a core, devices that wait in a collective leave none to those that they wait for.
os.environ.setdefault("NPROC", "64")
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXALIGN_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = ("--xla_force_host_platform_device_count=8", *PRETENDED)
    os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *flags)).strip()
