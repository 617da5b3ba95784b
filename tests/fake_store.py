"""A small object store: as much of S3's HTTP interface as reading needs, and plain HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


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
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    store.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
        if "list-type" in query:
            return self._send(200, self._listing(path, query), {"Content-Type": "application/xml"}, with_body)
        if path not in self.store.objects:
            return self._send(404, b"<Error><Code>NoSuchKey</Code></Error>", {}, with_body)
        content, status = self.store.objects[path], 200
        headers = {"ETag": self.store.tag(path), "Last-Modified": DATE, "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and with_body:
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
            self.store.asked.append(len(content))
        return self._send(status, content, headers, with_body)

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
