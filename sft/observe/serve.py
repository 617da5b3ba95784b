"""Serves the report of running runs on localhost; the page refreshes every two seconds."""

from __future__ import annotations

from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from sft.observe import report
from tokenize_data.errors import UserError

_HERE = ("127.0.0.1", "localhost")


def _host_of(header: str) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:  # such as an unclosed bracket
        return None


def make_server(folders: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Create the server without starting it. Port 0 selects a free port."""
    for folder in folders:
        report.run_facts(folder)  # report errors now, not on the page

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if _host_of(self.headers.get("Host", "")) not in _HERE:  # a foreign page under our address
                self._send(403, "text/plain", "only for this machine")
                return
            path = self.path.partition("?")[0]
            try:
                if path == "/":
                    self._send(200, "text/html; charset=utf-8", report.page(folders, is_live=True))
                elif path == "/data.json":
                    self._send(200, "application/json", report.as_json(folders, is_live=True))
                else:
                    self._send(404, "text/plain", "not here")
            except UserError as error:
                self._send(500, "text/plain; charset=utf-8", str(error))
            except (BrokenPipeError, ConnectionResetError):
                pass

        def _send(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class's name
            """Log nothing per request."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(
            f"--port {port} cannot be used ({error.strerror}): give another, or 0 for any that is free"
        ) from error
    server.daemon_threads = True
    return server
