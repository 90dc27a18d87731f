"""Whether all that a run needs is here: `python -m jaxalign.doctor`.

    --json       one JSON object on stdout

Versions, devices, memory, attention, bfloat16, the compilation cache and the hub, then what is broken and what to
install. Exit status 1 if something is broken. On a pod slice run it on all hosts alike: libtpu waits for the others.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

PACKAGES = (
    "jaxalign", "jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
    "orbax-checkpoint", "grain", "transformers", "datasets", "gcsfs",
)  # fmt: skip

# PCI vendor 0x1ae0 is Google, whose network cards and disks every VM of its cloud has too; these devices are TPUs (v3,
# v4, v5p, v5e, v6e, 7x: the list by which JAX 0.10 finds them).
_GOOGLE, _TPUS = "0x1ae0", {"0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
PCI = Path("/sys/bus/pci/devices")
GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last one under Windows


def report() -> dict[str, Any]:
    """What there is, as plain values.

    Returns:
        versions {package: version or None}; devices [{id, platform, kind, memory}] and host {cores, memory} (bytes;
        of a device what JAX may use, None where it doesn't say); attention {choice, why} of a plain model with heads
        of 128; bfloat16 {on, why}; compilation_cache (folder); hub {token (where it is from), offline}; broken [text];
        install [command].
    """
    problems = [*unmet("jaxalign"), *unmet("jax", "cuda12"), *unmet("jax", "cuda13"), *unmet("jax", "tpu")]
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": [],
        "host": {"cores": os.cpu_count(), "memory": host_memory()},
        "attention": None,
        "bfloat16": None,
        "compilation_cache": None,
    }
    try:
        found |= compute()
    except Exception as error:  # of a driver or a plugin it can be anything, and is what one wants to read here
        problems.append((f"JAX can't compute: {type(error).__name__}: {error}", None))
    problems += unseen({device["platform"] for device in found["devices"]})
    try:
        found["compilation_cache"] = compilation_cache()
    except (OSError, ValueError) as error:
        problems.append((f"no compilation cache: {error}; set XDG_CACHE_HOME to a folder that can be written", None))
    return {
        **found,
        "hub": hub(),
        "broken": [text for text, _ in problems],
        "install": list(dict.fromkeys(command for _, command in problems if command)),
    }


Problem = tuple[str, str | None]
"""What is wrong, and the command that installs what is missing."""


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(package: str, extra: str = "") -> Iterator[Problem]:
    """The dependencies of an installed package that are missing or of another version than it needs.

    With `extra`, those of the extra that are installed: nobody has to install it.
    """
    from packaging.requirements import Requirement

    try:
        required = list(map(Requirement, importlib.metadata.requires(package) or []))
    except importlib.metadata.PackageNotFoundError:
        yield f"{package} is not installed", f"pip install {package}"
        return
    always = [r for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    if extra:
        core = {r.name for r in always}
        more = [r for r in required if r.marker is not None and r.marker.evaluate({"extra": extra})]
        always = [r for r in more if r.name not in core and version(r.name) is not None]
    for requirement in always:
        there = version(requirement.name)
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            requirement.marker = None
            have = "is missing" if there is None else f"is {there}"
            yield f"{requirement.name} {have}: {package} needs {requirement}", f'pip install "{requirement}"'


def compute() -> dict[str, Any]:
    """devices, attention and bfloat16 of `report`, after a small product on every device.

    Raises:
      Exception: whatever JAX, a plugin or a driver says.
    """
    import jax
    import jax.numpy as jnp

    from jaxalign.models import attention, config_from_hf

    for device in jax.local_devices():
        x = jax.device_put(jnp.ones((256, 256), jnp.bfloat16), device)
        if float((x @ x).astype(jnp.float32).sum()) != 256.0**3:
            raise ValueError(f"{device}: the product of two matrices is wrong")
    kind = jax.default_backend()
    on = kind != "cpu"
    probe = config_from_hf({"model_type": "llama"})
    probe = dataclasses.replace(probe, compute_dtype="bfloat16" if on else "float32")
    choice, why = attention.choose(probe)
    reason = f"model.compute_dtype is auto, and the devices are of platform {kind}"
    return {
        "devices": [
            {"id": d.id, "platform": d.platform, "kind": d.device_kind, "memory": device_memory(d)}
            for d in jax.local_devices()
        ],
        "attention": {"choice": choice, "why": why},
        "bfloat16": {"on": on, "why": reason},
    }


def device_memory(device: Any) -> int | None:
    """Bytes of a device's memory that JAX may use, None where it doesn't say (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory() -> int:
    """Bytes of the host's memory, or of what a container may use of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return whole if text == "max" else min(whole, int(text))


def unseen(platforms: set[str]) -> Iterator[Problem]:
    """Accelerators that the machine has and JAX, which sees `platforms`, doesn't."""
    gpu, tpu = any(Path(file).exists() for file in GPUS), any(map(_is_tpu, PCI.glob("*/vendor")))
    hidden = os.environ.get("JAX_PLATFORMS")
    for here, kind, name, extra, packages in (
        (gpu, "gpu", "an NVIDIA GPU", "cuda", ("jax-cuda12-plugin", "jax-cuda13-plugin")),
        (tpu, "tpu", "a TPU", "tpu", ("libtpu",)),
    ):
        if here and kind not in platforms:
            missing = not any(map(version, packages))
            why = f"; JAX_PLATFORMS={hidden} hides it" if hidden else ""
            sees = ", ".join(sorted(platforms)) or "nothing"
            yield f"{name} is here, but JAX sees {sees}{why}", f'pip install "jaxalign[{extra}]"' if missing else None


def _is_tpu(vendor: Path) -> bool:
    return vendor.read_text().strip() == _GOOGLE and (vendor.parent / "device").read_text().strip() in _TPUS


def compilation_cache() -> str:
    """The folder that runs keep compiled programs in, after a file was written there.

    Raises:
      OSError, ValueError: it can't be written.
    """
    import jax

    from jaxalign import train

    train.use_compilation_cache("auto")
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    probe = folder / f"doctor-{os.getpid()}"
    probe.touch()
    probe.unlink()
    return str(folder)


def hub() -> dict[str, Any]:
    """Where the Hugging Face token comes from (never the token), and whether the hub is off."""
    import huggingface_hub
    from huggingface_hub import constants

    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else None
    if token is None and huggingface_hub.get_token():
        token = constants.HF_TOKEN_PATH
    return {"token": token, "offline": constants.HF_HUB_OFFLINE}


def show(found: dict[str, Any]) -> str:
    """A report as lines."""
    versions = [f"{name} {number}" for name, number in found["versions"].items() if number is not None]
    hub_, host, bfloat16, chosen = found["hub"], found["host"], found["bfloat16"], found["attention"]
    lines = [("versions", ", ".join(versions))]
    kinds: dict[str, int] = {}
    for device in found["devices"]:
        memory = "" if device["memory"] is None else f", {device['memory'] / 1e9:.1f} GB for JAX each"
        name = f"{device['platform']}, {device['kind']}{memory}"
        kinds[name] = kinds.get(name, 0) + 1
    lines += [("devices", f"{count} x {name}") for name, count in kinds.items()]
    lines.append(("host", f"{host['cores']} cores, {host['memory'] / 1e9:.1f} GB"))
    if chosen and bfloat16:
        flash = "off" if chosen["choice"] == "xla" else "on"
        lines.append(("flash attention", f"{flash}: {chosen['choice']}, because {chosen['why']}"))
        lines.append(("bfloat16", f"{'on' if bfloat16['on'] else 'off'}: {bfloat16['why']}"))
    lines += [
        ("compiled programs", found["compilation_cache"] or "not kept"),
        ("hub", f"{'offline (HF_HUB_OFFLINE)' if hub_['offline'] else 'online'}, token: {hub_['token'] or 'none'}"),
    ]
    lines += [("broken", text) for text in found["broken"]] or [("", "all is well")]
    lines += [("install", command) for command in found["install"]]
    return "\n".join(f"{name:18} {text}" for name, text in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    flags.DEFINE_bool("help", False, "Print this and stop.", flag_values=values)
    try:
        if rest := values(list(sys.argv if argv is None else argv))[1:]:
            raise flags.Error(f"unexpected argument {rest[0]!r}")
    except flags.Error as error:
        print(f"doctor: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if values.help:
        print(__doc__)
        return
    found = report()
    print(json.dumps(found) if values.json else show(found))
    if found["broken"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
