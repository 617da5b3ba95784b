"""A small object store: as much of the HTTP interfaces of S3, Google Cloud Storage and the Hub as reading needs, and
plain HTTP.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Store:
    """`objects` by path, such as bucket/folder/file.jsonl. `asked` are the lengths of the ranges that were read."""

    address: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    change_after: int | None = None  # reads; then the tags of all objects are others

    def tag(self, path: str) -> str:
        changed = self.change_after is not None and len(self.asked) > self.change_after
        return f'"{hashlib.md5(self.objects[path] + b"changed" * changed).hexdigest()}"'


@contextlib.contextmanager
def running() -> Iterator[Store]:
    store = Store()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients may leave before they have read an answer."""


class _Handler(BaseHTTPRequestHandler):
    store: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).strip("/"), parse_qs(parts.query, keep_blank_values=True)
        if google := re.fullmatch(r"(?:download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", path):
            return self._google(google[1], google[2], query, with_body)
        if hub := re.fullmatch(r"api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(?:/(.*))?)?", path):
            return self._hub(hub[1], hub[2] or "revision", hub[3] or "", with_body)
        path = re.sub(r"^datasets/([^/]+/[^/]+)/resolve/[^/]+/", r"\1/", path)
        if "list-type" in query:
            return self._send(200, self._listing(path, query), {"Content-Type": "application/xml"}, with_body)
        if path not in self.store.objects:
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", {}, with_body)
        return self._content(path, with_body)

    def _content(self, path: str, with_body: bool) -> None:
        content, status = self.store.objects[path], 200
        headers = {
            "ETag": self.store.tag(path),
            "Last-Modified": DATE,
            "Accept-Ranges": "bytes",
            "X-Repo-Commit": COMMIT,
        }
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and with_body:
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
            self.store.asked.append(len(content))
        return self._send(status, content, headers, with_body)

    def do_POST(self) -> None:
        """The Hub's question about paths."""
        words = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(words)["paths"] if words.startswith("{") else parse_qs(words)["paths"]
        repository = unquote(urlsplit(self.path).path).split("/api/datasets/")[1].split("/paths-info/")[0]
        self._json([fact for path in asked for fact in self._entries(repository, path) if fact["path"] == path])

    def _json(self, content: Any, status: int = 200, with_body: bool = True) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)

    def _google(self, bucket: str, name: str | None, query: dict[str, list[str]], with_body: bool) -> None:
        paths = sorted(path for path in self.store.objects if path.startswith(f"{bucket}/"))
        facts = {path.removeprefix(f"{bucket}/"): self._google_object(bucket, path) for path in paths}
        if name is None:
            prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
            found = {key: fact for key, fact in facts.items() if key.startswith(prefix)}
            below = {key: prefix + key[len(prefix) :].split("/")[0] + "/" for key in found if "/" in key[len(prefix) :]}
            folders = sorted(set(below.values())) if delimiter else []
            items = [fact for key, fact in found.items() if not (delimiter and key in below)]
            return self._json({"kind": "storage#objects", "items": items, "prefixes": folders}, with_body=with_body)
        if name not in facts:
            return self._json({"error": {"code": 404, "message": "Not Found"}}, 404, with_body)
        if query.get("alt") != ["media"]:
            return self._json(facts[name], with_body=with_body)
        return self._content(f"{bucket}/{name}", with_body)

    def _google_object(self, bucket: str, path: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": path.removeprefix(f"{bucket}/"),
            "size": str(len(self.store.objects[path])),
            "etag": self.store.tag(path).strip('"'),
            "generation": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def _hub(self, repository: str, what: str, path: str, with_body: bool) -> None:
        if what == "revision":
            files = [{"rfilename": entry["path"]} for entry in self._entries(repository, "") if entry["type"] == "file"]
            if not files:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
            return self._json({"id": repository, "sha": COMMIT, "siblings": files}, with_body=with_body)
        inside = [entry for entry in self._entries(repository, path) if entry["path"] != path]
        return self._json(inside, with_body=with_body)

    def _entries(self, repository: str, below: str) -> list[dict[str, Any]]:
        """Files and folders of a repository, below a folder or of that path."""
        found: dict[str, dict[str, Any]] = {}
        for path, content in sorted(self.store.objects.items()):
            name = path.removeprefix(f"{repository}/")
            if not path.startswith(f"{repository}/") or not (
                name == below or name.startswith(f"{below}/" if below else "")
            ):
                continue
            oid = self.store.tag(path).strip('"')
            for depth in range(1, name.count("/") + 1):
                folder = "/".join(name.split("/")[:depth])
                found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            found[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
        return [entry for entry in found.values() if not below or entry["path"].startswith(below)]

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        keys = sorted(path.removeprefix(f"{bucket}/") for path in self.store.objects if path.startswith(f"{bucket}/"))
        keys = [key for key in keys if key.startswith(prefix)]
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
        files = [key for key in keys if not delimiter or "/" not in key[len(prefix) :]]
        entries = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.store.tag(f'{bucket}/{key}'))}</ETag><Size>{len(self.store.objects[f'{bucket}/{key}'])}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key in files
        ]
        common = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        head = f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
        count = f"<KeyCount>{len(files)}</KeyCount><MaxKeys>1000</MaxKeys>"
        body = "".join([*entries, *(common if delimiter else [])])
        return f'<?xml version="1.0"?><ListBucketResult>{head}{count}{body}</ListBucketResult>'.encode()
