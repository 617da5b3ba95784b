"""SIGKILL between any two file operations of a save, of one process or of two: a run that is killed at every one of
them, in a row.

Each life of the run resumes from what the one before left, trains an iteration, and is killed in the save that follows.
Processes are forked from one that has imported everything, so a life takes about a second.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from sft.launcher.processes import free_port
from sft.launcher.rendezvous import connect
from tests.faults.rows import SEED, Field, Row, forks, newest_step
from tests.faults.waiting import HANG_SECONDS

KEEP, WARM_UP = 2, 3
COMMIT = "rename .writing -> step"
_EVENTS = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir", "os.link": "link"}


class Operations:
    """Counts what this process does to files below `root`, and kills it just before the operation that it is told."""

    def __init__(self, root: Path, kill_before: tuple[str, int] | None = None, dies: Path | None = None) -> None:
        self._root, self._kill_before, self._dies = str(root), kill_before, dies
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.done: list[tuple[str, int]] = []
        self.is_on = True

    def arm(self) -> None:
        sys.addaudithook(self._audit)
        fsync, path_open = os.fsync, Path.open

        def counted_fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self.note(f"fsync {self._short(os.readlink(f'/proc/self/fd/{number}'))}")
            fsync(handle)

        def counted_open(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return path_open(path, mode, *arguments, **options)
            name = self._short(str(path))
            self.note(f"open {name}")
            return _CountedFile(path_open(path, mode, *arguments, **options), name, self)

        mock.patch.object(os, "fsync", counted_fsync).start()
        mock.patch.object(Path, "open", counted_open).start()

    def begin(self) -> None:
        self._counts.clear()
        self.done.clear()
        self.is_on = True

    def note(self, label: str, halfway: Any = None) -> None:
        with self._lock:
            if not self.is_on:
                return
            self._counts[label] += 1
            step = (label, self._counts[label])
            self.done.append(step)
            if step == self._kill_before:
                if halfway is not None:
                    halfway()
                if self._dies is not None:
                    self._dies.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        verb = _EVENTS.get(event)
        if verb is None or not self.is_on:
            return
        names = [self._short(os.fsdecode(given)) for given in arguments[: 2 if verb in ("rename", "link") else 1]]
        if any(names):
            self.note(f"{verb} {' -> '.join(names)}")

    def _short(self, path: str) -> str:
        """The same for every checkpoint and process."""
        if os.path.isabs(path) and not path.startswith(self._root):
            return ""
        path = path.removeprefix(self._root).strip("/") or "."
        path = re.sub(r"\.(writing|removing|damaged)-step-\d+@[^/]*", r".\1", path)
        return re.sub(r"\.latest\.\w+", ".latest", re.sub(r"step-\d{7}", "step", path))


class _CountedFile:
    """A file that is being written: half of the bytes of its last write may be there."""

    def __init__(self, file: Any, name: str, operations: Operations) -> None:
        self._file, self._name, self._operations = file, name, operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _CountedFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        self._operations.note(f"write {self._name}", lambda: self._file.write(data[: len(data) // 2]))
        return self._file.write(data)

    def flush(self) -> None:
        self._operations.note(f"flush {self._name}")
        self._file.flush()


def live(rank: int, port: int, case: dict[str, Any], root: str) -> None:
    """A process's life: resume, train `case['train']` iterations, save and prune after each, be killed where the case
    says.
    """
    world = case["tp"] * case["pp"] * case["dp"]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    import torch

    from sft.checkpoint.commit import find_latest, peers_of, prune
    from sft.checkpoint.resume import restore, save
    from sft.engine.start import start_worker
    from sft.engine.trainer import train
    from sft.spec.errors import CheckpointError
    from tests.distributed import plain
    from tests.distributed.worker import prepare

    torch.set_num_threads(1)
    run = prepare(case, start_worker(connect(HANG_SECONDS / 2), timeout_seconds=HANG_SECONDS / 2))
    peers, folder, out = peers_of(), Path(root) / "run", Path(root) / f"life-{rank}.json"
    found, skipped = find_latest(folder, peers=peers)
    begin = restore(run.pipeline, found, peers) if found is not None else 0
    life: dict[str, Any] = {"begin": begin, "skipped": skipped, "losses": [], "operations": []}
    is_victim = case.get("victim") == rank
    target = tuple(case["kill"]) if is_victim else None
    records = train(
        run.pipeline,
        run.feed,
        run.sampler,
        run.reader,
        rate=lambda k: plain.LR / k,
        start=begin,
        iterations=begin + case["train"],
    )
    operations = Operations(folder, target, Path(root) / "died")  # type: ignore[arg-type]
    operations.is_on = False
    operations.arm()
    for record in records:
        life["losses"].append(record["loss"])
        out.write_text(json.dumps(life))
        if case.get("saves", True):
            operations.begin()
            try:
                save(run.pipeline, folder, iteration=record["iteration"], facts={}, peers=peers)
            except CheckpointError:
                os._exit(3)
            if rank == 0:
                prune(folder, KEEP)
            operations.is_on = False
            life["operations"] = list(operations.done)
    out.write_text(json.dumps(life | {"finished": True}))
    os._exit(0)  # groups are not taken down: a peer may be dead


class Chain:
    """A run of one layout, and its lives."""

    def __init__(self, root: Path, layout: str, context: ForkServerContext) -> None:
        self.root, self._context = root, context
        tp, pp, dp = map(int, layout)
        self.world = tp * pp * dp
        self._case = {"family": "llama", "layers": pp, "tp": tp, "pp": pp, "dp": dp}
        (root / "run").mkdir(parents=True)

    def life(self, **options: Any) -> tuple[list[dict[str, Any]], list[int | None]]:
        """What each rank left, and how it ended (None: it had to be ended)."""
        port = free_port()
        for rank in range(self.world):
            (self.root / f"life-{rank}.json").unlink(missing_ok=True)
        (self.root / "died").unlink(missing_ok=True)
        case = self._case | {"train": 1} | options
        lives = [
            self._context.Process(target=live, args=(rank, port, case, str(self.root))) for rank in range(self.world)
        ]
        for process in lives:
            process.start()
        for process in lives:
            process.join(HANG_SECONDS)
        codes = [process.exitcode for process in lives]
        for process in lives:
            process.kill()
            process.join()
        files = [self.root / f"life-{rank}.json" for rank in range(self.world)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files], codes


def kill_at_boundaries(field: Field, layouts: tuple[str, ...] = ("111", "121", "112")) -> Row:
    """Every boundary of every rank, once each, in a seeded order; a sample of them where the field is small."""
    row, context = Row("SIGKILL between file operations of a save"), forks()
    notes = []
    for layout in layouts[:1] if field.small else layouts:
        root = field.folder(f"boundaries-{layout}")
        targets, reached = _kill_one_by_one(
            row, Chain(root / "killed", layout, context), Chain(root / "whole", layout, context), field
        )
        notes.append(f"{layout}: {reached} of {targets}")
    row.note = f"boundaries of layout (tp pp dp) {', '.join(notes)}"
    return row


def _kill_one_by_one(row: Row, chain: Chain, whole: Chain, field: Field) -> tuple[int, int]:
    """(boundaries there are to be hit, boundaries that were)."""
    first, codes = chain.life(train=WARM_UP)
    assert codes == [0] * chain.world, codes
    targets = [(rank, label, number) for rank, life in enumerate(first) for label, number in life["operations"]]
    commit = first[0]["operations"].index([COMMIT, 1])
    random.Random(SEED).shuffle(targets)
    if field.small:
        targets = _some(targets)
    losses, reached, expected = first[0]["losses"], 0, WARM_UP
    for rank, label, number in targets:
        lives, codes = chain.life(victim=rank, kill=(label, number))
        killed = codes[rank] == -signal.SIGKILL and (chain.root / "died").exists()
        begin = lives[0].get("begin", -1) if lives else -1
        if begin >= 0 and lives[0]["losses"]:
            losses[begin:] = lives[0]["losses"]
        reached += killed
        is_committed = killed and rank == 0 and [label, number] in first[0]["operations"][commit + 1 :]
        wrong = _wrong(chain, codes, rank, begin, expected, killed, is_committed)
        row.count(f"rank {rank} before {label} ({number})", wrong, lost=max(0, expected - begin))
        expected = newest_step(chain.root / "run")
    last, codes = chain.life(train=2)
    losses[last[0]["begin"] :] = last[0]["losses"]
    reference, _ = whole.life(train=len(losses), saves=False)
    if losses != reference[0]["losses"] or last[0]["skipped"] or codes != [0] * chain.world:
        row.wrong.append(
            f"the last life of {chain.root} ended with {codes}, {last[0]['skipped']}, or with other losses than "
            "without a kill"
        )
    left = sorted(path.name for path in (chain.root / "run").iterdir() if not path.name.startswith("step-"))
    if left != ["latest"]:
        row.wrong.append(f"{chain.root} was left with {left}")
    return len(targets), reached


def _wrong(
    chain: Chain, codes: list[int | None], rank: int, begin: int, expected: int, killed: bool, is_committed: bool
) -> str | None:
    if begin != expected:
        return f"resumed after {begin} in place of {expected}"
    if not killed:
        return f"was not killed there: {codes}"
    if None in codes:
        return "a rank outlived it"
    if any(code == 0 for number, code in enumerate(codes) if number != rank) and not is_committed:
        return "the other rank took it for saved"
    if any(code not in (0, 3) for number, code in enumerate(codes) if number != rank):
        return f"exit codes {codes}"
    if newest_step(chain.root / "run") != begin + is_committed:
        return f"visible after it: {newest_step(chain.root / 'run')}"
    return None


def _some(targets: list[tuple[int, str, int]]) -> list[tuple[int, str, int]]:
    """One of each kind, without the many writes of one file."""
    kinds = {label: (rank, label, number) for rank, label, number in targets}
    wanted = ("write .writing/rank", "fsync .writing", COMMIT, "rename .latest", "unlink")
    return [next(target for label, target in kinds.items() if label.startswith(prefix)) for prefix in wanted]
