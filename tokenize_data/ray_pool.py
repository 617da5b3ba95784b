"""The pool of `pool.py` on a Ray cluster: the same chunks are converted by actors, and come back in the same order.

Files are read here, and chunks are sent: nodes need neither the files nor a shared folder, only the same versions of
the packages. A worker that is lost is replaced, and its chunk is converted again.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any, TypeVar

from tokenize_data import guard
from tokenize_data.errors import FailedError, UserError, shorten
from tokenize_data.pool import MOST_AHEAD, SECONDS_FOR_A_TASK

_PACKAGES = ("numpy", "pyarrow", "tokenizers", "tiktoken", "jinja2")
_SECONDS_TO_CONNECT = 10
_MOST_RESTARTS = 2  # of each worker; a row that kills it again is not tried for ever
Task = TypeVar("Task")
Result = TypeVar("Result")
Say = Callable[[str], None]


def ordered_map(
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int | None, say: Say
) -> Iterator[Result]:
    """Map over `workers` processes of the cluster (None: as many as it has CPUs), in order."""
    ray = _import()
    with _connected(ray, workers) as where:
        count = workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        say(f"Ray: {count} worker{'s' if count > 1 else ''} on {where}")
        actors, stored = _actors(ray, count), ray.put(work)
        yield from _dispatch(ray, iter(tasks), actors, lambda actor, task: actor.run.remote([stored], task))


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as it will be; otherwise it warns
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'megasft[ray]', here and on all nodes") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, workers: int | None) -> Iterator[str]:
    """Connect to the cluster of RAY_ADDRESS or to a running one; otherwise start one on this machine."""
    if ray.is_initialized():
        yield "the cluster of this program"
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    given = os.environ.get("RAY_ADDRESS")
    _check_reachable(given)
    try:
        ray.init(address=given or "auto", **quiet)
        where = f"the cluster at {given or ray.get_runtime_context().gcs_address}"
    except Exception as error:  # of several kinds, by address
        if given or not isinstance(error, ConnectionError):
            raise FailedError(f"Ray at {given or 'auto'} cannot be reached ({shorten(error, 160)})") from error
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        where = "this machine: no running cluster was found, and RAY_ADDRESS names none"
    try:
        yield where
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)", address or "")
    if found is None:
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), _SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise FailedError(
            f"Ray at {address} cannot be reached ({error.strerror or error}): check RAY_ADDRESS, and that its head runs"
        ) from error


def _actors(ray: Any, count: int) -> list[Any]:
    kind = ray.remote(num_cpus=1, max_restarts=_MOST_RESTARTS, max_task_retries=_MOST_RESTARTS)(_Worker)
    actors = [kind.remote() for _ in range(count)]
    here = _versions()
    try:
        found = ray.get([actor.versions.remote() for actor in actors])
    except ray.exceptions.RayError as error:
        raise FailedError(
            f"Ray's workers cannot start ({shorten(error, 200)}): install megasft, in one version, on all nodes"
        ) from error
    for host, there in found:
        for name, version in there.items():
            if version != here[name]:
                raise UserError(
                    f"Ray's worker on {host} has {name} {version}, this machine has {here[name]}: install one version "
                    "on all nodes"
                )
    return actors


def _dispatch(ray: Any, tasks: Iterator[Any], actors: list[Any], begin: Callable[[Any, Any], Any]) -> Iterator[Any]:
    """As in `pool.py`: a worker that takes long does not let the others pile up results."""
    idle, busy, finished = deque(actors), {}, {}
    due = sent = 0
    is_more = True
    while True:
        while is_more and idle and sent < due + MOST_AHEAD * len(actors):
            task = next(tasks, None)
            if task is None:
                is_more = False
            else:
                actor = idle.popleft()
                busy[begin(actor, task)] = (sent, actor)
                sent += 1
        if not busy:
            return
        (done, *_), _ = ray.wait(list(busy), num_returns=1)
        number, actor = busy.pop(done)
        finished[number] = _result(ray, done)
        idle.append(actor)
        while due in finished:
            yield finished.pop(due)
            due += 1


def _result(ray: Any, done: Any) -> Any:
    try:
        result = ray.get(done)
    except ray.exceptions.RayActorError as error:
        raise FailedError(
            f"a worker of Ray was lost {_MOST_RESTARTS + 1} times: a node or its memory is gone, or the template or "
            "the tokenizer does not finish on a row: tokenise on one machine, without --engine ray, to see which"
        ) from error
    except ray.exceptions.RayError as error:
        raise FailedError(f"Ray failed ({shorten(error, 200)}): see its logs, then run the same command") from error
    if isinstance(result, BaseException):
        raise result
    return result


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    from tokenize_data import __version__

    return {name: found.get(name, "none") for name in _PACKAGES} | {
        "megasft": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


class _Worker:
    """An actor: one process of the cluster. It fetches the work once, again after a restart."""

    def __init__(self) -> None:
        guard.may_be_killed()
        self._work: Any = None

    def versions(self) -> tuple[str, dict[str, str]]:
        return platform.node(), _versions()

    def run(self, stored: list[Any], task: Any) -> Any:
        try:
            if self._work is None:
                import ray

                self._work = ray.get(stored[0])
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_FOR_A_TASK)
            return self._work(task)
        except BaseException as error:
            return error
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
