"""Hub models read in place, by byte range: against a hub of our own on 127.0.0.1, as none is asked in tests."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from common import policy
from processes import two_processes
from safetensors.numpy import load_file, save_file

from jaxalign import paths

COMMIT = "0123456789abcdef" * 2 + "01234567"
TOKEN = "hf_secret"


class Request(NamedTuple):
    """One that a server got; `place` is "hub", or "store", to which the hub sends for large files."""

    place: str
    method: str
    path: str
    range: str | None
    token: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: object) -> None:
        """Requests are not printed."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _handle(self) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        wanted, token = self.headers.get("Range"), (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub.requests.append(Request(self.server.place, self.command, path, wanted, token))
        if path == "/stop":
            hub.is_down = True
        if hub.is_down:
            return self._answer(500)
        if self.server.place == "store":
            _, signature, organisation, name, file = path.split("/")
            return self._store(signature, hub.models[f"{organisation}/{name}"][file])
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path)
        if not (api or resolve):
            return self._answer(404)  # huggingface_hub asks for more than the model
        hub_id, revision = api.group(1, 3) if api else resolve.group(1, 2)
        if hub_id not in hub.models:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if revision not in (None, "main", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound")
        files = hub.models[hub_id]
        if resolve:
            return self._resolve(hub_id, resolve[3], token)
        found: object = {"id": hub_id, "sha": COMMIT}
        if api[2] == "tree":
            found = [{"type": "file", "path": name, "size": len(one), "oid": etag(one)} for name, one in files.items()]
        self._answer(200, json.dumps(found).encode(), Content_Type="application/json")

    do_GET = do_HEAD = _handle

    def _resolve(self, hub_id: str, name: str, token: str) -> None:
        hub, content = self.server.hub, self.server.hub.models[hub_id].get(name)
        if "gated" in hub_id and token != TOKEN:
            return self._answer(403, X_Error_Code="GatedRepo")
        if content is None:
            return self._answer(404, X_Error_Code="EntryNotFound")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(content)}"'}
        if not name.endswith(".safetensors"):
            return self._answer(200, content, **headers)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
        self._answer(302, Location=f"{hub.store.url}/{hub.signature}/{hub_id}/{name}", **headers)

    def _store(self, signature: str, content: bytes) -> None:
        hub = self.server.hub
        if signature != hub.signature:
            return self._answer(403)
        if hub.faults:
            return hub.faults.pop()(self)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            return self._answer(200, content)
        start, last = map(int, found.groups())
        part = content[start : last + 1]
        self._answer(206, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(content)}")


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: "Hub", place: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.place, self.url = hub, place, f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()


