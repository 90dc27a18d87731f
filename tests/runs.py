"""Quick whole runs for the tests of the loop: a random one-layer Llama on two dozen pairs of bytes, 8 steps."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jaxalign
from jaxalign import checkpoint, metrics
from jaxalign import config as config_lib
from jaxalign.train import Result

MODEL = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
# Compiled programs are kept from one test session to the next, as the tests' processes compile the same ones.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "d" / "compiled"
STEPS = 8  # 2.5 epochs of 24 pairs in batches of 8 are 7.5


def rows(n: int, start: int = 0) -> list[dict[str, str]]:
    """Pairs that differ in their length and text."""
    return [
        {"prompt": f"{i} + {i % 7} ?", "chosen": f"{i + i % 7}." + "!" * (i % 5), "rejected": f"Who knows {i * 37}?"}
        for i in range(start, start + n)
    ]


@functools.cache
def shared() -> Path:
    """A folder for what all runs of this test process share: the data and its cache."""
    folder = Path(tempfile.mkdtemp(prefix="jaxalign-tests-"))
    for name, pairs in (("train", rows(24)), ("eval", rows(9, start=100))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def config(workdir: Path, **changes: Any) -> dict[str, Any]:
    """The config of a quick run; `changes` are written `data__max_rows=3`, and None takes a key out."""
    values: dict[str, Any] = {
        "workdir": str(workdir),
        "compilation_cache": str(COMPILED),
        "epochs": 2.5,
        "batch_size": 8,
        "max_length": 48,
        "model.random": MODEL,
        "tokenizer.path": "bytes",
        "data.path": str(shared() / "train.jsonl"),
        "data.eval.path": str(shared() / "eval.jsonl"),
        "data.cache_dir": str(shared() / "data"),
        "data.buckets": (48,),
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 2,
        "checkpoint.every": 2,
        "eval.every": 3,
        "samples.prompts": 2,
        "samples.max_new_tokens": 4,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    values = {name: value for name, value in values.items() if value is not None}
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[field] = value
    return nested


def run(workdir: Path, **changes: Any) -> Result:
    """Starts or continues the quick run in a folder."""
    return jaxalign.run(config(workdir, **changes))


def save(workdir: Path, **changes: Any) -> Path:
    """The config as a file for the command's --config, beside the run's folder."""
    file = workdir.with_name(f"{workdir.name}.json")
    file.write_text(config_lib.to_json(config_lib.validate(config(workdir, **changes))))
    return file


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what may differ between equal runs."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in metrics.read_metrics(folder)
    ]


def assert_close(folder: Path, whole: Path) -> None:
    """Two runs wrote the same lines, but for rounding."""
    ours, others = lines(folder), lines(whole)
    assert [(line["step"], list(line)) for line in ours] == [(line["step"], list(line)) for line in others]
    for line, other in zip(ours, others, strict=True):
        for name in line:
            margin = other.get("eval_rewards/margins", other.get("rewards/margins"))
            if "rewards/accuracies" in name and abs(margin) < 1e-5:
                continue  # where policy and reference are equal, rounding gives the margins their sign
            np.testing.assert_allclose(line[name], other[name], rtol=1e-5, atol=1e-5, err_msg=f"{name} {line['step']}")


def leaves(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Every leaf of a checkpoint's state (the newest when None): dtype, shape and checksum of its bits."""
    checkpoints = folder / "checkpoints"
    step = max(checkpoint.list_steps(checkpoints)) if step is None else step
    wrapped = json.loads((checkpoints / str(step) / "record" / "metadata").read_text())
    return json.loads(wrapped["record"])["leaves"]


def assert_same(folder: Path, whole: Path) -> None:
    """Two runs wrote the same lines and completions, and ended in the same bits."""
    assert lines(folder) == lines(whole)
    assert metrics.read_completions(folder) == metrics.read_completions(whole)
    assert leaves(folder) == leaves(whole)
    weights = Path("export", "model.safetensors")
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


ZYGOTE = """
import json, os, signal, sys, threading, time, traceback
import datasets, grain, matplotlib.figure, orbax.checkpoint, transformers
from jaxalign import checkpoint, evals, export, generate, train

def kill(number=signal.SIGTERM): os.kill(os.getpid(), number)
for line in sys.stdin:
    command = json.loads(line)
    pid = os.fork()
    if not pid:
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["jaxalign.train", *command["arguments"]]
        code = 0
        try:
            exec(command["before"])
            train.main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Command:
    """`python -m jaxalign.train` in processes that can be killed, forked from one that has imported everything."""

    def __init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        self.log = shared() / f"command-{self._zygote.pid}.log"

    def start(self, *arguments: str, before: str = "") -> int:
        """The process id of a new command; `before` is Python that it runs first."""
        assert self._zygote.stdin and self._zygote.stdout
        command = {"arguments": arguments, "before": before, "log": str(self.log)}
        self._zygote.stdin.write(json.dumps(command) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())

    def wait(self) -> tuple[int, str]:
        """Its exit code (-9: killed) and all that it said, when it has ended."""
        assert self._zygote.stdout
        return int(self._zygote.stdout.readline()), self.log.read_text(errors="replace")

    def close(self) -> None:
        """Ends the parent of the commands."""
        assert self._zygote.stdin and self._zygote.stdout
        self._zygote.stdin.close()
        self._zygote.wait()
        self._zygote.stdout.close()


@contextlib.contextmanager
def commands() -> Iterator[Command]:
    """A `Command`, closed at the end."""
    command = Command()
    try:
        yield command
    finally:
        command.close()
