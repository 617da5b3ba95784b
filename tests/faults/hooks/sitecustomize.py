"""Faults inside the commands under test: where this folder is on PYTHONPATH, Python imports this file before anything
else.

SFT_TEST_FAULTS is a JSON list of faults, as tests.faults.points writes it. A process to which one applies meets it at a
point of its progress: at an iteration, in a save, before a file is opened. Nothing here depends on time.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.02
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")  # of the first version of cgroups
# point -> where it is. A point's number counts the calls; those of `before` and `iteration` are the iterations'.
CALLS = {
    "start": ("sft.engine.start", "start_worker"),
    "restore": ("sft.checkpoint.resume", "restore"),
    "validation": ("sft.engine.trainer", "validate"),
    "snapshot": ("sft.checkpoint.resume", "snapshot"),
    "write": ("sft.checkpoint.fragments", "write_fragments"),
    "manifest": ("sft.checkpoint.manifest", "write_manifest"),
    "export": ("sft.checkpoint.export", "export"),
}
ITERATIONS = ("sft.engine.trainer", "train")


class Faults:
    """What this process is to meet, and how far it has come."""

    def __init__(self, given: Sequence[dict[str, Any]]) -> None:
        self._given, self._pid = list(given), os.getpid()
        self._calls: Counter[str] = Counter()

    def arm(self) -> None:
        modules = {module for module, _ in CALLS.values()} | {ITERATIONS[0]}
        sys.meta_path.insert(0, _Wrapping(modules, self._wrap))
        if any(fault["point"] in ("event", "count") for fault in self._given):
            sys.addaudithook(self._audit)
        self.reach("begin", 1)

    def reach(self, point: str, number: int) -> None:
        for fault in self._given:
            if (fault["point"], fault["number"]) == (point, number) and _is_me(fault["who"]):
                act(fault)

    def _wrap(self, module: Any) -> None:
        for point, (name, attribute) in CALLS.items():
            if name == module.__name__:
                setattr(module, attribute, self._called(point, getattr(module, attribute)))
        if module.__name__ == ITERATIONS[0]:
            setattr(module, ITERATIONS[1], self._iterated(getattr(module, ITERATIONS[1])))

    def _called(self, point: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._calls[point] += 1
            self.reach(point, self._calls[point])
            return function(*arguments, **options)

        return call

    def _iterated(self, function: Callable[..., Iterator[dict[str, Any]]]) -> Callable[..., Iterator[dict[str, Any]]]:
        def iterate(*arguments: Any, start: int, **options: Any) -> Iterator[dict[str, Any]]:
            records = function(*arguments, start=start, **options)
            self.reach("before", start + 1)
            for record in records:
                self.reach("iteration", record["iteration"])
                yield record
                self.reach("before", record["iteration"] + 1)

        return iterate

    def _audit(self, event: str, arguments: object) -> None:
        """Every import, file, process and connection is one: moments all over a process's life."""
        if os.getpid() != self._pid or event not in ("open", "import", "compile", "os.rename", "os.remove", "os.mkdir"):
            return
        self._calls["event"] += 1
        number = self._calls["event"]
        for fault in self._given:
            if fault["point"] == "count" and number == 1 and _is_me(fault["who"]):
                atexit.register(self._write_count, Path(fault["gate"], "count"))
        self.reach("event", number)

    def _write_count(self, file: Path) -> None:
        file.write_text(str(self._calls["event"]))


class _Wrapping(importlib.abc.MetaPathFinder):
    """Lets a module's functions be replaced when it has been imported, before anyone has taken them from it."""

    def __init__(self, names: set[str], wrap: Callable[[Any], None]) -> None:
        self._names, self._wrap = names, wrap

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self._names:
            return None
        self._names.discard(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        execute = spec.loader.exec_module  # type: ignore[union-attr]

        def execute_and_wrap(module: Any) -> None:
            execute(module)
            self._wrap(module)

        spec.loader.exec_module = execute_and_wrap  # type: ignore[union-attr,method-assign]
        return spec


def act(fault: dict[str, Any]) -> None:
    gate, action, _, value = Path(fault["gate"]), *fault["action"].partition(":")
    (gate / f"reached-{os.environ.get('RANK', 'main')}").write_text(str(os.getpid()))
    if action == "hold":
        while not (gate / "open").exists():
            time.sleep(POLL_SECONDS)  # handlers of signals run meanwhile
    elif action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "signal":  # to the command, which is this process where it is the only one
        os.kill(_command(), getattr(signal, value))
    elif action == "files":  # a full disk for all but small files
        _lower(resource.RLIMIT_FSIZE, int(value))
    elif action == "memory":  # so many bytes more than it has
        _lower(resource.RLIMIT_AS, 1024 * int(_status("VmSize")) + int(value))
    elif action == "cgroup":  # the kernel kills it when it takes so many bytes more
        _join_group(int(value))
    elif action == "readonly":
        Path(value).chmod(0o555)
    elif action == "clock":
        _jump(float(value))
    else:
        raise AssertionError(action)


def _join_group(limit: int) -> None:
    """A memory cgroup of its own. What the process holds already is not counted there."""
    group = MEMORY_GROUPS / f"sft-faults-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _is_me(who: str) -> bool:
    """`main` is the command; its workers are `rank 0`, `rank 1`, ... and `rank *`; those of a recipe NAME.yaml are `run
    NAME`.

    None is a helper process of multiprocessing.
    """
    rank = os.environ.get("RANK")
    if "--multiprocessing-fork" in sys.orig_argv or any("multiprocessing" in word for word in sys.orig_argv[1:3]):
        return False
    if who.startswith("run "):
        return rank is not None and any(
            word.endswith(f"/{who[4:]}.yaml") for word in [*sys.argv, *_words_of(os.getppid())]
        )
    return rank is None if who == "main" else rank is not None and who in ("rank *", f"rank {rank}")


def _words_of(pid: int) -> list[str]:
    """The command line of the launcher: its workers only have run.json."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _command() -> int:
    return os.getppid() if "SFT_NOTES" in os.environ else os.getpid()


def _lower(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))


def _status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def _jump(seconds: float) -> None:
    """The clock on the wall, as when it is set. time.monotonic goes on as it did."""
    real = time.time
    time.time = lambda: real() + seconds


if "SFT_TEST_FAULTS" in os.environ:
    Faults(json.loads(os.environ["SFT_TEST_FAULTS"])).arm()
