"""Damaged checkpoints: every file of the newest, in every way. It is named and the one before is taken; there is no
start from zero.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sft.checkpoint.commit import ALONE, PendingSave, find_latest
from sft.checkpoint.fragments import Fragment, write_fragments
from tests.faults.rows import RUN, SEED, WHOLE, Field, Row, newest_step, run
from tokenize_data.errors import UserError

_CONTENT = {"optimizer_step": 3, "states": ["master"], "layout": {"tp": 1, "pp": 1, "dp": 2}, "facts": {"lr": 0.1}}


def make_checkpoint(root: Path, iteration: int) -> Path:
    """Of two ranks, each with two files."""
    values = torch.arange(4000.0) + iteration
    parts = [
        Fragment(name="w", state="master", shape=(4000,), part=None, offset=at, values=values[at : at + 1000])
        for at in range(0, 4000, 1000)
    ]

    def write(folder: Path) -> list:
        return [
            record
            for rank in range(2)
            for record in write_fragments(folder, parts[2 * rank : 2 * rank + 2], rank, 2, 5000)
        ]

    return PendingSave(root, iteration, write, _CONTENT, ALONE).finish()


def _truncate(file: Path, other: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _delete(file: Path, other: Path) -> None:
    file.unlink()


def _zero(file: Path, other: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _flip(file: Path, other: Path) -> None:
    data, rng = bytearray(file.read_bytes()), random.Random(f"{SEED} {file.name}")
    place = rng.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def _swap(file: Path, other: Path) -> None:
    shutil.copyfile(other, file)


HARMS: dict[str, Callable[[Path, Path], None]] = {
    "truncated": _truncate,
    "deleted": _delete,
    "zeroed": _zero,
    "one bit flipped": _flip,
    "swapped with another step's": _swap,
}


def damaged_files(field: Field) -> Row:
    row, root = Row("damaged files of a checkpoint"), field.folder("damages")
    names = sorted(file.name for file in make_checkpoint(root / "first", 8).iterdir())
    for name in names:
        for what, harm in HARMS.items():
            run_folder = root / f"{name}-{what}"
            old, new = make_checkpoint(run_folder, 4), make_checkpoint(run_folder, 8)
            harm(new / name, old / name)
            row.count(f"{name} {what}", _fallback_is_wrong(run_folder, old, name))
            if name != names[0]:
                continue
            shutil.rmtree(old)
            row.count(f"{name} {what}, and no other checkpoint", _start_from_zero(run_folder))
    for what, content in {"empty": "", "of another step": "step-0000004\n", "of nothing": "../../etc\n"}.items():
        run_folder = root / f"latest-{what}"
        make_checkpoint(run_folder, 4), make_checkpoint(run_folder, 8)
        (run_folder / "latest").write_text(content)
        found, _ = find_latest(run_folder)
        row.count(f"latest {what}", None if found is not None and found.iteration == 8 else "another was taken")
    row.count("the whole command", _whole_command(field))
    return row


def _fallback_is_wrong(run_folder: Path, old: Path, name: str) -> str | None:
    found, skipped = find_latest(run_folder)
    if found is None or found.folder != old:
        return f"{found and found.folder} was taken"
    named = len(skipped) == 1 and skipped[0].startswith("step-0000008 is not used: ") and name in skipped[0]
    return None if named else f"it is not named: {skipped}"


def _start_from_zero(run_folder: Path) -> str | None:
    try:
        return f"found {find_latest(run_folder)}"
    except UserError as error:
        return None if "is complete (step-0000008 is not used: " in str(error) else str(error)


def _whole_command(field: Field) -> str | None:
    """The newest damaged: named, and the one before taken. None whole: an error, exit code 2."""
    field.whole()
    site, folder = field.site, field.site.root / "checkpoints" / f"{RUN}-damaged"
    shutil.copytree(folder.with_name(f"{RUN}-whole{WHOLE}"), folder, ignore=shutil.ignore_patterns("hf"))
    steps = sorted(folder.glob("step-*"))
    _truncate(next(steps[-1].glob("*.safetensors")), folder)
    flags = ["--id", "damaged", "--iters", WHOLE, "--save_interval", 3]
    if not field.small:
        code, said, errors = run(site, *flags)
        told = " ".join((said + errors).split())
        if (
            code
            or f"{steps[-1].name} is not used" not in told
            or f"resumed after iteration {newest_step_before(steps)}," not in told
        ):
            return f"exit code {code}: {told[-400:]}"
        shutil.rmtree(folder / "hf")
    for step in folder.glob("step-*"):
        _delete(step / "manifest.json", step)
    code, said, errors = run(site, *flags)
    return (
        None
        if code == 2 and errors.count("\n") == 1 and "is complete (" in errors
        else f"with none whole: exit code {code}: {errors[-400:]}"
    )


def newest_step_before(steps: list[Path]) -> int:
    return int(steps[-2].name[5:])


def jumping_files(field: Field) -> Row:
    """The newest checkpoint is the one with the highest number, whatever the times of its files."""
    row, root = Row("clock that jumps: times of checkpoints"), field.folder("times")
    for name, ages in {"past": (0, 1e9), "future": (-1e9, 1e9), "same": (0, 0)}.items():
        run_folder = root / name
        for iteration, age in zip((4, 8), ages, strict=True):
            step = make_checkpoint(run_folder, iteration)
            for path in (*step.iterdir(), step):
                os.utime(path, (time.time() - age, time.time() - age))
        found, skipped = find_latest(run_folder)
        is_right = found is not None and found.iteration == 8 and not skipped and newest_step(run_folder) == 8
        row.count(name, None if is_right else f"{found and found.folder} was taken, {skipped}")
    return row
