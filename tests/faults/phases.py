"""A fault in each phase of a run: signals, a pause, a full disk, a folder that cannot be written to, no memory, a clock
that is set.

A run ends with one line and a right exit code, or goes on as if nothing had been. In either case the same command,
started again where that is needed, ends with the losses of a run that nothing disturbed.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.spec.exit_codes import EXIT_FAILED, EXIT_FINISHED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.faults.points import Fault, environment, wait_for
from tests.faults.rows import CANARIES, RUN, WHOLE, Field, Row, curve, finish, left_behind, run, start, workers_of
from tests.faults.waiting import until

FIRST, VALIDATION, SAVE, COMMIT, EXPORT = "before:1", "validation:1", "write:1", "manifest:1", "export:1"
BEGINNING, TRAINING = "start:1", "iteration:5"
PHASES = (BEGINNING, FIRST, TRAINING, VALIDATION, SAVE, COMMIT, EXPORT)
FLAGS = ["--iters", WHOLE, "--val", "val.jsonl", "--eval_interval", 4, "--save_interval", 3, "--hang_timeout", 3600]
_CAP_DAC_OVERRIDE, _PR_CAPBSET_DROP = 1, 24


@dataclass(frozen=True)
class Try:
    """A fault, on so many processes, and how the run may end."""

    phase: str
    action: str
    codes: tuple[int, ...]
    processes: int = 1
    who: str = "rank 0"


def signals(field: Field) -> Row:
    """The run saves and leaves with 75; one that is being exported is finished."""
    tries = [
        Try(phase, f"signal:{name}", (EXIT_OK,) if phase == EXPORT else (EXIT_PREEMPTED,), processes)
        for phase in PHASES
        for name in ("SIGTERM", "SIGUSR1", "SIGINT")
        for processes in (1, 2)
    ]
    return _row(
        field,
        "signals in each phase",
        tries,
        few=(
            Try(VALIDATION, "signal:SIGINT", (EXIT_PREEMPTED,)),
            Try(BEGINNING, "signal:SIGTERM", (EXIT_PREEMPTED,), 2),
        ),
    )


def full_disks(field: Field) -> Row:
    """No file may grow over a megabyte any more. A save that fails is no end; where nothing can be exported, the end
    says so.
    """
    tries = [
        Try(phase, "files:1000000", (EXIT_OK, EXIT_USER_ERROR, EXIT_FAILED), processes, who)
        for phase in PHASES
        for processes, who in ((1, "rank 0"), (2, "rank 1"))
        if _reaches(who, phase)
    ]
    return _row(field, "full disk in each phase", tries)


def read_only_folders(field: Field) -> Row:
    tries = [
        Try(phase, "readonly:RUN", (EXIT_OK, EXIT_USER_ERROR, EXIT_FAILED), processes)
        for phase in PHASES
        for processes in (1, 2)
    ]
    return _row(field, "read-only folder in each phase", tries)


def no_memory(field: Field) -> Row:
    """A limit as of `ulimit -v`: hardly more than the process has already. The process that runs into it, or its
    launcher, says so.
    """
    codes = (EXIT_OK, EXIT_USER_ERROR, EXIT_FAILED)
    tries = [
        Try(phase, "memory:1000000", codes, 2, who)
        for phase in PHASES
        for who in ("rank 0", "rank 1")
        if _reaches(who, phase)
    ]
    return _row(field, "out of memory in each phase", tries)


def killed_for_memory(field: Field) -> Row:
    """The kernel's OOM killer, by a memory cgroup: the launcher says which signal ended which rank."""
    groups = Path("/sys/fs/cgroup/memory")
    if not os.access(groups, os.W_OK):
        return Row("OOM killer in each phase", note=f"skipped: needs {groups}, writable")
    tries = [
        Try(phase, "cgroup:4000000", (EXIT_OK, EXIT_FAILED), 2, who)
        for phase in PHASES
        for who in ("rank 0", "rank 1")
        if _reaches(who, phase)
    ]
    row = _row(field, "OOM killer in each phase", tries)
    for group in groups.glob("sft-faults-*"):
        group.rmdir()
    return row


def _reaches(who: str, phase: str) -> bool:
    """Rank 0 alone writes the manifest that completes a checkpoint."""
    return phase != COMMIT or who == "rank 0"


def clocks(field: Field) -> Row:
    """The clock on the wall is set, of a worker and of the command: nothing happens."""
    tries = [
        Try(phase, f"clock:{jump}", (EXIT_OK,), 2) for phase in (BEGINNING, TRAINING, COMMIT) for jump in (-1e9, 1e9)
    ]
    tries += [Try("begin:1", f"clock:{jump}", (EXIT_OK,), 2, "main") for jump in (-1e9, 1e9)]
    return _row(field, "clock that is set in each phase", tries)


def pauses(field: Field) -> Row:
    """SIGSTOP, and SIGCONT before the run is held for hanging: nothing happens."""
    tries = [Try(phase, "stop", (EXIT_OK,), processes) for phase in PHASES for processes in (1, 2)]
    return _row(field, "SIGSTOP and SIGCONT in each phase", tries)


def _row(field: Field, fault: str, tries: Sequence[Try], few: Sequence[Try] = ()) -> Row:
    row = Row(fault)
    for number, one in enumerate(few if field.small else tries):
        name = f"{fault.replace(' ', '-')}-{number}"
        row.count(
            f"{one.action} of {one.who} at {one.phase}, {one.processes} processes", _outcome_is_wrong(field, name, one)
        )
    return row


