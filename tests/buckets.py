"""Google Cloud Storage of our own, in memory on 127.0.0.1: as much of the JSON API as gcsfs and tensorstore use.

Objects appear whole or not at all, writes may be conditional on a generation, listings are exact, as in the real one
(https://cloud.google.com/storage/docs/json_api/v1, /docs/consistency). The package gcp-storage-emulator of PyPI knows
no conditions, on which the arrays' database relies, and serves one request at a time.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit


class Object(NamedTuple):
    generation: int
    content: bytes


class Refused(Exception):
    """An answer with an HTTP status of failure."""


class Bucket:
    """The objects of one bucket and the requests that were made.

    Attributes:
      objects: by name.
      requests: (method, object name) of each request; READ where the content is asked for.
      history: all that was there after each change: what a client that was killed right then has left.
    """

    def __init__(self, name: str):
        self.name = name
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str]] = []
        self.history: list[dict[str, Object]] = []
        self.lock = threading.RLock()
        self._generation = 0
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    def describe(self, name: str) -> dict[str, str]:
        found = self.get(name)
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "size": str(len(found.content)),
            "generation": str(found.generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(found.content).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def get(self, name: str) -> Object:
        if name not in self.objects:
            raise Refused(404)
        return self.objects[name]

    def put(self, name: str, content: bytes, query: dict[str, str]) -> dict[str, str]:
        with self.lock:
            self._check(name, query)
            self._generation += 1
            self._change({**self.objects, name: Object(self._generation, content)})
            return self.describe(name)

    def delete(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self._check(name, query)
            self.get(name)
            self._change({other: found for other, found in self.objects.items() if other != name})

    def move(self, name: str, to_name: str) -> dict[str, str]:
        with self.lock:
            moved = {other: found for other, found in self.objects.items() if other != name}
            self._change({**moved, to_name: self.get(name)})
            return self.describe(to_name)

    def _change(self, objects: dict[str, Object]) -> None:
        self.objects = objects
        self.history.append(objects)

    def _check(self, name: str, query: dict[str, str]) -> None:
        generation = self.objects[name].generation if name in self.objects else 0
        if int(query.get("ifGenerationMatch", generation)) != generation:
            raise Refused(412)

    def begin_upload(self, name: str, query: dict[str, str]) -> str:
        upload = str(len(self._uploads))
        self._uploads[upload] = name, query, bytearray()
        return upload

    def continue_upload(self, upload: str, content: bytes, content_range: str) -> dict[str, str] | int:
        """The object's description when it is whole, else the number of bytes so far."""
        name, query, so_far = self._uploads[upload]
        first, total = re.fullmatch(r"bytes (\d+|\*)(?:-\d+)?/(\d+|\*)", content_range).groups()
        if first != "*":
            assert int(first) == len(so_far)
            so_far += content
        if total == "*" or len(so_far) < int(total):
            return len(so_far)
        return self.put(name, bytes(so_far), query)

    def list(self, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter, limit = query.get("prefix", ""), query.get("delimiter"), int(query.get("maxResults", 1000))
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        items, prefixes = [], []
        with self.lock:
            for name in sorted(self.objects):
                if not name.startswith(prefix) or name < first or name >= query.get("endOffset", "\U0010ffff"):
                    continue
                if len(items) + len(prefixes) == limit:
                    return {"items": items, "prefixes": prefixes, "nextPageToken": name}
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                if not found:
                    items.append(self.describe(name))
                elif prefix + head + delimiter not in prefixes:
                    prefixes.append(prefix + head + delimiter)
        return {"items": items, "prefixes": prefixes}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: object) -> None:
        """Requests are not printed."""

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        if status == 304:
            content = b""  # this answer has none: the client would take it for the beginning of the next one
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        try:
            if url.path.startswith("/batch/"):
                return self._batch(body)
            where = re.fullmatch(r"(/upload|/download|)/storage/v1/b/([^/]+)(/o)?(?:/([^/]+))?(?:/(.*))?", url.path)
            kind, bucket_name, objects, name, action = where.groups()
            if bucket_name not in self.server.buckets:
                raise Refused(404)
            bucket, name = self.server.buckets[bucket_name], unquote(name or "")
            method = "READ" if query.get("alt") == "media" else self.command
            bucket.requests.append((method, name or query.get("name", "")))
            if kind == "/upload":
                return self._upload(bucket, query, body)
            if action and action.startswith("moveTo/o/"):
                return self._json(bucket.move(name, unquote(action.removeprefix("moveTo/o/"))))
            if action:
                to_bucket, to_name = re.fullmatch(r"rewriteTo/b/([^/]+)/o/([^/]+)", action).groups()
                made = self.server.buckets[to_bucket].put(unquote(to_name), bucket.get(name).content, query)
                return self._json({"done": True, "resource": made, "totalBytesRewritten": made["size"]})
            if self.command == "DELETE":
                bucket.delete(name, query)
                return self._answer(204)
            if not objects:
                return self._json({"kind": "storage#bucket", "name": bucket_name})
            if not name:
                return self._json(bucket.list(query))
            if query.get("alt") != "media":
                return self._json(bucket.describe(name))
            self._media(bucket.get(name), query)
        except Refused as refused:
            self._answer(refused.args[0], b'{"error": {"message": "refused"}}')

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

    def _media(self, found: Object, query: dict[str, str]) -> None:
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304)
        if query.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            raise Refused(412)
        headers = {"x-goog-generation": str(found.generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, found.content, **headers)
        size = len(found.content)
        first, last = wanted.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= size:
            raise Refused(416)
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(206, found.content[start:end], **headers)

    def _upload(self, bucket: Bucket, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            done = bucket.continue_upload(query["upload_id"], body, self.headers["Content-Range"])
            return self._answer(308, Range=f"bytes=0-{done - 1}") if isinstance(done, int) else self._json(done)
        if query["uploadType"] == "media":
            return self._json(bucket.put(query["name"], body, query))
        if query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            upload = bucket.begin_upload(name, query)
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket.name}/o?upload_id={upload}"
            return self._answer(200, Location=where)
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, head, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary) + rb"(?:--)?\r?\n?", body)
        parts = [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (head, content)]
        self._json(bucket.put(json.loads(parts[0])["name"], parts[1], query))

    def _batch(self, body: bytes) -> None:
        answers = []
        for bucket, name in re.findall(r"DELETE /storage/v1/b/([^/]+)/o/([^ ?]+)", body.decode()):
            self.server.buckets[bucket].requests.append(("DELETE", unquote(name)))
            try:
                self.server.buckets[bucket].delete(unquote(name), {})
                answers.append("HTTP/1.1 204 No Content")
            except Refused as refused:
                answers.append(f"HTTP/1.1 {refused.args[0]} Refused")
        text = "".join(f"--part\r\nContent-Type: application/http\r\n\r\n{answer}\r\n\r\n" for answer in answers)
        self._answer(200, f"{text}--part--".encode(), Content_Type="multipart/mixed; boundary=part")


class Server(ThreadingHTTPServer):
    """Serves buckets from a thread; a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *names: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = {name: Bucket(name) for name in names}

    @property
    def environment(self) -> dict[str, str]:
        """What gcsfs and tensorstore need to come here, without asking anywhere for credentials."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GS": json.dumps({"token": "anon"}),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is no news; else the traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
