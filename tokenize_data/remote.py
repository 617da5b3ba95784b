"""Files elsewhere: s3://, gs://, hf://, https:// and whatever else fsspec knows. They are read in pieces as they are
needed, and never stored here.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

from tokenize_data.errors import FailedError, UserError

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://.+")
_BLOCK_BYTES = 8 << 20  # what is fetched at once, and about all that is held of a file
_NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_WILD = re.compile(r"[*?\[]")
_STAMPS = ("ETag", "etag", "generation", "LastModified", "last_modified", "mtime", "blob_id")


@dataclass(frozen=True)
class RemoteFile:
    """`stamp` changes when the file does, as far as its server tells."""

    url: str
    size: int
    stamp: str


def is_url(name: str) -> bool:
    return _URL.fullmatch(name) is not None and not name.startswith("file://")


def files(url: str) -> list[RemoteFile]:
    """The file, those that a pattern names, or all of a folder."""
    system, path = _system(url)
    try:
        if _WILD.search(url.partition("://")[2]) and not url.startswith("http"):
            paths = sorted(system.glob(path))
        elif not url.startswith("http") and system.isdir(path):
            paths = sorted(found for found in system.find(path) if not found.rsplit("/", 1)[-1].startswith((".", "_")))
        else:
            return [_described(system, url, path)]
        if not paths:
            raise UserError(f"{url}: no such file: check the address")
        return [_described(system, system.unstrip_protocol(found), found) for found in paths]
    except (UserError, FailedError):
        raise
    except Exception as error:  # each file system raises kinds of its own
        raise _failed(url, error) from error


def open_file(url: str) -> BinaryIO:
    system, path = _system(url)
    try:
        opened: BinaryIO = system.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
    except Exception as error:
        raise _failed(url, error) from error
    return _Response(url, opened)  # type: ignore[return-value]


def describe(url: str) -> RemoteFile:
    """As it is now."""
    system, path = _system(url)
    try:
        system.invalidate_cache()
        return _described(system, url, path)
    except Exception as error:
        raise _failed(url, error) from error


class _Response:
    """A file whose errors say which one it is."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        return self._try(self._file.read, size)  # type: ignore[no-any-return]

    def readinto(self, buffer: Any) -> int:
        return self._try(self._file.readinto, buffer)  # type: ignore[no-any-return]

    def seek(self, *where: int) -> int:
        return int(self._file.seek(*where))

    def _try(self, work: Any, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except Exception as error:
            raise _failed(self._url, error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns several times of each public bucket
    found = _URL.fullmatch(url)
    assert found is not None, url
    protocol = found["protocol"]
    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, str(path)
    except ImportError as error:
        package = _NEEDS.get(protocol, f"the package for {protocol}://")
        raise UserError(f"{url} needs {package}: pip install 'megasft[remote]'") from error
    except ValueError as error:
        raise UserError(
            f"{url}: no installed package reads {protocol}://: fetch the file, and name it by its path"
        ) from error
    except Exception as error:
        raise _failed(url, error) from error


def _described(system: Any, url: str, path: str) -> RemoteFile:
    facts = system.info(path)
    stamp = next((str(facts[name]) for name in _STAMPS if facts.get(name)), "")
    return RemoteFile(url, int(facts.get("size") or 0), stamp)


def _failed(url: str, error: Exception) -> UserError:
    """What the user can mend is exit code 2; a service out of reach is 3."""
    if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
        error = error.__cause__  # HTTP's "not found" may stand for "no connection"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if url.startswith("hf://") and (refusal := _hub_refusal(url, error)) is not None:
        return refusal
    if isinstance(error, FileNotFoundError):
        return UserError(f"{url}: no such file: check the address")
    if isinstance(error, PermissionError) or "credentials" in reason.lower():
        return UserError(f"{url}: no access ({reason}): check your credentials for it")
    return FailedError(f"{url} cannot be read ({reason}): check the connection, then run again")


def _hub_refusal(url: str, error: Exception) -> UserError | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return UserError(f"{url} is gated on the Hub: accept its terms there, then `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"{url}: the Hub has no such data set, or a private one: check the name, and `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{url}: the data set has no such revision: check what follows the @")
    return None
