"""The folder of a run, here or in a bucket: what lies where in it, and that it is the run's own."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

from jaxalign import checkpoint, paths
from jaxalign import config as config_lib

log = logging.getLogger(__name__)

CONFIG_FILE, CHECKPOINTS, EXPORT = "config.json", "checkpoints", "export"


def check(config: ConfigDict) -> epath.Path:
    """The run's folder; a run that is already there must be the same one.

    Raises:
      ValueError: another run is there, or `resume=never` and one is there; or a bucket that can't be read.
    """
    folder = paths.at(config.workdir)
    file = folder / CONFIG_FILE
    paths.check_bucket(folder)
    if file.exists():
        if config.resume == "never":
            raise ValueError(f"{folder} holds a run already and resume is never: take another workdir")
        if checkpoint.list_steps(folder / CHECKPOINTS):  # else nothing would be continued
            for name, old, new in config_lib.check_resume(json.loads(file.read_text()), config):
                log.warning("resuming with %s changed: %r -> %r", name, old, new)
    return folder


def keep_config(config: ConfigDict, folder: epath.Path) -> None:
    """Writes the run's config.json, when all that could be wrong with it was found."""
    paths.make_folder(folder)
    paths.replace(folder / CONFIG_FILE, config_lib.to_json(config).encode())


def open_checkpoints(config: ConfigDict, folder: epath.Path) -> checkpoint.Checkpoints:
    """The run's checkpoints, kept as the config says."""
    return checkpoint.Checkpoints(
        folder / CHECKPOINTS,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        best_metric=config.checkpoint.best_metric,
        best_mode=config.checkpoint.best_mode or "max",
    )


class Trace:
    """JAX's profiler at work, from now until `stop`. It can't write to a bucket: a copy goes there at the end."""

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self._written = tempfile.mkdtemp() if paths.is_remote(folder) else str(folder)
        jax.profiler.start_trace(self._written)

    def stop(self) -> None:
        jax.profiler.stop_trace()
        if paths.is_remote(self.folder):
            for file in Path(self._written).rglob("*"):
                if file.is_file():
                    paths.upload(file, self.folder / file.relative_to(self._written))
            shutil.rmtree(self._written)
