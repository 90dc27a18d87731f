"""Every test runs on eight pretended CPU devices and never on the network."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAXALIGN_TEST_PLATFORM", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