class Hub:
    """As much of the hub's HTTP API as huggingface_hub asks for, and a store of large files, each at its own address.

    Attributes:
      models: id -> file name -> content. Files of "gated" ones need TOKEN.
      signature: of the addresses in the store that are good now.
      faults: how the store answers the next requests, the last first.
    """

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.requests: list[Request] = []
        self.signature, self.is_down, self.faults = "signed", False, []
        self.web, self.store = _Server(self, "hub"), _Server(self, "store")

    def fail(self, handler: _Handler) -> None:
        handler._answer(503)

    def cut(self, handler: _Handler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(bytes(10))
        handler.close_connection = True

    def expire(self, handler: _Handler) -> None:
        self.signature = "signed-anew"
        handler._answer(403)


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with the tiny Llama in two weight files."""
    folder, source = tmp_path / "model", policy("llama")
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    weight_map = {name: f"model-0000{1 + ('layers' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    hub = Hub()
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    hub.models = {"org/llama": files, "org/gated": files, "org/pickles": {"config.json": files["config.json"]}}
    environment = {
        "HF_ENDPOINT": hub.web.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield hub
    for server in (hub.web, hub.store):
        server.shutdown()
        server.server_close()


def store_ranges(hub: Hub) -> list[list]:
    """(file, offset, size) of what was read from the store."""
    found = []
    for request in hub.requests:
        if request.place == "store":
            first, last = map(int, request.range.removeprefix("bytes=").split("-"))
            found.append([request.path.split("/")[-1], first, last + 1 - first])
    return found


def cached_weights(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home").rglob("*.safetensors"))


LOAD = """
read_range, seen = paths.read_range, []

def counted(path, offset, size):
    seen.append((os.path.basename(path), offset, size))
    return read_range(path, offset, size)

paths.read_range = counted
ranges, leaves = [], []
for source in sys.argv[1:]:
    seen.clear()
    leaves.append(jax.tree.leaves(load(source, {"fsdp": 8})[2]))
    ranges.append(list(seen))
for ours, theirs in zip(*leaves, strict=True):
    for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        assert a.index == b.index and a.data.dtype == b.data.dtype
        np.testing.assert_array_equal(a.data, b.data)
tell(ranges)
"""


def test_two_processes_read_their_own_ranges_and_no_others_from_the_hub(hub, model, tmp_path):
    told = two_processes(LOAD, tmp_path, "org/llama", model)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    in_place = []
    for ((from_hub, from_disk),) in told:
        assert sorted(from_hub) == sorted(from_disk)  # whose rows are the own ones: test_weights_at_scale.py
        assert sum(size for _, _, size in from_hub) < total
        in_place += from_hub
    assert sorted(store_ranges(hub)) == sorted(in_place)
    assert not cached_weights(tmp_path)
    resolved = [one for one in hub.requests if one.place == "hub" and one.path.endswith(".safetensors")]
    assert [one.method for one in resolved] == ["HEAD"] * 4  # once for a file and process, however many its ranges
    assert all(f"/resolve/{COMMIT}/" in one.path for one in resolved)
    assert {one.token for one in hub.requests if "org/llama" in one.path and one.place == "hub"} == {TOKEN}
    assert {one.token for one in hub.requests if one.place == "store"} == {""}


ONE = """
import json, os, sys
import jax
import numpy as np
from huggingface_hub import constants
from jaxalign import hf, paths

told = {}

def refused(call, *arguments):
    try:
        return f"not refused: {call(*arguments)}"
    except (ValueError, FileNotFoundError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
"""


def one_process(program: str, *arguments: object) -> dict:
    """What the program put into `told`; the token must not be in what it printed."""
    command = [sys.executable, "-c", f"{ONE}{program}\nprint(json.dumps(told))", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


HF_PATHS = """
there, here, file = "hf://org/llama", sys.argv[1], "model-00001-of-00002.safetensors"
told["where"] = str(hf.resolve(there))
told["end"] = refused(paths.read_range, f"{there}/{file}", paths.size(f"{there}/{file}") - 1, 2)
told["missing"] = refused(paths.size, f"{there}/none.safetensors")
ours, theirs = (jax.tree.leaves(hf.load(path)[1]) for path in (there, here))
told["equal"] = all(a.dtype == b.dtype and bool((a == b).all()) for a, b in zip(ours, theirs, strict=True))
told["same_model"] = hf.fingerprint(there) == hf.fingerprint(here)
told["vocabulary"] = hf.load_tokenizer(there).get_vocab() == hf.load_tokenizer(here).get_vocab()
told["parts"] = [refused(paths.at, "hf://org"), refused(hf.load, there + "/folder")]
cfg, params = hf.load(here)
told["writing"] = [refused(call, *arguments) for call, *arguments in (
    (hf.save, there, cfg, params), (paths.check_bucket, there), (paths.make_folder, there), (paths.glob, there + "/*"),
    (paths.replace, there + "/file", b""),
)]
"""


def test_a_path_on_the_hub_is_a_model_and_nothing_else(hub, model, tmp_path):
    hub.faults = [hub.fail, hub.cut, hub.expire]
    told = one_process(HF_PATHS, model)
    assert told["where"] == f"hf://org/llama@{COMMIT}"
    assert told["equal"] and told["same_model"] and told["vocabulary"]
    assert not hub.faults and hub.signature == "signed-anew"
    assert told["end"].startswith("EOFError") and told["missing"].startswith("FileNotFoundError")
    assert not cached_weights(tmp_path)
    assert all("expected hf://organisation/name" in one for one in told["parts"])
    assert all("ValueError" in one and "models to read" in one for one in told["writing"])


FAILURES = """
jax.process_count = lambda: 2
told["unknown"] = [refused(hf.load, path) for path in ("org/none", "hf://org/none")]
told["pickles"] = [refused(hf.load, path) for path in ("org/pickles", "hf://org/pickles")]
told["revision"] = refused(hf.load, "hf://org/llama@v9")
hf.read_config("org/gated")
os.environ["HF_TOKEN"] = "another"
told["gated"] = [refused(hf.load, path) for path in ("org/gated", "hf://org/gated")]
constants.HF_HUB_OFFLINE = True
told["offline"] = [refused(hf.load, path) for path in ("org/gated", "hf://org/gated", "org/none")]
"""


def test_what_the_hub_refuses_is_said_before_weights_are_read(hub):
    told = one_process(FAILURES)
    for name, says in {
        "unknown": "org/none.*was not found, or is private.*HF_TOKEN",
        "pickles": "'org/pickles' has no safetensors.*never read",
        "gated": "org/gated.*is gated: accept its licence at https://huggingface.co/org/gated and set HF_TOKEN",
        "offline": "HF_HUB_OFFLINE is set",
    }.items():
        assert all(re.search(says, one) for one in told[name]), told[name]
    assert re.search("hf://org/llama@v9' has no such revision", told["revision"])
    assert not store_ranges(hub)


CACHE = """
import urllib.request

def resolve(processes):
    jax.process_count = lambda: processes
    return str(hf.resolve("org/llama"))

told["several"] = resolve(2)
told["one"] = resolve(1)
told["cached"] = resolve(2)
try:
    urllib.request.urlopen(constants.ENDPOINT + "/stop")
except OSError:
    told["down"] = resolve(2)
"""


def test_weights_in_the_cache_are_read_from_there(hub, model, tmp_path):
    told = one_process(CACHE)
    assert told["several"] == f"hf://org/llama@{COMMIT}"
    assert paths.is_remote(told["several"]) and not paths.is_remote(told["one"])
    assert told["one"] == told["cached"] == told["down"]
    for file in model.glob("*.safetensors"):
        assert (Path(told["one"]) / file.name).read_bytes() == file.read_bytes()
