"""Functions of the user's own that a config names: `FILE.py:function`, or `package.module.function`."""

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxalign.messages import did_you_mean


def is_function(name: str | None) -> bool:
    """Whether a name is a function's: of a file or a module, and not that of a column."""
    return name is not None and "." in name


def beside(name: str, folder: Path) -> str:
    """`file.function`, or `folder.file.function`, as the path of that file in `folder`, where it is there; so a saved
    config finds it again."""
    file, _, function = name.rpartition(".")
    path = folder / f"{file.replace('.', '/')}.py"
    return f"{path.resolve()}:{function}" if file and ":" not in name and path.is_file() else name


def load(name: str) -> Callable[..., Any]:
    """The function of this name; a file is run once, and again when it has changed.

    Raises:
      ValueError: no such file, module or function; or it is nothing that can be called.
    """
    path, colon, function = name.rpartition(":")
    if colon:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"{name!r}: there is no file {file}")
        module = _run_file(file.resolve(), file.read_bytes())
    else:
        path, _, function = name.rpartition(".")
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{name!r}: there is no {path}.py beside the config and no module {path!r} ({error}); write "
                "FILE.py:FUNCTION or MODULE.FUNCTION"
            ) from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{name!r}: {path} has no function {function!r}{did_you_mean(function, names)}")
    return found


def fingerprint(name: str) -> str:
    """A hash of the function's name and of the file that it is in: another one when its results may be others."""
    path, colon, function = name.rpartition(":")
    if not colon:
        path, _, function = name.rpartition(".")
        path = getattr(importlib.import_module(path), "__file__", None) or ""
    file = Path(path).expanduser()
    content = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(function.encode() + b"\0" + content).hexdigest()


@functools.lru_cache(maxsize=64)
def _run_file(file: Path, content: bytes) -> ModuleType:
    unique = f"jaxalign_user_{hashlib.sha256(str(file).encode() + content).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(unique, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
