"""A run's checkpoint as a Hugging Face folder: `python -m jaxalign.export RUN OUT --step=best`.

Runs on one CPU host, whatever mesh wrote the checkpoint, with memory for two or three times its largest weight (which
holds all layers), not for the model. RUN and OUT may be in a bucket. A run of several processes exports on its mesh.

Of a LoRA run the folder is the whole model, the adapters merged into the weights of model.path, which are read again
(what a quantised run computed with was rounded); or, with --adapter, the adapters alone as PEFT opens them.
"""

import dataclasses
import functools
import json
import logging as python_logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from etils import epath

from jaxalign import checkpoint, hf, lora, models, paths, peft_files, programs, run_folder, sharding
from jaxalign import config as config_lib
from jaxalign.models.config import ModelConfig
from jaxalign.safetensors_file import Folder

log = python_logging.getLogger(__name__)

Read = Callable[[tuple[str, ...]], jax.Array]


class _Run(NamedTuple):
    """A run that is to be read: its folder of checkpoints, its config and what that says of model and adapters."""

    checkpoints: epath.Path
    config: Any
    cfg: ModelConfig
    spec: lora.Spec | None


def _open(folder: paths.PathLike) -> _Run:
    where = paths.at(folder)
    file, checkpoints = where / run_folder.CONFIG_FILE, where / run_folder.CHECKPOINTS
    if not checkpoints.is_dir() or not file.exists():
        raise ValueError(f"{where} is not the folder of a run: config.json and checkpoints/ are expected in it")
    config = read_config(file)
    cfg = programs.model_config(config, path=config.model.path)
    return _Run(checkpoints, config, cfg, programs.adapters_of(config, cfg))


def load_run(
    folder: paths.PathLike, step: str | int = "last", *, device: jax.Device | None = None
) -> tuple[ModelConfig, models.Params, Any]:
    """The model that a run trained, on one device (JAX's default when None): (config, float32 params, tokenizer).

    Args:
      folder: the run's. Adapters of a LoRA run are merged into its base.
      step: "last", "best" or a number.

    Raises:
      ValueError: no run or no such checkpoint there. checkpoint.InvalidCheckpoint: its files are damaged.
    """
    run = _open(folder)
    place = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    if run.spec is None:
        params = checkpoint.restore_params(run.checkpoints, _abstract(models.declare(run.cfg), place), step)[1]
    else:
        read = _merged(run, _adapters(run, step, place)[0], place)
        params = lora.nest({path: read(path) for path in lora.flat(models.declare(run.cfg))})
    tokenizer, _ = programs.load_tokenizer(run.config)
    ends = hf.stop_ids(run.cfg, path=run.config.model.path)  # those of generation_config.json too
    return dataclasses.replace(run.cfg, eos_token_id=ends), params, tokenizer


def _abstract(declared: models.Params, place: Any) -> models.Params:
    """Declared weights as float32 arrays that lie where `place`, one sharding or a tree of them, says."""
    places = lora.flat(place) if isinstance(place, dict) else dict.fromkeys(lora.flat(declared), place)
    return lora.nest(
        {
            path: jax.ShapeDtypeStruct(weight.shape, "float32", sharding=places[path])
            for path, weight in lora.flat(declared).items()
        }
    )


def _adapters(run: _Run, step: str | int, place: Any) -> tuple[models.Params, str | None]:
    """The adapters of a LoRA run's checkpoint, and the hash of the base that they belong to.

    Raises:
      ValueError: the base is another one now.
    """
    assert run.spec is not None
    abstract = _abstract(lora.declare(run.cfg, run.spec), place)
    _, adapters, meta = checkpoint.restore_params(run.checkpoints, abstract, step)
    path = run.config.model.path
    found = None if path is None else hf.fingerprint(path)
    if found is not None:
        lora.check_base(meta["base"], found, what=f"the run in {run.checkpoints.parent}")
    return adapters, found


def _merged(run: _Run, adapters: models.Params, place: Any) -> Read:
    """What gives a leaf of the whole model: the base's, as its files have it, with the adapters."""
    declared, spec = models.declare(run.cfg), run.spec
    assert spec is not None
    read: Read
    if run.config.model.path is not None:
        head = "score" if run.cfg.num_labels else "lm"
        read = hf.reader(run.config.model.path, run.cfg, shardings=place, head=head)[1]
    else:
        init = jax.jit(functools.partial(models.init, run.cfg), out_shardings=place)
        with jax.set_mesh(None):
            read = lora.flat(init(jax.random.key(run.config.seed))).__getitem__

    def merged(path: tuple[str, ...]) -> jax.Array:
        leaf = read(path)
        merge = functools.partial(lora.merge_leaf, path, base=declared, spec=spec)
        with jax.set_mesh(None):  # under the caller's mesh, a leaf on other devices than the mesh's is an error
            whole: jax.Array = jax.jit(merge, out_shardings=leaf.sharding)(leaf, adapters)
        return whole

    return merged


