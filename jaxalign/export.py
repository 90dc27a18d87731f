"""A run's checkpoint as a Hugging Face folder: `python -m jaxalign.export RUN OUT --step=best`.

Runs on one CPU host, whatever mesh wrote the checkpoint.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from jaxalign import build, checkpoint, hf, models
from jaxalign import config as config_lib
from jaxalign.models.config import ModelConfig


def load_run(
    folder: str | Path, step: str | int = "last", *, device: jax.Device | None = None
) -> tuple[ModelConfig, models.Params, Any]:
    """The model that a run trained, on one device (JAX's default when None): (config, float32 params, tokenizer).

    Args:
      folder: the run's.
      step: "last", "best" or a number.

    Raises:
      ValueError: no run or no such checkpoint there. checkpoint.InvalidCheckpoint: its files are damaged.
    """
    folder = Path(folder).expanduser()
    file = folder / "config.json"
    if not (folder / "checkpoints").is_dir() or not file.is_file():
        raise ValueError(f"{folder} is not the folder of a run: config.json and checkpoints/ are expected in it")
    config = _read_config(file)
    cfg = build.model_config(config, path=config.model.path)
    place = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), models.abstract(cfg, "float32")
    )
    _, params, _ = checkpoint.restore_params(folder / "checkpoints", abstract, step)
    tokenizer, _ = build.load_tokenizer(config)
    return cfg, params, tokenizer


def _read_config(file: Path) -> Any:
    """A run's config. Rows that were handed over in Python have left no path in it."""
    saved = json.loads(file.read_text())
    named = saved["data"]["eval"]
    return config_lib.validate(
        saved,
        has_dataset=saved["data"]["path"] is None,
        has_eval_dataset=not (named["path"] or named["split"] or named["fraction"]),
    )


def export(run: str | Path, target: str | Path, *, step: str | int = "last", dtype: str = "source") -> Path:
    """Writes checkpoint `step` of `run` to the folder `target`; see `hf.save` for what is in it.

    Args:
      dtype: of the tensors; "source" is that of the checkpoint that the run began from.
    """
    cfg, params, tokenizer = load_run(run, step, device=jax.local_devices(backend="cpu")[0])
    source = json.loads((Path(run).expanduser() / "config.json").read_text())["model"]["path"]
    return hf.save(
        target,
        cfg,
        params,
        tokenizer_from=tokenizer,
        generation_from=source,
        dtype=None if dtype == "source" else dtype,
    )


def in_subprocess(run: str | Path, target: str | Path, *, step: str | int = "last", dtype: str = "source") -> None:
    """`export` in a process of its own on the CPU, which belongs to no group of processes.

    Raises:
      ValueError: it failed; the message has what it said.
    """
    ours = ("JAX_", "TPU_", "MEGASCALE_", "XLA_FLAGS")  # who the processes are, and which devices they see
    environment = {name: x for name, x in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "jaxalign.export", str(run), str(target), f"--step={step}", f"--dtype={dtype}"]
    done = subprocess.run(command, env={**environment, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the export failed; again by hand: {' '.join(command[1:])}\n{done.stderr.strip()[-3000:]}")


def _main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise app.UsageError("two arguments: the run's folder and the folder to write")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read
    try:
        print(export(argv[1], argv[2], step=flags.FLAGS.step, dtype=flags.FLAGS.dtype))
    except ValueError as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """The command."""
    flags.DEFINE_string("step", "last", "Checkpoint: last, best or a step number.")
    flags.DEFINE_enum("dtype", "source", ("source", *hf.DTYPES), "dtype of the tensors; source: its origin's.")
    app.run(_main)


if __name__ == "__main__":
    main()
