"""Whether a run fits, before a chip-hour is spent: `python -m jaxalign.preflight --config=FILE --topology=v5p:2x2x2`.

    --topology=NAME        TPUs to compile for, generation and chips: v5p:2x2x2, v5e:4x4. Needs libtpu, but no TPU
    --here                 compile for the devices of this machine instead
    --model_config=FILE    a config.json to take in place of model.path's: no model has to be here
    --json                 one JSON object on stdout

The programs of the run (scoring, train step, evaluation, sampling: prefill and decode) are compiled at their longest
rows from abstract arrays: no data and no weights are read. Exit status 0: it fits. 1: it does not. 2: the
config, the model or the topology can't be used.
"""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxalign import config as config_lib
from jaxalign import lora, models, paths, programs, sharding
from jaxalign.messages import first_line
from jaxalign.models.config import ModelConfig
from jaxalign.workload import Job, jobs

GIB = 2**30

# What a program may use of each device, in GiB: what the compiler of libtpu 0.0.42 says when an array is too large. The
# rest of a chip's 32, 95, 16, 32 or 192 GB is the runtime's. JAX's device is a chip, on a TPU7x half a chip.
HBM_GIB = {"TPU v4": 30.75, "TPU v5": 95.74, "TPU v5 lite": 15.75, "TPU v6 lite": 31.25, "TPU7x": 94.75}

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

STEPS = 1000  # of a run whose length only its data tell: no program's memory depends on it


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of each device while one program runs.

    Attributes:
      arguments, temporaries, code: the program's own.
      output: without what takes the place of a donated argument.
      besides: everything else that is alive, other programs' code included.
      exhausted: the compiler gave up for want of memory and `temporaries` is derived from what it said.
      collectives: {kind: (how often, bytes)}, see `collectives`.
    """

    name: str
    rows: tuple[int, int]
    arguments: int
    temporaries: int
    output: int
    code: int
    besides: int
    seconds: float
    exhausted: bool
    collectives: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.output + self.code + self.besides


def preflight(run: programs.Programs) -> dict[str, Any]:
    """Compiles the programs of a run and adds up what each device needs. Call under `jax.set_mesh(run.mesh)`.

    Returns:
        device {kind, count, processes, memory}; mesh; model {parameters, trained, remat, compute_dtype, attention};
        programs [the fields of `Need`, total]; needed (the most over programs) and fits; checkpoint and export (bytes
        on disk in all), host (bytes of each process for its part of a checkpoint while that is written); settings
        [{setting, estimate, fits}], what to change first, empty where it fits.
    """
    device = run.mesh.devices.flat[0]
    needs = [measure(job, device.platform) for job in jobs(run)]
    code = sum(need.code for need in needs)
    needs = [dataclasses.replace(need, besides=need.besides + code - need.code) for need in needs]
    memory = memory_of(device)
    worst = max(needs, key=lambda need: need.total)
    parameters = sum(math.prod(weight.shape) for weight in lora.flat(models.declare(run.cfg)).values())
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.state.params))
    export = run.config.export.dtype
    fits = worst.total <= memory
    return {
        "device": {
            "kind": device.device_kind,
            "count": run.mesh.size,
            "processes": len({device.process_index for device in run.mesh.devices.flat}),
            "memory": memory,
        },
        "mesh": dict(run.mesh.shape),
        "model": {
            "parameters": parameters,
            "trained": trained,
            "compute_dtype": run.cfg.compute_dtype,
            "remat": run.cfg.remat,
            "attention": run.attention,
        },
        "programs": [{**dataclasses.asdict(need), "total": need.total} for need in needs],
        "needed": worst.total,
        "fits": fits,
        "checkpoint": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.state)),
        "export": parameters * np.dtype(run.cfg.dtype if export == "source" else export).itemsize,
        "host": host_bytes(run.state),
        "settings": [] if fits else settings(run, needs, memory),
    }


def measure(job: Job, platform: str) -> Need:
    """Compiles a program and reads what it needs; the compiler's RESOURCE_EXHAUSTED is a result too."""
    began = time.perf_counter()
    arguments = device_bytes(job.arguments)
    temporaries = output = code = 0
    found: dict[str, tuple[int, int]] = {}
    exhausted = False
    try:
        compiled = job.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted_bytes(str(error))
        if needed is None:
            raise
        exhausted, temporaries = True, max(needed - arguments, 0)
    else:
        stats = compiled.memory_analysis()
        arguments, code = stats.argument_size_in_bytes, stats.generated_code_size_in_bytes
        output = stats.output_size_in_bytes - stats.alias_size_in_bytes
        temporaries = stats.temp_size_in_bytes
        if platform == "tpu":
            # There temp_size counts what loops carry twice. The peak is the sum of the compiler's own allocations, the
            # one that it holds against the chip's memory.
            temporaries = max(stats.peak_memory_in_bytes - arguments - output, 0)
        found = collectives(compiled.as_text())
    seconds = time.perf_counter() - began
    besides = device_bytes(job.besides)
    return Need(job.name, job.rows, arguments, temporaries, output, code, besides, seconds, exhausted, found)


