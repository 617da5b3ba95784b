"""What the campaign's parts have in common: a row of its table, the folder they work in, processes from outside."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.distributed.site import Site, make_site
from tests.faults.waiting import HANG_SECONDS
from tests.real_parts import smollm2_tokenizer

SEED = 20
WHOLE = 30  # iterations of the run that nothing disturbs
CANARIES = {
    name: f"canary-{number}-7f3b1c"
    for number, name in enumerate(("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"))
}
RUN = "llama-base-orders-seq256"
FLAGS = ["--checkpoint", "base", "--run_name", "orders", "--global_batch", "12", "--lr", "1e-3", "--seq", "256"]
TWO = ["--nproc_per_node", "2", "--save_interval", "3"]


@dataclass
class Row:
    """A fault, how often it was tried, and what came of it."""

    fault: str
    tries: int = 0
    survived: int = 0
    lost: int = 0  # iterations beyond the last commit
    note: str = ""
    wrong: list[str] = field(default_factory=list)

    def count(self, what: str, wrong: str | None, lost: int = 0) -> None:
        """A try of `what`, and what was wrong with its end."""
        self.tries += 1
        self.survived += wrong is None and not lost
        self.lost += lost
        if wrong is not None or lost:
            self.wrong.append(f"{what}: {wrong or f'{lost} iterations lost'}")

    @property
    def is_good(self) -> bool:
        return not self.wrong and (self.tries > 0 or self.note.startswith("skipped"))


class Field:
    """A folder for all rows, with a tiny base model and its tokenised data, made when first asked for."""

    def __init__(self, root: Path, *, small: bool = False) -> None:
        self.root, self.small = root, small
        self._lock = threading.Lock()
        self.alone = threading.Lock()  # for what several rows need, and one of them makes
        self._whole: dict[int, tuple[list[dict[str, Any]], str]] = {}

    def folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def site(self) -> Site:
        with self._lock:
            return self._site

    def whole(self, iterations: int = WHOLE) -> tuple[list[dict[str, Any]], str]:
        """(metrics, all that was said) of a run that nothing disturbs, with secrets in its environment."""
        site = self.site
        with self._lock:
            if iterations not in self._whole:
                flags = ["--id", f"whole{iterations}", "--iters", iterations, *TWO]
                code, said, errors = run(site, *flags, env=CANARIES)
                assert code == 0, errors
                self._whole[iterations] = (site.metrics(f"{RUN}-whole{iterations}"), said + errors)
        return self._whole[iterations]

    @cached_property
    def _site(self) -> Site:
        site = make_site(self.folder("site"), smollm2_tokenizer())
        command = [
            "-m",
            "tokenize_data",
            "--checkpoint",
            "base",
            "--run_name",
            "orders",
            "--data",
            "train.jsonl",
            "--seq",
            "256",
        ]
        subprocess.run(
            [sys.executable, *command], cwd=site.root, env=site.environment(), check=True, capture_output=True
        )
        return site


def forks() -> ForkServerContext:
    """Processes that are forked from one in which everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    modules = [
        "torch",
        "deepspeed",
        "tests.distributed.worker",
        "sft.checkpoint.resume",
        "tests.faults.boundaries",
        "tests.faults.starts",
    ]
    context.set_forkserver_preload(modules)
    return context


def start(
    site: Site, *flags: object, env: dict[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """A run of the whole command. Its words are kept in pipes."""
    command = [sys.executable, "-m", "sft", *FLAGS, *map(str, flags)]
    return subprocess.Popen(
        command,
        cwd=site.root,
        env=site.environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(process: subprocess.Popen[str], seconds: float = HANG_SECONDS) -> tuple[int, str, str]:
    """(exit code, output, errors); killed where it hangs."""
    try:
        said, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, errors = process.communicate()
        return -1, said, f"{errors}\nit did not end within {seconds:.0f} s"
    return process.returncode, said, errors


def run(site: Site, *flags: object, **options: object) -> tuple[int, str, str]:
    return finish(start(site, *flags, **options))  # type: ignore[arg-type]


def workers_of(launcher: int) -> list[int]:
    """Its worker processes, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] != str(launcher):
                continue
            environment = dict(
                entry.split("=", 1) for entry in (folder / "environ").read_text().split("\0") if "=" in entry
            )
        except OSError:
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def iterations_done(site: Site, name: str) -> int:
    """The last iteration in a run's metrics.jsonl, torn lines left out; 0 where there is none."""
    file = site.root / "checkpoints" / f"{RUN}-{name}" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def newest_step(folder: Path) -> int:
    """The newest checkpoint by name; 0 where there is none."""
    return max((int(step.name[5:]) for step in folder.glob("step-*")), default=0)


def curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What two runs that are the same have in common."""
    return [(record["iteration"], record["loss"], record["lr"], record["grad_norm"]) for record in records]


def left_behind(folder: Path) -> list[str]:
    """Hidden files of a run's folder that nobody needs any more."""
    return [
        path.name
        for path in folder.iterdir()
        if path.name.startswith((".writing", ".removing", ".latest", ".lease", ".hf"))
    ]


def can_mount() -> str | None:
    """Why a file system cannot be mounted here."""
    return None if os.geteuid() == 0 else "only root mounts"
