"""A Google Cloud Storage that runs in this process: the requests of gcsfs, of TensorStore and of Google's client.

Unlike `tests.object_store`, which stands in for fsspec within a process, it is reached over HTTP, by any process.
"""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import json
import re
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

# operation ("read", "write", "stat", "list", "copy" or "delete") and name of the object -> "" or a fault: "503",
# "403", "slow", or for reads "truncate", which promises all bytes, sends half of them and closes the connection.
Fault = Callable[[str, str], str]

_ERRORS = {
    "403": "me@example.com does not have storage.objects.create access to the Google Cloud Storage object.",
    "503": "We encountered an internal error. Please try again.",
}


class Blob(NamedTuple):
    data: bytes
    generation: int


class Bucket:
    """One bucket, `gs://bucket`: `blobs` by name, and counts of the requests by operation and of the faults."""

    def __init__(self) -> None:
        self.blobs: dict[str, Blob] = {}
        self.counts: Counter[str] = Counter()
        self.fault: Fault = lambda operation, name: ""
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable, by number
        self.lock = threading.Lock()
        self.address = ""
        self._generation = 0

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which gcsfs, Google's client and TensorStore of a child process find this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "FSSPEC_GS_TOKEN": "anon",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anon",
            "NO_GCE_CHECK": "true",
            # The kind of a bucket is asked over gRPC, which this server does not speak.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        with self.lock:
            self._generation += 1
            self.blobs[name] = Blob(data, self._generation)
            return self.resource(name)

    def resource(self, name: str) -> dict[str, Any]:
        data, generation = self.blobs[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }


@contextmanager
def serving() -> Iterator[Bucket]:
    """Serve an empty bucket on a free port of this machine until the block ends."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with _Server(("localhost", 0), handler) as server:
        bucket.address = f"http://localhost:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield bucket
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what this server does wrong, and nothing of a client that was killed or that hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def log_message(self, *_: Any) -> None:
        """Keep the output of the tests clean."""

    def do_GET(self) -> None:
        path, query = self._split()
        if path == "/storage/v1/b/bucket":
            self._answer({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
        elif path == "/storage/v1/b/bucket/o":
            self._faulty("list", query.get("prefix", "")) or self._list(query)
        elif name := self._object(path):
            kind = "read" if query.get("alt") == "media" else "stat"
            fault = self._fault(kind, name)
            if fault in _ERRORS:
                self._error(int(fault), _ERRORS[fault])
            elif name not in self.bucket.blobs:
                self._error(404, f"No such object: bucket/{name}")
            elif kind == "stat":
                self._answer(self.bucket.resource(name))
            else:
                self._read(self.bucket.blobs[name], query, truncate=fault == "truncate")
        else:
            self._error(404, path)

    def do_POST(self) -> None:
        path, query = self._split()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/upload/storage/v1/b/bucket/o":
            self._upload(query, body)
        elif match := re.fullmatch(r"/storage/v1/b/bucket/o/(.+)/(rewriteTo|copyTo|moveTo)(?:/b/bucket)?/o/(.+)", path):
            self._copy(urllib.parse.unquote(match[1]), urllib.parse.unquote(match[3]), move=match[2] == "moveTo")
        else:
            self._error(404, path)

    do_PUT = do_POST  # the parts of a resumable upload

    def do_DELETE(self) -> None:
        path, _ = self._split()
        name = self._object(path)
        if self._faulty("delete", name):
            return
        with self.bucket.lock:
            found = self.bucket.blobs.pop(name, None)
        self._send(204, b"") if found else self._error(404, f"No such object: bucket/{name}")

    def _split(self) -> tuple[str, dict[str, str]]:
        parts = urllib.parse.urlsplit(self.path)
        return parts.path, dict(urllib.parse.parse_qsl(parts.query))

    @staticmethod
    def _object(path: str) -> str:
        match = re.fullmatch(r"(?:/download)?/storage/v1/b/bucket/o/([^/]+)", path)
        return urllib.parse.unquote(match[1]) if match else ""

    def _fault(self, operation: str, name: str) -> str:
        with self.bucket.lock:
            fault = self.bucket.fault(operation, name)
            self.bucket.counts.update([operation, *filter(None, [fault])])
        if fault == "slow":
            time.sleep(0.5)
        return fault

    def _faulty(self, operation: str, name: str) -> bool:
        fault = self._fault(operation, name)
        if fault in _ERRORS:
            self._error(int(fault), _ERRORS[fault])
        return fault in _ERRORS

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        items, prefixes = [], set()
        with self.bucket.lock:
            for name in sorted(self.bucket.blobs):
                if not name.startswith(prefix) or not start <= name < end:
                    continue
                below = name.removeprefix(prefix)
                if delimiter and delimiter in below:
                    prefixes.add(prefix + below.partition(delimiter)[0] + delimiter)
                else:
                    items.append(self.bucket.resource(name))
        self._answer({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _read(self, blob: Blob, query: dict[str, str], *, truncate: bool) -> None:
        data, size, status, headers = blob.data, len(blob.data), 200, {}
        if query.get("ifGenerationNotMatch") == str(blob.generation):
            return self._send(304, b"")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
            if first >= size:
                return self._error(416, "The requested range cannot be satisfied.")
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        headers |= {"X-Goog-Generation": str(blob.generation), "Content-Type": "application/octet-stream"}
        return self._send(status, data, headers, truncate=truncate)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        if number := query.get("upload_id"):
            return self._append(number, body)
        name, data = query.get("name", ""), body
        if query["uploadType"] == "multipart":
            header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.message_from_bytes(header + body, policy=email.policy.HTTP)
            name = json.loads(next(message.iter_parts()).get_payload(decode=True))["name"]
            boundary = b"\n--" + str(message.get_boundary()).encode()
            # Line ends of the data are kept, which the parser of mail would not do.
            data = re.split(rb"\r?\n\r?\n", body, maxsplit=2)[2].rsplit(boundary, 1)[0]
        if self._faulty("write", name):
            return None
        if query["uploadType"] == "resumable":
            number = str(len(self.bucket.uploads) + 1)
            self.bucket.uploads[number] = (name, bytearray())
            location = f"{self.bucket.address}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}"
            return self._send(200, b"", {"Location": location})
        wanted = query.get("ifGenerationMatch")
        found = self.bucket.blobs.get(name)
        if wanted is not None and wanted != str(found.generation if found else 0):
            return self._error(412, "At least one of the pre-conditions you specified did not hold.")
        return self._answer(self.bucket.put(name, data))

    def _append(self, number: str, body: bytes) -> None:
        name, data = self.bucket.uploads[number]
        if self._faulty("write", name):
            return None
        data += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(data) < int(total):
            return self._send(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        return self._answer(self.bucket.put(name, bytes(data)))

    def _copy(self, source: str, target: str, *, move: bool) -> None:
        if self._faulty("copy", target):
            return None
        if source not in self.bucket.blobs:
            return self._error(404, f"No such object: bucket/{source}")
        resource = self.bucket.put(target, self.bucket.blobs[source].data)
        if move:
            del self.bucket.blobs[source]
        rewritten = {"kind": "storage#rewriteResponse", "done": True, "resource": resource}
        return self._answer(resource if move else rewritten)

    def _answer(self, content: dict[str, Any]) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _error(self, status: int, message: str) -> None:
        content = {"error": {"code": status, "message": message}}
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json; charset=UTF-8"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, truncate: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if truncate:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif status not in (204, 304):
            self.wfile.write(data)
