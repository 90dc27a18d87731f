"""What a step costs besides its arithmetic: compile time against depth, Python in the loop, and start-up.

    python scripts/benchmark_overhead.py [--rounds=5] [--json=OUT.json]

- compile: trace + compile of the same DPO train step with 32 layers against 4, nothing cached (layers are scanned, so
  depth must not matter): goal at most 1.3x.
- loop: a step of `jaxalign.run` on configs/tiny.py less what its jitted functions take on the same batches: goal under
  5 ms.
- start: a new process for `import jaxalign` (goal under 1 s) and for the train entry until its flags are parsed and the
  config is checked (`--print_config`, goal under 4 s), interpreter included.

All numbers are medians; depths and processes alternate. The loop's number needs a quiet machine to mean anything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.py"


def compile_seconds(layers: int) -> tuple[float, float]:
    """Seconds to trace and to compile the train step of a narrow Llama of so many layers."""
    import jax
    import jax.numpy as jnp

    from jaxalign import models, objectives, optim, step

    cfg = models.config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float32",
        }
    )
    tx = optim.make_optimizer("adamw", schedule=optim.make_schedule("constant", 1e-6, steps=10))
    train_step = jax.jit(step.make_train_step(objectives.pairwise(cfg, beta=0.1), tx), donate_argnums=0)
    state = jax.eval_shape(lambda params: step.init_state(params, tx), models.abstract(cfg))

    def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, length = 4, 256
    batch = {
        "tokens": leaf(jnp.int32, rows, length),
        "positions": leaf(jnp.int32, rows, length),
        "mask": leaf(jnp.bool_, rows, length),
        "ref_logps": leaf(jnp.float32, rows, length),
        "lengths": leaf(jnp.int32, rows),
    }
    jax.clear_caches()
    start = time.perf_counter()
    lowered = train_step.lower(state, None, batch)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def measure_compile(rounds: int) -> dict[str, float]:
    """Median seconds at 4 and 32 layers, and the median over rounds of their ratio."""
    compile_seconds(2)  # the first compilation of a process starts the compiler
    found = [(compile_seconds(4), compile_seconds(32)) for _ in range(rounds)]
    return {
        "trace_4_s": statistics.median(shallow[0] for shallow, _ in found),
        "trace_32_s": statistics.median(deep[0] for _, deep in found),
        "compile_4_s": statistics.median(shallow[1] for shallow, _ in found),
        "compile_32_s": statistics.median(deep[1] for _, deep in found),
        "ratio": statistics.median(sum(deep) / sum(shallow) for shallow, deep in found),
    }


def write_rows(path: Path, count: int) -> str:
    """Pairs as short as those of configs/tiny.py, but as many as a data set has.

    grain shuffles thousands of rows in 0.02 ms an index, two dozen in 1 ms: its cipher tries until one is in range.
    """
    sums = ((f"What is {i} + {i % 7}?", str(i + i % 7)) for i in range(count))
    rows = ({"prompt": question, "chosen": answer, "rejected": "Who knows?"} for question, answer in sums)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def measure_loop(steps: int) -> dict[str, float]:
    """Median milliseconds of a step in the loop, of its jitted functions alone, and of the difference step by step."""
    import jax

    from jaxalign import build, metrics, sharding, train
    from jaxalign import config as config_lib

    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "workdir": f"{scratch}/run",
            "steps": steps,
            "data.path": write_rows(Path(scratch) / "rows.jsonl", 2000),
            "data.cache_dir": f"{scratch}/rows",
            "eval.max_rows": 8,
            "eval.every": 0,  # before the first step and after the last, and so are the completions
            "checkpoint.every": 0,
            "export.enabled": False,
        }
        config = config_lib.load(str(TINY), [f"{name}={value}" for name, value in values.items()])
        train.run(config)
        looped = [line["time/step"] for line in metrics.read_metrics(config.workdir) if "time/step" in line]

        mesh = sharding.make_mesh(**config.mesh.to_dict())
        with sharding.use_mesh(mesh):
            pieces = build.Run(config, mesh, build.load_data(config, Path(scratch) / "dropped.jsonl"))
            state, bare = pieces.new_state(), []
            for n in range(steps):
                batch = jax.block_until_ready(pieces.place(pieces.source(n)))
                start = time.perf_counter()
                batch["ref_logps"] = pieces.score(pieces.reference_of(state), batch)
                state, found = pieces.train_step(state, None, batch)
                jax.block_until_ready((state, found))
                bare.append(time.perf_counter() - start)
    skip = steps // 4  # compilation, and the caches' first use
    pairs = list(zip(looped, bare, strict=True))[skip:]
    return {
        "loop_ms": 1e3 * statistics.median(loop for loop, _ in pairs),
        "bare_ms": 1e3 * statistics.median(alone for _, alone in pairs),
        "overhead_ms": 1e3 * statistics.median(loop - alone for loop, alone in pairs),
    }


def process_seconds(*arguments: str) -> float:
    """Wall seconds of a new Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_start(rounds: int) -> dict[str, float]:
    """Median seconds of new processes: an empty one, `import jaxalign`, the train entry with its flags parsed."""
    commands = {
        "python_s": ("-c", "pass"),
        "import_s": ("-c", "import jaxalign"),
        "train_entry_s": ("-m", "jaxalign.train", f"--config={TINY}", "--print_config"),
    }
    for command in commands.values():
        process_seconds(*command)  # bytecode and disk caches
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            found[name].append(process_seconds(*command))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of compile and start")
    parser.add_argument("--steps", type=int, default=200, help="steps of the tiny run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"

    found = {"start": measure_start(args.rounds), "compile": measure_compile(args.rounds)}
    found["loop"] = measure_loop(args.steps)
    for part, numbers in found.items():
        print(f"{part}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()))
    for name, value, goal in (
        ("trace + compile, 32 layers / 4", found["compile"]["ratio"], 1.3),
        ("Python overhead of the loop, ms a step", found["loop"]["overhead_ms"], 5.0),
        ("import jaxalign, s", found["start"]["import_s"], 1.0),
        ("train entry with flags parsed, s", found["start"]["train_entry_s"], 4.0),
    ):
        print(f"{name}: {value:.2f} (goal {goal}: {'reached' if value <= goal else 'MISSED'})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
