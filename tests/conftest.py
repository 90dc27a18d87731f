"""Every test runs on eight pretended CPU devices and never on the network."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXALIGN_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Tests spend their time in compilations: without LLVM's optimisations those take half of it.
    flags = " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    # Eight devices on two busy cores may be a while on their way to a collective; XLA aborts the process after 40 s.
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags
