"""How fast checkpoints are, in one command: python benchmarks/checkpoint.py [--millions 30] [--rounds 5] [--folder DIR]
[--write].

A random Llama is trained in one process and saved. In turn, round after round: a plain fsynced write of the same
memory, a save; a plain read of the checkpoint's files, a load into the optimizer. Each time the page cache is asked to
let go of what is read; medians. Then what a save costs the training, and how long a new process takes from its start to
the end of the first iteration after a resume.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from typing import Any

import torch

from sft.launcher.processes import set_single_process_env

_RESULT = Path(__file__).resolve().parent / "results" / "checkpoint.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "numpy")
_SEQ, _BATCH, _VOCABULARY, _HIDDEN = 256, 8, 8192, 512
_CHUNK_BYTES = 64 * 2**20
_WARM_UP, _TIMED = 2, 4
_GOAL = 0.8


class Trainee:
    """A random Llama with its optimizer and data, in this process."""

    def __init__(self, millions: float) -> None:
        from transformers import AutoConfig

        from sft.config.optimizer import OptimizerSpec
        from sft.engine.feed import Feed
        from sft.engine.groups import form_groups
        from sft.engine.pipeline import Pipeline
        from sft.engine.start import start_worker
        from sft.launcher.rendezvous import connect
        from sft.model.build import build_stage
        from sft.objective.cross_entropy import CrossEntropy
        from sft.plan.layout import Layout
        from sft.plan.sampler import Sampler
        from sft.verify.synthetic import SyntheticReader

        set_single_process_env()
        device, layout = start_worker(connect(600)), Layout(tp=1, pp=1, dp=1)
        layers = max(1, round((millions * 1e6 - 2 * _VOCABULARY * _HIDDEN) / (16 * _HIDDEN**2)))
        config = AutoConfig.for_model(
            "llama",
            hidden_size=_HIDDEN,
            intermediate_size=4 * _HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=_VOCABULARY,
            max_position_embeddings=_SEQ,
            tie_word_embeddings=False,
        )
        processes = form_groups(layout)
        built = build_stage(
            config,
            range(layers),
            processes.tensor,
            sequence_parallel=False,
            recompute="none",
            dtype=torch.float32,
            device=device,
        )
        with torch.no_grad():
            torch.manual_seed(0)
            for parameter in built.parameters.values():
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1)
        settings = OptimizerSpec(name="adamw", lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-5, weight_decay=0.1)
        self.pipeline = Pipeline(
            built,
            processes,
            optimizer=settings,
            objective=CrossEntropy(),
            tokens_at_once=4096,
            clip=1.0,
            device=device,
            vocabulary_size=_VOCABULARY,
        )
        self._reader: Any = SyntheticReader(256, _VOCABULARY, _SEQ)
        self._feed = Feed(self._reader, capacity=4 * _SEQ, replicas=1, replica=0, objective=CrossEntropy())
        self._sampler = Sampler(256, _BATCH, 0)
        self.num_parameters = sum(parameter.numel() for parameter in built.parameters.values())

    def iterations(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        from sft.engine.trainer import train

        return train(
            self.pipeline, self._feed, self._sampler, self._reader, rate=lambda _: 1e-4, start=start, iterations=stop
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=30, help="parameters, roughly (default: 30)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to measure (default: the system's scratch folder)"
    )
    parser.add_argument("--write", action="store_true", help=f"also write {_RESULT.name}")
    parser.add_argument("--resume", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.resume is not None:
        _resume(given.millions, given.resume)
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as scratch:
        lines = _measure(Path(scratch), given)
    sys.stdout.write("\n".join(lines) + "\n")
    if given.write:
        _RESULT.write_text("\n".join(lines) + "\n")


def _measure(scratch: Path, given: argparse.Namespace) -> list[str]:
    from sft.checkpoint.commit import ALONE
    from sft.checkpoint.resume import save

    trainee = Trainee(given.millions)
    list(trainee.iterations(0, _WARM_UP))
    kept = save(trainee.pipeline, scratch / "kept", iteration=_WARM_UP, facts={}, peers=ALONE)
    size = sum(file.stat().st_size for file in kept.iterdir())
    found = []
    for number in range(given.rounds):
        found.append(_round(trainee, scratch, kept, number % 2 == 0))
        sys.stderr.write(f"round {number + 1} of {given.rounds}: {found[-1]}\n")
    stalls = _stalls(trainee, scratch, given.rounds)
    starts = [_start(given.millions, kept) for _ in range(min(given.rounds, 3))]
    return _report(given, trainee.num_parameters, size, found, stalls, starts)


def _round(trainee: Trainee, scratch: Path, kept: Path, is_even: bool) -> dict[str, float]:
    """Seconds of each, one after the other, now this first and now that, on the same disk in the same minute."""
    from sft.checkpoint.commit import ALONE, find_latest
    from sft.checkpoint.resume import restore, snapshot, start_saving

    fresh = scratch / "fresh"
    seconds: dict[str, float] = {}
    taken = snapshot(trainee.pipeline)
    blocks = [fragment.values.view(torch.uint8).numpy().data for fragment in taken.fragments]
    writes: dict[str, Callable[[], object]] = {
        "write": lambda: _plain_write(fresh / "plain", blocks),
        "save": lambda: start_saving(taken, fresh, iteration=1, facts={}, peers=ALONE).finish(),
    }
    for name in list(writes) if is_even else reversed(writes):
        fresh.mkdir()
        os.sync()
        seconds[name] = _timed(writes[name])
        shutil.rmtree(fresh)
    _forget(kept)
    seconds["read"] = _timed(lambda: _plain_read(kept))

    def load() -> None:
        found, _ = find_latest(kept.parent)
        assert found is not None
        restore(trainee.pipeline, found, ALONE)

    _forget(kept)
    seconds["load"] = _timed(load)
    return seconds


def _stalls(trainee: Trainee, scratch: Path, rounds: int) -> list[dict[str, float]]:
    """What training waits for at a save, and how much slower it is while one is written."""
    from sft.checkpoint.commit import ALONE
    from sft.checkpoint.resume import snapshot, start_saving

    found, number = [], _WARM_UP
    for _ in range(rounds):
        quiet = _timed(lambda: list(trainee.iterations(number, number + _TIMED))) / _TIMED  # noqa: B023
        began = time.perf_counter()
        pending = start_saving(snapshot(trainee.pipeline), scratch / "stalls", iteration=number, facts={}, peers=ALONE)
        stall = time.perf_counter() - began
        began, done, polls = time.perf_counter(), 0, 0.0
        for _record in trainee.iterations(number + _TIMED, number + 2 * _TIMED):
            done += 1
            polls += _timed(pending.poll)
        busy = (time.perf_counter() - began) / done
        pending.finish()
        found.append({"iteration": quiet, "stall": stall + polls, "busy": busy})
        number += 2 * _TIMED
    return found


def _start(millions: float, kept: Path) -> dict[str, float]:
    """A new process, from its start to the end of its first iteration."""
    _forget(kept)
    began = time.time()
    command = [sys.executable, str(Path(__file__).resolve()), "--millions", str(millions), "--resume", str(kept.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: at - began for name, at in told.items()}


def _resume(millions: float, root: Path) -> None:
    """In the new process: when it had imported and built, read the checkpoint, and trained."""
    from sft.checkpoint.commit import ALONE, find_latest
    from sft.checkpoint.resume import restore

    trainee = Trainee(millions)
    built = time.time()
    found, _ = find_latest(root)
    assert found is not None
    begin = restore(trainee.pipeline, found, ALONE)
    loaded = time.time()
    list(trainee.iterations(begin, begin + 1))
    sys.stdout.write("\n" + json.dumps({"built": built, "loaded": loaded, "trained": time.time()}) + "\n")


def _plain_write(path: Path, blocks: list[memoryview]) -> None:
    with path.open("xb", buffering=0) as file:
        for block in blocks:
            for start in range(0, len(block), _CHUNK_BYTES):
                file.write(block[start : start + _CHUNK_BYTES])
        os.fsync(file.fileno())


def _plain_read(folder: Path) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(folder: Path) -> None:
    """Ask the system to read these files from the disk again."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---- the report


