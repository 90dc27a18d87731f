"""A run's checkpoint as a Hugging Face folder: `python -m jaxalign.export RUN OUT --step=best`.

Runs on one CPU host, whatever mesh wrote the checkpoint, with memory for two or three times its largest weight (which
holds all layers), not for the model. RUN and OUT may be in a bucket. A run of several processes exports on its mesh.
"""

import json
import logging as python_logging
import os
import sys
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from etils import epath

from jaxalign import build, checkpoint, hf, models, paths, run_folder, sharding
from jaxalign import config as config_lib
from jaxalign.models.config import ModelConfig
from jaxalign.safetensors_file import Folder

log = python_logging.getLogger(__name__)


class _Run(NamedTuple):
    """A run that is to be read: its folder of checkpoints, its config and what that says of the model."""

    checkpoints: epath.Path
    config: Any
    cfg: ModelConfig


def _open(folder: paths.PathLike) -> _Run:
    where = paths.at(folder)
    file, checkpoints = where / run_folder.CONFIG_FILE, where / run_folder.CHECKPOINTS
    if not checkpoints.is_dir() or not file.exists():
        raise ValueError(f"{where} is not the folder of a run: config.json and checkpoints/ are expected in it")
    config = _read_config(file)
    return _Run(checkpoints, config, build.model_config(config, path=config.model.path))


def load_run(
    folder: paths.PathLike, step: str | int = "last", *, device: jax.Device | None = None
) -> tuple[ModelConfig, models.Params, Any]:
    """The model that a run trained, on one device (JAX's default when None): (config, float32 params, tokenizer).

    Args:
      folder: the run's.
      step: "last", "best" or a number.

    Raises:
      ValueError: no run or no such checkpoint there. checkpoint.InvalidCheckpoint: its files are damaged.
    """
    run = _open(folder)
    _, params, _ = checkpoint.restore_params(
        run.checkpoints, _abstract(run.cfg, device or jax.local_devices()[0]), step
    )
    tokenizer, _ = build.load_tokenizer(run.config)
    return run.cfg, params, tokenizer


def _abstract(cfg: ModelConfig, device: jax.Device) -> models.Params:
    """The float32 params as they would be on one device."""
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), models.abstract(cfg))


def _read_config(file: epath.Path) -> Any:
    """A run's config. Rows that were handed over in Python have left no path in it."""
    saved = json.loads(file.read_text())
    named = saved["data"]["eval"]
    return config_lib.validate(
        saved,
        has_dataset=saved["data"]["path"] is None,
        has_eval_dataset=not (named["path"] or named["split"] or named["fraction"]),
    )


def export(
    run: paths.PathLike,
    target: paths.PathLike,
    *,
    step: str | int = "last",
    dtype: str = "source",
    mesh: jax.sharding.Mesh | None = None,
) -> Folder:
    """Writes checkpoint `step` of `run` to the folder `target`; see `hf.save` for what is in it.

    Args:
      step: "last" (the newest valid one), "best" or a number.
      dtype: of the tensors; "source" is that of the checkpoint that the run began from.
      mesh: where to put the weights, all of them at once; all its processes call this and write together. None: this
        process alone reads them from the checkpoint as it writes.

    Raises:
      ValueError: no run or no such checkpoint there. checkpoint.InvalidCheckpoint: its files are damaged.
    """
    opened = _open(run)
    tokenizer, _ = build.load_tokenizer(opened.config)

    def save(params: Any) -> Folder:
        return hf.save(
            target,
            opened.cfg,
            params,
            tokenizer_from=tokenizer,
            generation_from=opened.config.model.path,
            dtype=None if dtype == "source" else dtype,
        )

    if mesh is not None:
        shardings = sharding.param_shardings(mesh, models.declare(opened.cfg))
        abstract = models.abstract(opened.cfg, shardings=shardings)
        return save(checkpoint.restore_params(opened.checkpoints, abstract, step)[1])
    abstract = _abstract(opened.cfg, jax.local_devices(backend="cpu")[0])
    invalid = []
    for number in checkpoint.matching_steps(opened.checkpoints, step):
        try:
            return save(checkpoint.params_reader(opened.checkpoints, abstract, number))
        except checkpoint.InvalidCheckpoint as error:
            log.warning("checkpoint %d in %s is INVALID: %s", number, opened.checkpoints, error)
            invalid.append(f"{number}: {error}")
    raise checkpoint.InvalidCheckpoint(f"no checkpoint in {opened.checkpoints} is valid ({'; '.join(invalid)})")


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