def device_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one device; an array without a sharding is there whole."""

    def one(leaf: Any) -> int:
        placed = getattr(leaf, "sharding", None)
        shape = leaf.shape if placed is None else placed.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def host_bytes(tree: Any) -> int:
    """Bytes of the arrays that one process, the one with the most, copies to its host to write a checkpoint."""
    totals: Counter[int] = Counter()
    for leaf in jax.tree.leaves(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        seen = set()
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            where = tuple((part.start, part.stop) for part in index)
            if where not in seen:  # copies of it are not written
                seen.add(where)
                totals[device.process_index] += size
    return max(totals.values())


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = re.compile(r"(?:HLO temporaries \(|Used |allocate |allocating |reserve |request for )([\d.]+) ?([KMGT]?)")


def exhausted_bytes(message: str) -> int | None:
    """The bytes that a RESOURCE_EXHAUSTED message says were asked for; None if it is no matter of a device's memory.

    While compiling for TPU that is what the whole program needs, arguments included; at run time the allocation that
    failed. (Too little of a core's own memory, vmem or smem, is a kernel's fault.)
    """
    if "RESOURCE_EXHAUSTED" not in message or re.search(r"memory space [vs]mem", message):
        return None
    found = _NUMBER.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def memory_of(device: Any) -> int:
    """Bytes that programs may use of a device; of a CPU device its part of the host's memory.

    Raises:
      ValueError: a kind of TPU whose memory is not known here.
    """
    if device.platform == "tpu":
        if device.device_kind not in HBM_GIB:
            raise ValueError(f"the memory of {device.device_kind!r} is not known; known are {', '.join(HBM_GIB)}")
        return int(HBM_GIB[device.device_kind] * GIB)
    if stats := device.memory_stats():
        return int(stats["bytes_limit"])
    from jaxalign.doctor import host_memory

    return host_memory() // jax.local_device_count()


# ---- what the compiled text says


_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of a computation: `kind` is the type of its result, `rest` what follows its opening bracket."""

    kind: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])


