"""A Hugging Face hub that runs in this process: the requests of a push, over HTTP, with large files as Git LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "token"
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")
LARGE = 1000  # bytes; a larger file is an LFS file, as one of 10 MB is on the hub


class Hub:
    """Repositories by "models/USER/NAME", LFS objects by SHA-256, and the requests that came."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[list[str]] = []  # the paths of each
        self.puts: Counter[str] = Counter()  # bytes that arrived, by SHA-256
        self.address = ""
        # Number of a PUT, from 0 -> whether its connection breaks after half of the bytes; it may also wait.
        self.breaks: Callable[[int], bool] = lambda number: False
        self._lock = threading.Lock()
        self._count = 0

    def create(self, repository: str, *, private: bool = False) -> None:
        self.files.setdefault(repository, {})
        self.private.setdefault(repository, private)

    @property
    def environ(self) -> dict[str, str]:
        """The variables by which huggingface_hub of a child process finds this server."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}

    def number(self) -> int:
        with self._lock:
            self._count += 1
            return self._count - 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._body()
        repository = self.path.partition("?")[0].removeprefix("/api/")
        if not self._allowed():
            return
        if repository not in self.hub.files:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        name = repository.partition("/")[2]
        siblings = [{"rfilename": path} for path in self.hub.files[repository]]
        fields = {"id": name, "modelId": name, "sha": "0" * 40, "siblings": siblings, "tags": []}
        self._answer(200, fields | {"private": self.hub.private[repository]})

    def do_POST(self) -> None:
        body = self._body()
        if not self._allowed():
            return
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.create(f"{asked.get('type', 'model')}s/{name}", private=asked.get("visibility") == "private")
            self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name})
        elif path.endswith("/preupload/main"):
            self._answer(200, {"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer(200, {"objects": [self._action(each) for each in json.loads(body)["objects"]]})
        else:
            self._commit(path.removeprefix("/api/").removesuffix("/commit/main"), body)

    def do_PUT(self) -> None:
        oid, length = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        broken = self.hub.breaks(self.hub.number())
        data = self.rfile.read(length // 2 if broken else length)
        self.hub.puts[oid] += len(data)
        if broken:
            self.close_connection = True
            self.connection.close()
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self._answer(200, {})

    def _validate(self, card: str) -> None:
        front = card.split("---\n")[1]
        known = any(f"license: {licence}\n" in front for licence in LICENCES)
        message = '"license" must be one of [apache-2.0, mit]\nsee the documentation'
        fields = {"errors": [] if known else [{"message": message}], "warnings": []}
        plain = message.encode() if self.headers["Accept"] == "text/plain" and not known else b""
        self._answer(200 if known else 400, fields, data=plain)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] > LARGE else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _action(self, each: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": each["oid"], "size": each["size"]}
        if each["oid"] in self.hub.objects:
            return known
        return known | {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}", "header": {}}}}

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.hub.files[repository]
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits.append([line["value"]["path"] for line in lines if line["key"] != "header"])
        self._answer(200, {"commitUrl": f"{self.hub.address}/{repository}/commit/1", "commitOid": "1" * 40})

    def _allowed(self) -> bool:
        self.hub.requests.append(f"{self.command} {self.path}")
        given = self.headers.get("Authorization", "Bearer token")  # the card is validated by anybody
        if given == f"Bearer {TOKEN}":
            return True
        if given == "Bearer reader" and self.path != "/api/repos/create":
            return True
        if given == "Bearer reader":
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._answer(401, {"error": "Invalid credentials in Authorization header"}, message)
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, fields: dict[str, Any], headers: dict[str, str] | None = None, data: bytes = b""
    ) -> None:
        data = data or json.dumps(fields).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test reads `Hub.requests`."""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Yields a hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