def read_config(file: epath.Path) -> Any:
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
    adapter: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Folder:
    """Writes checkpoint `step` of `run` to the folder `target`; see `hf.save` for what is in it.

    Args:
      step: "last" (the newest valid one), "best" or a number.
      dtype: of the tensors; "source" is that of the checkpoint that the run began from, of adapters float32.
      adapter: of a LoRA run, write its adapters alone, see `peft_files.save`; the tokenizer goes along.
      mesh: where to put the weights, all of them at once; all its processes call this and write together. None: this
        process alone reads them from the checkpoint as it writes.

    Raises:
      ValueError: no run or no such checkpoint there, adapters of a run that has none, or another base than it had.
        checkpoint.InvalidCheckpoint: its files are damaged.
    """
    opened = _open(run)
    tokenizer, _ = programs.load_tokenizer(opened.config)
    declared = models.declare(opened.cfg)
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    place: Any = cpu if mesh is None else sharding.param_shardings(mesh, declared)

    def save(params: Any) -> Folder:
        return hf.save(
            target,
            opened.cfg,
            params,
            tokenizer_from=tokenizer,
            generation_from=opened.config.model.path,
            dtype=None if dtype == "source" else dtype,
        )

    if opened.spec is not None:
        adapters_place = cpu if mesh is None else lora.shardings(opened.cfg, opened.spec, mesh)
        adapters, base_hash = _adapters(opened, step, adapters_place)
        if not adapter:
            return save(_merged(opened, adapters, place))
        folder = peft_files.save(
            target,
            opened.cfg,
            opened.spec,
            adapters,
            base_model_name_or_path=opened.config.model.path,
            base_hash=base_hash,
            dtype="float32" if dtype == "source" else dtype,
        )
        _add_tokenizer(folder, tokenizer)
        return folder
    if adapter:
        raise ValueError(f"the run in {run} trained all weights and has no adapter: leave --adapter out")
    abstract = _abstract(declared, place)
    if mesh is not None:
        return save(checkpoint.restore_params(opened.checkpoints, abstract, step)[1])
    invalid = []
    for number in checkpoint.matching_steps(opened.checkpoints, step):
        try:
            return save(checkpoint.params_reader(opened.checkpoints, abstract, number))
        except checkpoint.InvalidCheckpoint as error:
            log.warning("checkpoint %d in %s is INVALID: %s", number, opened.checkpoints, error)
            invalid.append(f"{number}: {error}")
    raise checkpoint.InvalidCheckpoint(f"no checkpoint in {opened.checkpoints} is valid ({'; '.join(invalid)})")


def _add_tokenizer(folder: Folder, tokenizer: Any) -> None:
    """Writes a tokenizer's files beside an adapter, here or in a bucket."""
    if jax.process_index() == 0:
        with tempfile.TemporaryDirectory() as small:
            hf.write_tokenizer(Path(small), tokenizer)
            for file in Path(small).iterdir():
                paths.replace(folder / file.name, file.read_bytes())


def _main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise app.UsageError("two arguments: the run's folder and the folder to write")
    if flags.FLAGS.merged and flags.FLAGS.adapter:
        raise app.UsageError("--merged writes the whole model, --adapter the adapters alone: give one of them")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is no news
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read
    try:
        values = flags.FLAGS
        print(export(argv[1], argv[2], step=values.step, dtype=values.dtype, adapter=values.adapter))
    except ValueError as error:
        print(f"jaxalign: {error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """The command."""
    flags.DEFINE_string("step", "last", "Checkpoint: last, best or a step number.")
    flags.DEFINE_enum("dtype", "source", ("source", *hf.DTYPES), "dtype of the tensors; source: its origin's.")
    flags.DEFINE_bool("merged", False, "Of a LoRA run: the whole model (the default).")
    flags.DEFINE_bool("adapter", False, "Of a LoRA run: the adapters alone, as a PEFT folder.")
    app.run(_main)


if __name__ == "__main__":
    main()