Computation = dict[str, Instruction]


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """What travels between devices in one run of a compiled program: {kind: (how often, bytes on each device)}.

    Bytes are those of the whole array that a device gathers, reduces or hands on. What stands in a loop counts as often
    as the loop runs: XLA says so where it knows (known_trip_count), else it follows from the loop's condition, counter
    below a constant. A loop whose end depends on data (chunks of scored tokens in the head, tokens of an answer) counts
    as one round. A collective that goes on beside other work stands in libtpu's text several times (a chain) and counts
    once.

    Args:
      text: the optimised HLO, `compiled.as_text()`.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = Instruction(*found.groups()[1:])
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    chains: dict[tuple[str, ...], tuple[int, int]] = {}  # (kind, channel, chain) -> (how often, bytes)

    def visit(name: str, times: int) -> None:
        here = computations[name]
        for instruction in here.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-done")
            if kind in COLLECTIVES:  # of a pair of -start and -done the latter has the result
                inputs = 0 if kind != opcode else sum(_bytes(here[x].kind) for x in instruction.operands if x in here)
                size = max(_bytes(instruction.kind), inputs)
                if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', instruction.rest):
                    key = (kind, *chain.groups())
                    chains[key] = min(times, chains.get(key, (times, size))[0]), size
                else:
                    counts[kind] += times
                    sizes[kind] += times * size
            elif opcode == "while":
                body = _attribute("body", instruction.rest)
                visit(body, times * _rounds(computations, here, instruction, body))
            elif not opcode.endswith(("-done", "-update")):
                for called, branches in _CALLED.findall(instruction.rest):
                    for other in re.findall(r"[\w.\-]+", called or branches):
                        visit(other, times)

    visit(entry, 1)
    for (kind, *_), (times, size) in chains.items():
        counts[kind] += times
        sizes[kind] += times * size
    return {kind: (counts[kind], sizes[kind]) for kind in COLLECTIVES if counts[kind]}


def _attribute(name: str, rest: str) -> str:
    found = re.search(rf"{name}=%?([\w.\-]+)", rest)
    assert found, f"an HLO instruction without {name}: {rest[:200]}"
    return found[1]


def _bytes(kind: str) -> int:
    """Bytes of all arrays in an HLO type, such as (bf16[8,128]{1,0}, u32[])."""
    bits = 0
    for dtype, width, dims in _ARRAY.findall(kind):
        elements = math.prod(int(n) for n in dims.split(",") if n)
        bits += elements * (8 if dtype == "pred" else int(width or 0))
    return bits // 8


def _rounds(computations: Mapping[str, Computation], here: Computation, loop: Instruction, body: str) -> int:
    """How often a while loop runs; 1 where that depends on data."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(found[1])
    condition = computations[_attribute("condition", loop.rest)]
    compare = list(condition.values())[-1]
    if compare.opcode != "compare" or "direction=LT" not in compare.rest:
        return 1
    counter, limit = (condition[name] for name in compare.operands)
    if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
        return 1
    index = int(re.findall(r"index=(\d+)", counter.rest)[0])
    carried = list(computations[body].values())[-1].operands[index]
    start = here[loop.operands[0]].operands[index] if here[loop.operands[0]].opcode == "tuple" else ""
    added = [_constant(computations[body], name) for name in computations[body][carried].operands]
    step = next((number for number in added if number), 1)
    first = _constant(here, start) or 0
    return max(-(-(int(limit.rest.partition(")")[0]) - first) // step), 0)


def _constant(computation: Computation, name: str) -> int | None:
    found = computation.get(name)
    return int(found.rest.partition(")")[0]) if found and found.opcode == "constant" else None


# ---- what to change where it does not fit


def settings(run: programs.Programs, needs: Sequence[Need], memory: int) -> list[dict[str, Any]]:
    """What to change first: at most two settings that would make the run fit, by a rough estimate; if none would, the
    one that helps most.

    The train step's temporaries are taken to be gradients (float32, under accumulation twice) and activations, which
    grow with the tokens of a micro-batch and with what `remat` keeps of them. Scoring and evaluation grow with its
    tokens alone, prefill and decode stay.
    """
    config, cfg = run.config, run.cfg
    splits, shape = config.gradient_accumulation_steps, run.mesh.shape
    weights = device_bytes(run.state.params)
    reference = device_bytes(run.reference) if run.live_reference and run.sync is None else 0

    def estimate(*, into: int = splits, remat: str = cfg.remat, data: int = 1, freed: int = 0) -> int:
        """The most over programs; `data`: how many copies of the weights become slices of one."""
        kept = [kept_bytes(cfg, policy, config.max_length) for policy in (remat, cfg.remat)]
        totals = []
        for need in needs:
            temporaries = float(need.temporaries)
            if need.name == "train step":
                gradients = min(temporaries, weights * (1 + (splits > 1)))
                activations = (temporaries - gradients) * splits / into * kept[0] / kept[1]
                temporaries = activations + weights * (1 + (into > 1)) / data
            elif need.name.startswith("score") or (need.name == "evaluate" and config.eval.batch_size is None):
                temporaries *= splits / into
            totals.append(int((need.total - need.temporaries - freed) / data + temporaries))
        return max(totals)

    more = [
        n
        for n in range(splits + 1, config.batch_size + 1)
        if config.batch_size % n == 0
        and run.objective.width * config.batch_size // n % (shape["data"] * shape["fsdp"]) == 0
    ]
    found = [(f"gradient_accumulation_steps={n}", estimate(into=n)) for n in more]
    if cfg.remat != "full":
        found.append(("model.remat=full", estimate(remat="full")))
    if shape["data"] > 1:
        found.append(("mesh.data=1 mesh.fsdp=-1", estimate(data=shape["data"])))
    if reference:
        found.append(("reference.mode=cached", estimate(freed=reference)))
    together = [f"gradient_accumulation_steps={n}" for n in more[-1:]]
    together += ["model.remat=full"] * (cfg.remat != "full") + ["reference.mode=cached"] * bool(reference)
    if len(together) > 1:
        size = estimate(into=more[-1] if more else splits, remat="full", freed=reference)
        found.append((" ".join(together), size))
    firsts: dict[str, tuple[str, int]] = {}  # of each key the first value that fits
    for setting, size in found:
        if size <= memory:
            firsts.setdefault(setting.partition("=")[0], (setting, size))
    chosen = list(firsts.values())[:2] or sorted(found, key=lambda one: one[1])[:1]
    return [{"setting": setting, "estimate": size, "fits": size <= memory} for setting, size in chosen]


def kept_bytes(cfg: ModelConfig, remat: str, length: int) -> float:
    """Bytes of one token that a backward pass finds kept, roughly: of every layer what `remat` keeps, and one layer's
    all. Attention scores count as if there were no kernel."""
    width, mlp = cfg.hidden_size, cfg.intermediate_size
    queries, keys = cfg.num_attention_heads * cfg.head_dim, 2 * cfg.num_key_value_heads * cfg.head_dim
    products = 2 * width + 2 * queries + keys + 2 * mlp
    scores = cfg.num_attention_heads * length
    kept = {"full": width, "dots_no_batch": products, "dots": products + 2 * scores}
    everything = 2 * products + 4 * scores
    return (cfg.num_hidden_layers * kept.get(remat, everything) + everything) * np.dtype(cfg.compute_dtype).itemsize


# ---- how it is said


def show(report: Mapping[str, Any], console: Any) -> None:
    """Prints a report of `preflight` to a rich console."""
    from rich.table import Table

    device, model = report["device"], report["model"]
    axes = " x ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "one device"
    attention, why = model["attention"]
    trained = f" and {model['trained']:,} trained beside them" if model["trained"] < model["parameters"] else ""
    console.print(
        f"{device['count']} x {device['kind']} ({axes}), {device['processes']} host(s); {model['parameters']:,} "
        f"weights{trained}, {model['compute_dtype']}, remat {model['remat']}, attention {attention} ({why})",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="memory of each device")
    table.add_column("program")
    for heading in ("rows", "arguments", "temporaries", "output", "code", "alive besides", "all", "compiled"):
        table.add_column(heading, justify="right")
    for need in report["programs"]:
        names = ("arguments", "temporaries", "output", "code", "besides", "total")
        compiled = "out of memory" if need["exhausted"] else f"{need['seconds']:.0f} s"
        rows, length = need["rows"]
        table.add_row(need["name"], f"{rows} x {length:,}", *(_size(need[name]) for name in names), compiled)
    sent = Table(title="sent between devices in one call, bytes of each device")
    sent.add_column("program")
    for kind in COLLECTIVES:
        sent.add_column(kind, justify="right")
    for need in report["programs"]:
        found = need["collectives"]
        cells = [f"{_size(found[kind][1])} in {found[kind][0]:,}" if kind in found else "" for kind in COLLECTIVES]
        sent.add_row(need["name"], *cells)
    verdict = "fits" if report["fits"] else "does not fit"
    lines = [
        f"{verdict}: {_size(report['needed'])} of a device's {_size(device['memory'])} "
        f"({report['needed'] / device['memory']:.0%})",
        f"a checkpoint {_size(report['checkpoint'])}, the export {_size(report['export'])}; memory of each process for "
        f"a checkpoint that is being written {_size(report['host'])}",
    ]
    for one in report["settings"]:
        outcome = "should fit" if one["fits"] else "still too much: it needs more devices, too"
        lines.append(f"try {_flags(one['setting'])}: about {_size(one['estimate'])}, {outcome}")
    if not (report["fits"] or report["settings"]):
        lines.append("no setting that is known here would help: it needs more devices")
    console.print(table)
    if any(need["collectives"] for need in report["programs"]):
        console.print(sent)
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def _flags(setting: str) -> str:
    return " ".join(f"--config.{part}" for part in setting.split())


def _size(size: float) -> str:
    """Bytes in MB or GB (10**6, 10**9)."""
    return f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e9:.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def explain(run: programs.Programs, error: BaseException) -> str:
    """What to say of a RESOURCE_EXHAUSTED at run time: the table of this run, and a setting to try.

    Compiles the run's programs, which are in the compilation cache by then. Call under `jax.set_mesh(run.mesh)`.
    """
    from rich.console import Console

    report = preflight(run)
    if report["fits"]:  # by the table; what it does not know of has to fit too
        needs = [Need(**{name: x for name, x in need.items() if name != "total"}) for need in report["programs"]]
        report = {**report, "settings": settings(run, needs, int(0.8 * report["needed"]))}
    report = {**report, "settings": report["settings"][:1]}
    text = io.StringIO()
    asked = exhausted_bytes(str(error))
    print(f"out of memory{f' when {_size(asked)} were asked for' if asked else ''}:", file=text)
    show(report, Console(file=text, width=120))
    return text.getvalue()


# ---- the command


def tpu_devices(topology: str) -> list[Any]:
    """Devices of TPUs that are not here, for the compiler alone. To be called before JAX has looked for devices.

    Args:
      topology: generation and chips, such as v5p:2x2x2, v5e:4x4, v5e:1x1.

    Raises:
      ValueError: no such topology, or libtpu is missing or not the version that the installed jax asks for.
    """
    match = re.fullmatch(r"\w+:(\d+)x(\d+)(x\d+)?", topology)
    if not match:
        raise ValueError(f"--topology={topology}: expected a generation and its chips, such as v5p:2x2x2 or v5e:4x4")
    check_libtpu()
    # Otherwise it asks the metadata server of Google's cloud which machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"chips_per_host_bounds": [min(2, int(match[1])), min(2, int(match[2])), 1]}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device, as on the VMs
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: {first_line(error)}") from error


def check_libtpu() -> None:
    """Raises ValueError unless the libtpu that the installed jax asks for is installed."""
    pins = [re.match(r"libtpu==([\d.]+\d)", text) for text in importlib.metadata.requires("jax") or ()]
    wanted = next(pin[1] for pin in pins if pin)
    install = f'jax {jax.__version__} asks for libtpu {wanted}: pip install "jaxalign[tpu]"'
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology needs the TPU compiler, libtpu, which is not installed; {install}")
    there = importlib.metadata.version("libtpu")
    if not f"{there}.".startswith(f"{wanted}."):
        raise ValueError(f"libtpu {there} is installed, but {install}")


def programs_of(config: ConfigDict, mesh: jax.sharding.Mesh) -> programs.Programs:
    """The programs of a config's run on a mesh, its model's shape read from config.json or GGUF metadata alone."""
    platform = mesh.devices.flat[0].platform
    cfg = programs.model_config(config, path=config.model.path, platform=platform)
    programs.check_model(cfg, config, None)
    ref_path = config.reference.path
    ref_cfg = cfg if ref_path is None else programs.model_config(config, path=ref_path, platform=platform)
    return programs.Programs(config, mesh, cfg, ref_cfg, steps=config.steps or STEPS)


def make_mesh(config: ConfigDict, devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh that the run would make of `devices`: neighbours on it are neighbours in the chips' network."""
    from jax.experimental import mesh_utils

    shape = sharding.resolve_sizes(config.mesh.to_dict(), len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return sharding.make_mesh(**config.mesh.to_dict(), devices=list(grid.flat))


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring for its exit status."""
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "TPUs to compile for, such as v5p:2x2x2 or v5e:4x4.", flag_values=values)
    flags.DEFINE_bool("here", False, "Compile for the devices of this machine.", flag_values=values)
    flags.DEFINE_string("model_config", None, "A config.json to take in place of model.path's.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=values)
    config = config_lib.parse(argv, values)
    try:
        if (values.topology is None) != values.here:
            raise ValueError("give one of --topology=NAME (such as v5p:2x2x2) and --here")
        devices = jax.devices() if values.here else tpu_devices(values.topology)
        if values.model_config is not None:
            file = paths.at(values.model_config)
            config.model.path, config.model.random = None, ConfigDict(paths.read_json(file))
        config_lib.validate(
            {**config.to_dict(), "tokenizer": {"path": config.tokenizer.path or "bytes"}}, n_devices=len(devices)
        )
        mesh = make_mesh(config, devices)
        with sharding.use_mesh(mesh):
            report = preflight(programs_of(config, mesh))
    except ValueError as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if values.json:
        print(json.dumps(report))
    else:
        from rich.console import Console

        show(report, Console(width=None if sys.stdout.isatty() else 120))
    raise SystemExit(0 if report["fits"] else 1)


if __name__ == "__main__":
    main()
