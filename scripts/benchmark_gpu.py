"""Training speed and memory on one GPU: jaxalign beside TRL, the price of packing, and whether the device waits.

    python scripts/benchmark_gpu.py --rounds=2 --minutes=9     # again and again until it says that nothing is left
    python scripts/benchmark_gpu.py --only='^1.5b/dpo' --tune  # every setting instead of the first one that fits
    python scripts/benchmark_gpu.py --only='^(packing|profile)'
    python scripts/benchmark_gpu.py --render benchmarks/nvidia-h100-80gb-hbm3.json

Every measurement is a process of its own, because each takes the whole card; rounds alternate between the systems, and
what is in benchmarks/<card>.json is not measured again. That file keeps every step's seconds with versions, date and
command; all figures in the documents are rendered from it (see tests/test_benchmark_gpu.py).

A row is a model (config numbers of Qwen2.5-0.5B, Qwen2.5-1.5B, Llama-3-8B; random weights), an objective and a length.
A step takes 16,384 random tokens in whole rows without padding, the same for both systems: products in bfloat16, the
gradient clipped to norm 1, learning rate 1e-6.
  dpo    sigmoid DPO of pairs, the second half of a row is the completion, the reference scored live in the step from a
         copy in bfloat16.
  sft    the mean NLL of all tokens, with entropy and accuracy as TRL logs them; the same train step.
0.5b and 1.5b: float32 weights and AdamW (fused in torch). 8b: such a state takes 128 GB and fits no card, so its
weights are bfloat16 and the optimizer is adafactor, on both sides.

A setting is CHECKPOINTING/ACCUMULATION: what of the forward pass is kept (jaxalign's model.remat; for TRL none, or full
for gradient checkpointing), and the number of micro-batches. They are tried from the expected fastest to the smallest;
the first that fits is measured, with --tune all are, and the fastest counts. TRL runs its own trainer with bf16, fused
head, SDPA or, where flash-attn is installed, FlashAttention 2, Liger's kernels where installed, and under --tune
torch.compile too (".../compile"). TRL needs `pip install torch transformers trl==1.16.0 accelerate`.

MFU counts the model's own work (metrics.forward_flops: matrix products of real tokens, the head for scored tokens,
causal attention's half; nothing twice because of checkpointing): 3 forward passes, and 1 of the reference in DPO, over
the data sheet's dense bfloat16 peak. Peak memory is what each allocator counts: device.memory_stats()
["peak_bytes_in_use"] and torch.cuda.max_memory_allocated, of the process's whole life. A step's time ends when the
device has finished it.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# This file is also TRL's worker, whose environment need not hold jax: only numpy is imported above.

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(ROOT))  # jaxalign need not be installed

PRINTED = ("jax", "trl", "torch", "transformers")  # versions in the table's title

BETA, LEARNING_RATE, CLIP = 0.1, 1e-6, 1.0
OBJECTIVES = ("dpo", "sft")
SYSTEMS = ("jaxalign", "trl")
# In bfloat16 policy and reference may come from two programs.
FIRST_LOSS_TOLERANCE = {"dpo": 0.05, "sft": 0.3}

QWEN = dict(model_type="qwen2", vocab_size=151936, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
            hidden_act="silu", initializer_range=0.02, max_position_embeddings=32768)  # fmt: skip
LLAMA = dict(model_type="llama", vocab_size=128256, rms_norm_eps=1e-5, rope_theta=5e5, hidden_act="silu",
             initializer_range=0.02, max_position_embeddings=8192)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model by the numbers of its config.json, and how it is trained."""

    title: str
    config: dict[str, Any]
    settings: dict[str, tuple[str, ...]]  # of each system, the expected fastest first
    dtype: str = "float32"  # of the weights
    optimizer: str = "adamw"
    lengths: tuple[int, ...] = (2048, 8192)
    tokens: int = 16384  # of a step