def _outcome_is_wrong(field: Field, name: str, one: Try) -> str | None:
    site, folder = field.site, field.site.root / "checkpoints" / f"{RUN}-{name}"
    fault = Fault(one.phase, field.folder(f"gates/{name}"), one.who, one.action.replace("RUN", str(folder)))
    flags = ["--id", name, *FLAGS, "--nproc_per_node", one.processes]
    prepare = _without_override if one.action.startswith("readonly") else None
    process = start(site, *flags, env=environment(fault), prepare=prepare)
    if not wait_for(fault, process):
        return f"it did not come to {one.phase}: {finish(process)}"
    if one.action == "stop":
        pid = fault.pids()[0]
        until(lambda: _state(pid) == "T")
        os.kill(pid, signal.SIGCONT)
    code, said, errors = finish(process)
    folder.chmod(0o755)
    told = [line for line in errors.splitlines() if not line.startswith(("sft: SIG", "warning"))]
    if code not in one.codes:
        return f"exit code {code}: {said[-300:]} {errors[-500:]}"
    if "Traceback" in errors or (code and len(told) != 1):
        return f"exit code {code} with {len(told)} lines: {errors[-500:]}"
    if not (folder / "hf").is_dir() and code == EXIT_OK:
        return "exit code 0 without a model"
    code, said, errors = run(site, *flags)
    if code not in (EXIT_OK, EXIT_FINISHED):
        return f"started again: exit code {code}: {errors[-400:]}"
    if curve(site.metrics(folder.name)) != curve(_whole(field, one.processes)):
        return "its losses, rates and gradient norms are not those of a run that nothing disturbed"
    left = left_behind(folder)
    shutil.rmtree(folder)
    return f"left behind: {left}" if left else None


def _whole(field: Field, processes: int) -> list[dict[str, object]]:
    name = f"phases{processes}"
    folder = field.site.root / "checkpoints" / f"{RUN}-{name}"
    with field.alone:
        if not (folder / "hf").is_dir():
            code, _, errors = run(field.site, "--id", name, *FLAGS, "--nproc_per_node", processes)
            assert code == 0, errors
    return field.site.metrics(folder.name)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _without_override() -> None:
    """Root may write anywhere; without this capability it may not, as other users."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def process_lists(field: Field) -> Row:
    """Command lines can be read by all users of a machine: no secret is in one, of the command, its workers or its
    tokenisers.
    """
    row = Row("secrets in process lists")
    for processes in (2,) if field.small else (1, 2):
        fault = Fault("iteration:2", field.folder(f"gates/list{processes}"), "rank *")
        flags = ["--id", f"list{processes}", "--iters", 3, "--nproc_per_node", processes, "--hang_timeout", 3600]
        process = start(field.site, *flags, env=environment(fault, **CANARIES))
        is_there = wait_for(fault, process, by=processes)
        lines = (
            {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (process.pid, *workers_of(process.pid))}
            if is_there
            else {}
        )
        fault.open()
        code, _, errors = finish(process)
        for name, canary in CANARIES.items():
            found = [pid for pid, line in lines.items() if canary.encode() in line]
            wrong = (
                f"exit code {code}: {errors[-300:]}"
                if code or not lines
                else f"found in {lines[found[0]]!r}"
                if found
                else None
            )
            row.count(f"{name}, {processes} processes", wrong)
    return row


def swapped_ranks(field: Field) -> Row:
    """Workers that are started one by one, as other launchers do: local ranks in another order than ranks, and changed
    on resume.
    """
    row, folder = Row("swapped ranks"), field.site.root / "checkpoints" / f"{RUN}-swapped"
    fault = Fault("iteration:7", field.folder("gates/swapped"), "rank *", "kill")
    for number, (order, faults) in enumerate(((("0", "1"), [fault]), (("1", "0"), []))):
        codes, errors = _by_hand(field, order, faults)
        expected = {-signal.SIGKILL} if faults else {EXIT_OK}
        row.count(f"start {number + 1}", None if set(codes) == expected else f"exit codes {codes}: {errors[-400:]}")
    if not row.wrong and curve(field.site.metrics(folder.name)) != curve(_whole(field, 2)):
        row.wrong.append("its losses are not those of a run whose ranks stayed")
    return row


def _by_hand(field: Field, local_ranks: tuple[str, str], faults: Sequence[Fault]) -> tuple[list[int], str]:
    from sft.launcher.processes import free_port

    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [
        start(
            field.site, "--id", "swapped", *FLAGS, env=environment(*faults, **place, RANK=str(rank), LOCAL_RANK=local)
        )
        for rank, local in enumerate(local_ranks)
    ]
    ends = [finish(worker) for worker in workers]
    return [code for code, _, _ in ends], "".join(errors for _, _, errors in ends)


Rows = dict[str, Callable[[Field], Row]]
ROWS: Rows = {
    "phases-signals": signals,
    "phases-full": full_disks,
    "phases-readonly": read_only_folders,
    "phases-memory": no_memory,
    "phases-killed": killed_for_memory,
    "phases-clock": clocks,
    "phases-pauses": pauses,
    "process-lists": process_lists,
    "swapped-ranks": swapped_ranks,
}