def _report(
    given: argparse.Namespace,
    num_parameters: int,
    size: int,
    found: list[dict[str, float]],
    stalls: list[dict[str, float]],
    starts: list[dict[str, float]],
) -> list[str]:
    megabytes = size / 1e6
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    lines = [
        "# Checkpoints",
        "",
        f"Made by `python benchmarks/checkpoint.py --millions {given.millions:g} --rounds {given.rounds}` on "
        f"{date.today()}: a random "
        f"Llama of {num_parameters / 1e6:.1f}M parameters, {megabytes:.0f} MB a checkpoint, one process; medians.",
        "",
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}.",
        "",
        "| | MB/s | of the plain write | goal | |",
        "|---|---|---|---|---|",
    ]
    for name, text in (("write", "a plain fsynced write"), ("read", "a plain read")):
        lines.append(f"| {text} | {megabytes / _median(found, name):.0f} | {_share(found, name):.2f} | | |")
    for name in ("save", "load"):
        share = _share(found, name)
        verdict = "holds" if share >= _GOAL else "missed"
        lines.append(f"| {name} | {megabytes / _median(found, name):.0f} | {share:.2f} | {_GOAL} | {verdict} |")
    iteration, stall, busy = (_median(stalls, name) for name in ("iteration", "stall", "busy"))
    lines += ["", "| what a save costs the training | seconds | of an iteration |", "|---|---|---|"]
    lines += [
        f"| an iteration, nothing being saved | {iteration:.3f} | 1 |",
        f"| the wait for a save | {stall:.3f} | {stall / iteration:.2f} |",
    ]
    lines += [f"| an iteration of the {_TIMED} after the beginning of a save | {busy:.3f} | {busy / iteration:.2f} |"]
    lines += ["", "| a new process, from its start | seconds |", "|---|---|"]
    for name, text in (
        ("built", "imported and built"),
        ("loaded", "checkpoint verified and loaded"),
        ("trained", "first iteration done"),
    ):
        lines.append(f"| {text} | {_median(starts, name):.1f} |")
    return [
        *lines,
        "",
        (
            "A save hashes while it writes; a load reads every file twice: once to verify its SHA-256, once to "
            "take its values."
        ),
    ]


def _share(found: list[dict[str, float]], name: str) -> float:
    return statistics.median(one["write"] / one[name] for one in found)


def _median(found: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in found)


if __name__ == "__main__":
    main()
