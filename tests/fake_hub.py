"""A Hub on this machine: the part of its HTTP interface that an upload uses, with files kept in memory, and failures on
demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What it was given, and at which request it is to fail next."""

    url: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    fail_at: str | None = None  # a part of a path
    accepted: set[str] = field(default_factory=set)  # tokens of `whoami`
    asked: list[str] = field(default_factory=list)

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name]["files"]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path != "/api/whoami-v2":
            self._answer(404, {"error": "not found"})
        elif (self.headers.get("Authorization") or "").removeprefix("Bearer ") in self.state.accepted:
            role = {"displayName": "mine", "role": "write"}
            self._answer(200, {"name": "someone", "auth": {"accessToken": role}})
        else:
            self._answer(401, {"error": "Invalid credentials"})

    def do_PUT(self) -> None:
        body = self._body()
        self.state.blobs[hashlib.sha256(body).hexdigest()] = body
        self._answer(200, {})

    def do_POST(self) -> None:
        state, path, body = self.state, self.path, self._body()
        state.asked.append(path)
        state.tokens.add(self.headers.get("authorization"))
        if state.fail_at is not None and state.fail_at in path:
            self._answer(403, {"error": "you may not do that"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private") is True or asked.get("visibility") == "private"
            is_new = name not in state.repositories
            state.repositories.setdefault(name, {"private": private, "files": {}, "commits": 0})
            self._answer(200 if is_new else 409, {"url": f"{state.url}/{name}", "id": name, "name": name})
        elif path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            kinds = {True: "lfs", False: "regular"}
            modes = [
                {"path": name, "uploadMode": kinds[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in (file["path"] for file in asked)
            ]
            self._answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": file["oid"],
                    "size": file["size"],
                    "actions": {"upload": {"href": f"{state.url}/lfs/{file['oid']}"}},
                }
                for file in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        elif path.endswith("/commit/main"):
            self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        else:
            self._answer(404, {"error": f"no {path}"})

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.state.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.state.blobs[value["oid"]]
        repository["commits"] += 1
        oid = f"{repository['commits']:040d}"
        self._answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, code: int, content: Any, kind: str = "application/json") -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - http.server's name
        pass
