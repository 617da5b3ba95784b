"""JSON over HTTP to a server that may be slow, busy or broken: retries with back-off, a rate limit, a key that is never
shown.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tokenize_data.errors import UserError, shorten

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_MOST_WAIT_SECONDS = 60.0
_MOST_BYTES, _MOST_ERROR_BYTES = 32 * 2**20, 64 * 2**10  # limits for an answer, and for the page that explains an error
_RETRY_AFTER = re.compile(r"[0-9]+(\.[0-9]*)?")
Item = TypeVar("Item")
Result = TypeVar("Result")


class ServerError(Exception):
    """One request failed permanently; others may succeed. `status` is None if the server did not answer with HTTP."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class Client:
    """A client for one server, usable from several threads. `url` may end with /v1 or not."""

    url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 120.0
    retries: int = 6
    first_wait_seconds: float = 1.0
    per_minute: float = float("inf")
    stopped: threading.Event = field(
        default_factory=threading.Event, repr=False
    )  # once set, no thread waits or retries
    _next: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{self.url} is not a server address: write it as http://localhost:8000/v1")
        if parts.username or parts.password:
            raise UserError("the server's address holds a password: put the key into the environment instead")
        if not self.per_minute > 0:
            raise UserError(f"{self.per_minute:g} requests a minute: it must be above 0")
        self.url = self.url.rstrip("/")
        if not self.url.endswith("/v1") and not parts.path.strip("/"):
            self.url += "/v1"

    def post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """Post and return the server's object. Temporary errors are retried, permanent ones raised."""
        return self._request(path, json.dumps(content).encode())

    def get(self, path: str) -> dict[str, Any]:
        return self._request(path, None)

    def _request(self, path: str, data: bytes | None) -> dict[str, Any]:
        wait_seconds = self.first_wait_seconds
        for attempt in range(self.retries + 1):
            self._take_turn()
            try:
                return self._once(path, data)
            except ServerError as error:
                may_pass = error.status is None or error.status in _AGAIN
                if not may_pass or attempt == self.retries or self.stopped.is_set():
                    raise
                asked = getattr(error, "retry_after", None)
                self.stopped.wait(
                    min(_MOST_WAIT_SECONDS, asked if asked is not None else wait_seconds * random.uniform(0.75, 1.25))
                )
                wait_seconds = min(wait_seconds * 2, _MOST_WAIT_SECONDS)
        raise AssertionError("unreachable")

    def _take_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 60.0 / self.per_minute
        self.stopped.wait(max(0.0, at - now))
        if self.stopped.is_set():
            raise ServerError("stopped before it was asked")

    def _once(self, path: str, data: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers={"Content-Type": "application/json"})
        key = os.environ.get(self.key_variable)
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # the key must not go to another host
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                content = json.loads(self._body(response, path))
        except urllib.error.HTTPError as error:
            raise self._of_status(error, path) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                self._without_key(f"{self.url}/{path}: {type(error).__name__}: {shorten(str(reason), 120)}")
            ) from None
        except (ValueError, RecursionError):
            raise ServerError(f"{self.url}/{path}: the answer is not JSON") from None
        if not isinstance(content, dict):
            raise ServerError(f"{self.url}/{path}: the answer is not an object")
        return content

    def _body(self, response: http.client.HTTPResponse, path: str) -> bytes:
        """Read the whole answer. One that does not end, or arrives too slowly, is an error."""
        deadline, parts, size = time.monotonic() + self.timeout_seconds, [], 0
        while part := response.read1(2**20):
            parts.append(part)
            size += len(part)
            if size > _MOST_BYTES:
                raise ServerError(f"{self.url}/{path}: the answer is longer than {_MOST_BYTES // 2**20} MB")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.url}/{path}: the answer was incomplete after {self.timeout_seconds:g} s")
        return b"".join(parts)

    def _of_status(self, error: urllib.error.HTTPError, path: str) -> ServerError:
        with error:
            try:
                body = error.read(_MOST_ERROR_BYTES).decode(errors="replace")
            except (OSError, http.client.HTTPException):
                body = ""
        made = ServerError(
            self._without_key(f"{self.url}/{path}: {error.code} {error.reason}: {shorten(body, 200)}"), error.code
        )
        after = error.headers.get("Retry-After", "") if error.headers else ""
        if _RETRY_AFTER.fullmatch(after):  # servers may send a date instead
            made.retry_after = float(after)  # type: ignore[attr-defined]
        return made

    def _without_key(self, text: str) -> str:
        """The message without the key: some servers repeat a rejected key."""
        key = os.environ.get(self.key_variable)
        if not key:
            return text
        text = text.replace(key, "[key]")
        return text if len(key) < 12 else text.replace(key[:8], "[key]").replace(key[-8:], "[key]")


def in_parallel(
    client: Client, work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | ServerError]]:
    """Yield each item with its result as they finish. If this is interrupted, the client's retries end too."""
    pending: dict[Future[Result], Item] = {}
    waiting = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(pending) < workers * 2 and (item := next(waiting, None)) is not None:
                pending[pool.submit(work, item)] = item
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                item = pending.pop(future)
                try:
                    yield item, future.result()
                except ServerError as error:
                    yield item, error
    except BaseException:  # including GeneratorExit: the caller was interrupted
        client.stopped.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