_KEEP = ("none/1", "dots_no_batch/1", "full/1", "full/2", "full/4")
_TRL = ("none/1", "full/1", "full/2", "full/4")
SHAPES = {
    "0.5b": Shape(
        "Qwen2.5-0.5B",
        {**QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2},
        {"jaxalign": _KEEP, "trl": _TRL},
    ),
    "1.5b": Shape(
        "Qwen2.5-1.5B",
        {**QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2},
        {"jaxalign": _KEEP[1:], "trl": _TRL},
    ),
    "8b": Shape(
        "Llama-3-8B",
        {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "tie_word_embeddings": False},
        {"jaxalign": _KEEP[2:], "trl": _TRL[1:]},
        dtype="bfloat16",
        optimizer="adafactor",
    ),
    # Of the tests, on a CPU.
    "tiny": Shape(
        "tiny",
        {**LLAMA, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
        {"jaxalign": ("none/1", "full/2"), "trl": ("none/1", "full/2")},
        lengths=(32, 64),
        tokens=256,
    ),
}  # fmt: skip
# The run of --only=profile: Llama-3.2-1B's numbers.
ONE_B = {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
PROFILED = {"1b": (ONE_B, 2048, 4), "tiny": (SHAPES["tiny"].config, 32, 4)}  # config, tokens of a row, pairs of a step
# Rows, heads, key/value heads and head size of the packing measurement: 16,384 tokens of Llama-3-8B, 4 segments a row.
PACKED = {"8b": (16384, 32, 8, 128), "tiny": (256, 4, 2, 16)}
SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table for one system."""

    shape: str
    objective: str
    length: int
    system: str

    @property
    def key(self) -> str:
        return f"{self.shape}/{self.objective}/{self.length}/{self.system}"

    @property
    def rows(self) -> int:
        return SHAPES[self.shape].tokens // self.length

    @property
    def first_scored(self) -> int:
        """The first position of a row whose log-prob counts."""
        return self.length // 2 if self.objective == "dpo" else 1

    @property
    def first_loss(self) -> float:
        """What random weights begin with: in SFT logits are normal, with the head's variance times the hidden size."""
        config = SHAPES[self.shape].config
        variance = config["initializer_range"] ** 2 * config["hidden_size"]
        return math.log(2) if self.objective == "dpo" else math.log(config["vocab_size"]) + variance / 2

    def settings(self) -> list[str]:
        """Settings that split the batch into whole examples."""
        examples = self.rows // (2 if self.objective == "dpo" else 1)
        return [s for s in SHAPES[self.shape].settings[self.system] if examples % int(s.split("/")[1]) == 0]


def make_tokens(case: Case, steps: int) -> np.ndarray:
    """Random ids [steps, rows, length] int32; in DPO rows 2i and 2i + 1 are a pair with one prompt."""
    vocab_size = SHAPES[case.shape].config["vocab_size"]
    tokens = np.random.default_rng(0).integers(17, vocab_size, (steps, case.rows, case.length), dtype=np.int32)
    if case.objective == "dpo":
        tokens[:, 1::2, : case.first_scored] = tokens[:, 0::2, : case.first_scored]
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Workers: each measures one thing in one setting and returns what it found.


def jaxalign_worker(case: Case, setting: str, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from jaxalign import models, objectives, optim, reference, sharding
    from jaxalign.metrics import reduce
    from jaxalign.step import init_state, make_train_step

    shape = SHAPES[case.shape]
    remat, accumulation = setting.split("/")
    cfg = dataclasses.replace(models.config_from_hf(shape.config), compute_dtype="bfloat16", remat=remat)
    schedule = optim.make_schedule("constant", LEARNING_RATE, steps=steps)
    tx = optim.make_optimizer(shape.optimizer, schedule=schedule)
    objective = objectives.pairwise(cfg, beta=BETA) if case.objective == "dpo" else objectives.make(cfg, "sft")
    micro_batches = int(accumulation)
    train_step = jax.jit(
        make_train_step(objective, tx, gradient_accumulation_steps=micro_batches, max_grad_norm=CLIP), donate_argnums=0
    )
    score = jax.jit(reference.make_score(cfg, micro_batches=micro_batches))
    positions = np.arange(case.length, dtype=np.int32)
    same = {
        "positions": np.broadcast_to(positions, (case.rows, case.length)),
        "mask": np.broadcast_to(positions >= case.first_scored, (case.rows, case.length)),
        "lengths": np.full(case.rows, case.length, np.int32),
    }
    device = jax.devices()[0]
    with sharding.use_mesh(sharding.make_mesh(devices=[device])):
        init = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(shape.dtype), models.init(cfg, key)))
        params = init(jax.random.key(0))
        n_params = sum(x.size for x in jax.tree.leaves(params))
        ref_params = None
        if case.objective == "dpo":
            ref_params = jax.jit(lambda params: reference.frozen_copy(cfg, params))(params)
        state = jax.jit(lambda params: init_state(params, tx), donate_argnums=0)(params)
        del params
        seconds, losses = [], []
        for tokens in make_tokens(case, steps):
            start = time.perf_counter()
            batch = jax.device_put({**same, "tokens": tokens})
            if ref_params is not None:
                batch["ref_logps"] = score(ref_params, batch)
            state, metrics = train_step(state, None, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
            losses.append(reduce(metrics)["loss"])
    assert jnp.dtype(shape.dtype) == jax.tree.leaves(state.params)[0].dtype
    return {
        "seconds": seconds,
        "losses": losses,
        "n_params": n_params,
        "peak_bytes": peak_bytes(device),
        "device": device_name(device),
        "versions": versions("jaxalign", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    }


def trl_worker(case: Case, setting: str, steps: int) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    shape = SHAPES[case.shape]
    checkpointing, accumulation, *compiled = setting.split("/")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    fields = {name: value for name, value in shape.config.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(shape.config["model_type"], **fields)
    attention = "flash_attention_2" if on_gpu and importlib.util.find_spec("flash_attn") else "sdpa"

    def build(dtype: str) -> Any:
        with device:
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=attention
            )

    torch.manual_seed(0)
    model = build(shape.dtype)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    examples = case.rows // (2 if case.objective == "dpo" else 1)
    kwargs = dict(
        per_device_train_batch_size=examples // int(accumulation),
        gradient_accumulation_steps=int(accumulation),
        max_length=None,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if shape.optimizer == "adamw" else shape.optimizer,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        bf16=True,
        tf32=True if on_gpu else None,
        use_cpu=not on_gpu,
        gradient_checkpointing=checkpointing == "full",
        torch_compile=bool(compiled),
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        dataloader_pin_memory=on_gpu,
        logging_nan_inf_filter=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    seconds: list[float] = []
    losses: list[float] = []

    class Timer(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.losses = []
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)
            losses.append(sum(loss.item() for loss in trainer.losses) / trainer.parts)

    class Kept:
        """Keeps the micro-batches' losses; DPO's are means, SFT's are shares of the whole batch's mean."""

        parts = int(accumulation) if case.objective == "dpo" else 1

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
            self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

    class DPO(Kept, DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the rows are token ids already; the collator takes them from here

    class SFT(Kept, SFTTrainer):
        pass

    pad_only = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )
    tokens = make_tokens(case, steps)
    with tempfile.TemporaryDirectory() as folder:
        if case.objective == "dpo":
            pairs, split = tokens.reshape(-1, 2, case.length), case.first_scored
            columns = {
                "prompt_ids": pairs[:, 0, :split],
                "chosen_ids": pairs[:, 0, split:],
                "rejected_ids": pairs[:, 1, split:],
            }
            ref_model = build("bfloat16")
            ref_model.load_state_dict(model.state_dict())
            dataset = Dataset.from_dict({name: x.tolist() for name, x in columns.items()})
            args = DPOConfig(output_dir=folder, loss_type=["sigmoid"], beta=BETA, **kwargs)
            trainer = DPO(model, ref_model, args=args, train_dataset=dataset, processing_class=pad_only,
                          callbacks=[Timer()])  # fmt: skip
        else:
            rows = tokens.reshape(-1, case.length).tolist()
            dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
            args = SFTConfig(output_dir=folder, dataset_kwargs={"skip_prepare_dataset": True}, **kwargs)
            trainer = SFT(model, args=args, train_dataset=dataset, processing_class=pad_only, callbacks=[Timer()])
        trainer.train()
    return {
        "seconds": seconds,
        "losses": losses,
        "n_params": n_params,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident_bytes(),
        "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "attention": attention,
        "liger": kwargs["use_liger_kernel"],
        "versions": versions("trl", "torch", "transformers", "accelerate"),
    }


def packing_worker(shape: str, length: int, steps: int) -> dict[str, Any]:
    """Milliseconds of attention, forward and backward, and its temporaries: whole rows, and 4 segments a row."""
    import jax
    import jax.numpy as jnp

    from jaxalign import models, sharding
    from jaxalign.models import attention, flash

    tokens, heads, kv_heads, head_dim = PACKED[shape]
    rows = tokens // length
    device = jax.devices()[0]
    cfg = dataclasses.replace(
        models.config_from_hf({**SHAPES[shape].config, "head_dim": head_dim}), compute_dtype="bfloat16"
    )
    row = np.repeat(np.arange(1, SEGMENTS + 1, dtype=np.int32), length // SEGMENTS)
    segments = np.broadcast_to(row, (rows, length))
    found: dict[str, Any] = {}
    with sharding.use_mesh(sharding.make_mesh(devices=[device])):
        kernel, reason = attention.choose(cfg)
        shapes = ((rows, length, heads, head_dim), *[(rows, length, kv_heads, head_dim)] * 2)
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=False))
        weight = jax.random.normal(keys[3], shapes[0], jnp.bfloat16)

        def xla(q: Any, k: Any, v: Any, segments: Any) -> Any:
            distance = attention.distance(length, length)
            return attention.attend(q, k, v, attention.attention_mask(distance, segments, segments))

        def flashed(q: Any, k: Any, v: Any, segments: Any) -> Any:
            return flash.attend(kernel, q, k, v, segments, window=None)

        ways: dict[str, Callable[..., Any]] = {"xla": xla} if kernel == "xla" else {kernel: flashed, "xla": xla}
        for (name, way), packed in itertools.product(ways.items(), (False, True)):

            def loss(q: Any, k: Any, v: Any, segments: Any, way: Callable[..., Any] = way) -> Any:
                return (way(q, k, v, segments) * weight).astype(jnp.float32).sum()

            inputs = (q, k, v, jnp.asarray(segments) if packed else None)
            label = f"{name}, {'packed' if packed else 'whole rows'}"
            try:
                compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()
                times = []
                for _ in range(steps):
                    start = time.perf_counter()
                    jax.block_until_ready(compiled(*inputs))
                    times.append(1e3 * (time.perf_counter() - start))
                memory = compiled.memory_analysis()
                found[label] = {"milliseconds": times, "temporary_bytes": memory.temp_size_in_bytes}
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                found[label] = {"out_of_memory": first_line(error)}
    return {
        "ways": found,
        "kernel": kernel,
        "reason": reason,
        "device": device_name(device),
        "versions": versions("jaxalign", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    }


def profile_worker(shape: str, steps: int) -> dict[str, Any]:
    """Steps of the real loop (train.Training) under JAX's profiler: what share of the time the device had no work."""
    import jax

    from jaxalign import build, run_folder, sharding, train
    from jaxalign import config as config_lib
    from jaxalign.data.batching import prefetch
    from jaxalign.signals import Stopper

    model, length, pairs = PROFILED[shape]
    first = 4
    rows = [
        {"prompt": f"Say {i}.", "chosen": "a" * length + str(i), "rejected": "b" * length + str(i)}
        for i in range(pairs * 4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = config_lib.base()
        config.workdir = f"{folder}/run"
        config.model.path = None
        config.model.random = model
        config.model.remat = "full" if shape != "tiny" else "none"
        config.tokenizer.path = "bytes"
        config.data.path = None
        config.data.cache_dir = f"{folder}/data"
        config.data.buckets = (length,)
        config.data.on_long = "truncate"
        config.max_length = length
        config.batch_size = pairs
        config.steps = first + steps + 2
        config.samples.prompts = 0
        config.reference.mode = "live"
        config.log.profile_steps = (first, first + steps - 1)
        config = config_lib.validate(config, n_devices=1, has_dataset=True)
        path = run_folder.check(config)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        data = build.load_data(config, path / "dropped.jsonl", rows)
        with Stopper() as stopper, sharding.use_mesh(mesh), run_folder.open_checkpoints(config, path) as checkpoints:
            pieces = build.Run(config, mesh, data)
            with train.Training(config, path, pieces, stopper, checkpoints) as training:
                training.begin()
                # The body of its loop, without the checkpoint at the end.
                with contextlib.closing(prefetch(pieces.source, 0, config.steps)) as batches:
                    for n, batch in enumerate(batches, 1):
                        training.profile(n)
                        training.step(n, batch)
                training.flush()
        (trace,) = Path(path, "profile").rglob("*.xplane.pb")
        events = device_events(jax.profiler.ProfileData.from_file(str(trace)), jax.default_backend())
    return {
        "steps": steps,
        "model": f"Llama-3.2-1B's numbers, {pairs} pairs of {length} tokens a side" if shape == "1b" else shape,
        **idle(whole_steps(events)),
        "device": device_name(mesh.devices.flat[0]),
        "versions": versions("jaxalign", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin"),
    }


Event = tuple[float, float, str]


def device_events(profile: Any, platform: str) -> list[Event]:
    """(start, end, program) of all that the device did, in seconds, from jax.profiler.ProfileData."""
    events = []
    for plane in profile.planes:
        if not plane.name.startswith("/host:CPU" if platform == "cpu" else "/device:GPU"):
            continue
        for line in plane.lines:
            # A GPU's other lines show the same work again, by step and by program.
            if platform != "cpu" and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                program = dict(event.stats).get("hlo_module")
                if program is not None or platform != "cpu":  # on a GPU also copies, which belong to no program
                    start = event.start_ns * 1e-9
                    events.append((start, start + event.duration_ns * 1e-9, str(program or "copies")))
    return sorted(events)


def whole_steps(events: Sequence[Event]) -> list[Event]:
    """Events from the second run on of the program that works longest: when the trace began, the device had to wait.

    Raises:
      ValueError: there are not three runs of one program.
    """
    seconds: dict[str, float] = {}
    for start, end, program in events:
        seconds[program] = seconds.get(program, 0.0) + end - start
    longest = max(seconds, key=seconds.__getitem__, default=None)
    names = [None, *(program for _, _, program in events if program != "copies")]
    work = [event for event in events if event[2] != "copies"]
    begins = [event for event, before in zip(work, names, strict=False) if event[2] == longest != before]
    if len(begins) < 3:
        raise ValueError(f"the trace holds {len(events)} events of {sorted(seconds)}, expected three steps or more")
    return list(events[events.index(begins[1]) :])


def idle(events: Sequence[Event]) -> dict[str, float]:
    """Where nothing ran between the first and the last event, as shares of that time, all in all and between programs.

    Returns:
      seconds (from first to last), idle_share, between_programs_share, longest_gap_ms.
    """
    begin, busy_until, program = events[0]
    gaps, between = [0.0], 0.0
    for start, end, other in events:
        if start > busy_until:
            gaps.append(start - busy_until)
            between += (start - busy_until) if other != program else 0.0
        if end >= busy_until:
            busy_until, program = end, other
    whole = busy_until - begin
    return {
        "seconds": whole,
        "idle_share": sum(gaps) / whole,
        "between_programs_share": between / whole,
        "longest_gap_ms": 1e3 * max(gaps),
    }


def device_name(device: Any) -> str:
    return device.device_kind


def peak_bytes(device: Any) -> int:
    """The most that was allocated on the device; of a CPU, what was resident."""
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use", resident_bytes())


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(ImportError):  # PackageNotFoundError: a checkout on the path, or the other CUDA
            found[name] = version(name)
    return found


def is_out_of_memory(error: BaseException) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Does what the parent asks for in this process."""
    if job["kind"] == "packing":
        return packing_worker(job["shape"], job["length"], job["steps"])
    if job["kind"] == "profile":
        return profile_worker(job["shape"], job["steps"])
    case = Case(**job["case"])
    worker = jaxalign_worker if case.system == "jaxalign" else trl_worker
    try:
        return worker(case, job["setting"], job["steps"])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": first_line(error)}


# ---------------------------------------------------------------------------------------------------------------------
# The parent: no device of its own.


def start(job: dict[str, Any], python: str, *, platform: str) -> dict[str, Any]:
    """Runs one job in a process of its own and returns what it found.

    Raises:
      RuntimeError: the process failed; the end of what it said is in the message.
    """
    # The train command's own: programs are run from it, so it is the user's alone.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign" / "compiled"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu" if platform == "cpu" else "cuda,cpu",
        # JAX takes 75% by default: https://docs.jax.dev/en/latest/gpu_memory_allocation.html
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
        # Rounds after the first need not compile (and autotune) again.
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if platform == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("wb") as file:
            command = [python, __file__, f"--worker={json.dumps(job)}", f"--result={result}"]
            status = subprocess.run(command, stdout=file, stderr=file, env=env).returncode
        if status or not result.exists():
            raise RuntimeError(f"a worker ended with status {status}:\n{log.read_text(errors='replace')[-4000:]}")
        return json.loads(result.read_text())


class Results:
    """What was measured on one card: `benchmarks/<card>.json`, written after every measurement."""

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"card": None, "rows": {}, "packing": {}, "profile": {}}
        self.failed: dict[str, str] = {}
        if path.exists():
            self.data = json.loads(path.read_text())

    def fail(self, what: str, error: Exception) -> None:
        """Something could not be measured; the rest goes on, as a lent card does not wait."""
        self.failed[what] = str(error)
        print(f"{what} failed: {error}", file=sys.stderr, flush=True)

    def add(self, found: dict[str, Any]) -> dict[str, Any]:
        """`found` with its date and the command; the card's name is taken from it or compared with it."""
        card = found.get("device")
        if card is not None:
            if self.data["card"] not in (None, card):
                raise ValueError(f"{self.path} is of {self.data['card']!r}, this card is {card!r}: name another --json")
            self.data["card"] = card
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {**found, "date": now, "command": "python " + " ".join(["scripts/benchmark_gpu.py", *sys.argv[1:]])}

    def save(self) -> None:
        if self.data["card"] is not None:  # something fitted
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def measure(case: Case, rounds: int, results: Results, python: str, args: argparse.Namespace) -> bool:
    """One more process for this row, if it has fewer than `rounds`: in the first setting that fits, or in each.

    Returns whether there was something to do.
    """
    row = results.data["rows"].setdefault(case.key, {})
    settings = args.settings.get(case.system) or case.settings()
    if args.tune and case.system == "trl" and not args.settings.get("trl"):
        settings = [*settings, *(f"{setting}/compile" for setting in settings)]
    for setting in settings:
        entry = row.setdefault(setting, {"rounds": []})
        if "out_of_memory" in entry or f"{case.key} {setting}" in results.failed:
            continue
        if len(entry["rounds"]) >= rounds:
            if args.tune:
                continue
            return False
        job = {"kind": "row", "case": dataclasses.asdict(case), "setting": setting, "steps": args.warmup + args.steps}
        try:
            found = results.add(start(job, python, platform=args.platform))
            if "out_of_memory" in found:
                row[setting] = found
                print(f"{case.key:24} {setting:18} does not fit: {found['out_of_memory'][:100]}", flush=True)
            else:
                check(case, found, results)
                entry["rounds"].append({**found, "warmup": args.warmup})
                seconds = statistics.median(found["seconds"][args.warmup :])
                print(f"{case.key:24} {setting:18} {seconds:8.4f} s/step", flush=True)
        except RuntimeError as error:
            results.fail(f"{case.key} {setting}", error)
        results.save()
        return True
    return False


def check(case: Case, found: dict[str, Any], results: Results) -> None:
    """Raises RuntimeError where a system did not compute what the row says."""
    gap = abs(found["losses"][0] - case.first_loss)
    if not gap < FIRST_LOSS_TOLERANCE[case.objective]:
        raise RuntimeError(f"{case.key}: the first loss is {found['losses'][0]}, expected about {case.first_loss:.4f}")
    for system in SYSTEMS:
        for entry in results.data["rows"].get(dataclasses.replace(case, system=system).key, {}).values():
            if any(other["n_params"] != found["n_params"] for other in entry.get("rounds", ())):
                raise RuntimeError(f"{case.key}: {found['n_params']} weights, and {system} has another number of them")


def jobs(results: Results, args: argparse.Namespace) -> Iterable[Callable[[], bool]]:
    """What can be measured, in order: functions to be called until they find nothing more to do."""
    wanted = re.compile(args.only)
    pythons = {"jaxalign": sys.executable, "trl": args.trl_python}
    shapes = ["tiny"] if args.shapes == "tiny" else [name for name in SHAPES if name != "tiny"]
    for shape, objective in itertools.product(shapes, OBJECTIVES):
        for length in SHAPES[shape].lengths:
            cases = [Case(shape, objective, length, system) for system in SYSTEMS if pythons[system]]
            for rounds, case in itertools.product(range(1, args.rounds + 1), cases):
                if wanted.search(case.key):
                    yield lambda case=case, n=rounds: measure(case, n, results, pythons[case.system], args)

    def once(kind: str, name: str, job: dict[str, Any]) -> bool:
        if name in results.data[kind] or f"{kind}/{name}" in results.failed:
            return False
        try:
            found = results.add(start({"kind": kind, **job}, sys.executable, platform=args.platform))
            results.data[kind][name] = found
            print(f"{kind}/{name} done", flush=True)
        except RuntimeError as error:
            results.fail(f"{kind}/{name}", error)
        results.save()
        return True

    packed, profiled = ("tiny", "tiny") if args.shapes == "tiny" else ("8b", "1b")
    for length in SHAPES[packed].lengths:
        if wanted.search(f"packing/{length}"):
            job = {"shape": packed, "length": length, "steps": args.warmup + args.steps}
            yield lambda length=length, job=job: once("packing", str(length), job)
    if wanted.search(f"profile/{profiled}"):
        yield lambda: once("profile", profiled, {"shape": profiled, "steps": args.steps})


# ---------------------------------------------------------------------------------------------------------------------
# The table: everything in it is computed here from the file.


def figures(key: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """Setting, tokens/s, MFU and peak bytes of a row's fastest setting; {"does_not_fit": text}; None: not measured."""
    from jaxalign import metrics, models

    shape_name, objective, length, system = key.split("/")
    case = Case(shape_name, objective, int(length), system)
    shape = SHAPES[shape_name]
    best: dict[str, Any] | None = None
    for setting, entry in row.items():
        if not entry.get("rounds"):
            continue
        medians = [statistics.median(found["seconds"][found["warmup"] :]) for found in entry["rounds"]]
        seconds = statistics.median(medians)
        if best is None or seconds < best["seconds"]:
            peak = max(found["peak_bytes"] for found in entry["rounds"])
            best = {"setting": setting, "seconds": seconds, "peak_bytes": peak, "rounds": len(medians),
                    "device": entry["rounds"][0]["device"]}  # fmt: skip
    if best is None:
        failures = [entry["out_of_memory"] for entry in row.values() if "out_of_memory" in entry]
        return {"does_not_fit": failures[-1]} if failures else None
    lengths = np.full(case.rows, case.length)
    cfg = models.config_from_hf(shape.config)
    passes = 4 if objective == "dpo" else 3
    positions = np.concatenate([np.arange(n) for n in lengths])
    flops = passes * metrics.forward_flops(cfg, positions, case.rows * (case.length - case.first_scored))
    best["tokens_per_second"] = shape.tokens / best["seconds"]
    best["mfu"] = metrics.mfu(flops, best["seconds"], device_kind=best["device"], n_devices=1)
    return best


def render(path: Path) -> str:
    """The tables of a results file, as Markdown."""
    data = json.loads(path.read_text())
    records = [found for row in data["rows"].values() for entry in row.values() for found in entry.get("rounds", ())]
    records += [*data["packing"].values(), *data["profile"].values()]
    packages: dict[str, str] = {}
    for found in records:
        packages |= found["versions"]
    days = sorted({found["date"][:10] for found in records})
    named = ", ".join(f"{name} {packages[name]}" for name in PRINTED if name in packages)
    lines = [f"{data['card']}, {days[0]}" + (f" to {days[-1]}" if days[1:] else "") + f"; {named}.", ""]
    if data["rows"]:
        lines += [
            "| model | objective | tokens a row | system | setting | tokens/s | MFU | peak GB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for key, row in data["rows"].items():
        shape, objective, length, system = key.split("/")
        head = f"| {SHAPES[shape].title} | {objective} | {int(length):,} | {system} |"
        found = figures(key, row)
        if found is None:
            continue
        if "does_not_fit" in found:
            lines.append(f"{head} does not fit | | | |")
            continue
        mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
        numbers = f"{found['tokens_per_second']:,.0f} | {mfu} | {found['peak_bytes'] / 1e9:.1f}"
        lines.append(f"{head} {found['setting']} | {numbers} |")
    if data["packing"]:
        lines += ["", "| attention, forward and backward | tokens a row | ms | temporaries, GB |"]
        lines += ["| --- | --- | --- | --- |"]
    for length, found in data["packing"].items():
        for label, way in found["ways"].items():
            if "out_of_memory" in way:
                lines.append(f"| {label} | {int(length):,} | does not fit | |")
            else:
                half = way["milliseconds"][len(way["milliseconds"]) // 2 :]
                numbers = f"{statistics.median(half):.2f} | {way['temporary_bytes'] / 1e9:.2f}"
                lines.append(f"| {label} | {int(length):,} | {numbers} |")
    for found in data["profile"].values():
        lines += [
            "",
            f"During {found['steps']} steps of the training loop ({found['model']}) the device was idle for "
            f"{found['idle_share']:.2%} of the time, {found['between_programs_share']:.2%} between programs; "
            f"the longest gap was {found['longest_gap_ms']:.2f} ms.",
        ]
    return "\n".join(lines) + "\n"


def parse_settings(text: str) -> dict[str, list[str]]:
    """From jaxalign=full/1,full/2;trl=none/1 to {"jaxalign": [...], "trl": [...]}."""
    parts = (part.split("=", 1) for part in text.split(";") if part)
    return {name: values.split(",") for name, values in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure what this regular expression finds: 1.5b/dpo/2048/trl, "
                        "packing/8192, profile/1b")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="processes of each system and row")
    parser.add_argument("--warmup", type=int, default=3, help="steps of a process before the measured ones")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a process")
    parser.add_argument("--quick", action="store_true", help="one round of four steps")
    parser.add_argument("--tune", action="store_true", help="measure every setting that fits; the fastest counts")
    parser.add_argument("--settings", type=parse_settings, default={}, metavar="SYSTEM=A,B;...",
                        help="settings to try in place of the script's")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no process after that many minutes")
    parser.add_argument("--trl-python", default=sys.executable, help="TRL's interpreter; '' skips TRL")
    parser.add_argument("--platform", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--shapes", choices=("all", "tiny"), default="all", help="tiny: to try the script on a CPU")
    parser.add_argument("--json", type=Path, help="the results' file; default benchmarks/<card>.json")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print the tables of a results' file, and end")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.result.write_text(json.dumps(work(json.loads(args.worker))))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only counts; the card is the workers'
    if args.render:
        print(render(args.render), end="")
        return
    if args.quick:
        args.rounds, args.steps = 1, 4
    if args.platform == "cpu" and args.json is None:
        parser.error("--platform=cpu needs --json: benchmarks/ is for GPUs")
    path = args.json or FOLDER / f"{slug(card_name())}.json"
    results, began, done = Results(path), time.monotonic(), 0
    for job in jobs(results, args):
        while time.monotonic() - began < 60 * args.minutes and job():
            done += 1
    if path.exists():
        print(render(path))
    over = time.monotonic() - began >= 60 * args.minutes
    print(f"{done} processes; " + ("the time was over: the same command goes on" if over else "nothing is left"))
    if results.failed:
        sys.exit(f"failed: {', '.join(results.failed)}")


def card_name() -> str:
    """The name of the card, by the driver's own tool, so that this process does not touch the device."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].strip()


if __name__ == "__main__":
    main()
