"""Starting workers: many cases in one start, each case's results of all ranks, and what can be known of one that died
or hung.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CASE_SECONDS = 300  # more of them is a hang, on slow and busy machines too
MOST_STARTS = 3  # where cases die, those after them get another start


@dataclass(frozen=True)
class Died:
    """What is said of a case without results."""

    report: str


def run_cases(
    world: int, cases: list[dict[str, Any]], folder: Path, case_seconds: float = CASE_SECONDS, starts: int = MOST_STARTS
) -> list[list[Any] | Died]:
    """For each case, the results of ranks 0, 1, ..."""
    results: list[list[Any] | Died] = []
    for start in range(starts):
        out = folder / f"world-{world}-start-{start}"
        report = _start(world, cases[len(results) :], out, case_seconds)
        for number in range(len(cases) - len(results)):
            files = [out / f"{number}-{rank}.pt" for rank in range(world)]
            if not all(file.exists() for file in files):
                results.append(Died(report))
                break
            results.append([torch.load(file, weights_only=False) for file in files])
        if len(results) == len(cases):
            return results
    return results + [Died(f"not run after {starts} starts that died")] * (len(cases) - len(results))


def run_chosen(
    request: pytest.FixtureRequest, cases: dict[str, dict[str, Any]], folder: Path
) -> dict[str, list[Any] | Died]:
    """The results of a file's cases that its chosen tests have as parameters: one start for all that need as many
    processes.
    """
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    values = [value for item in items for value in item.callspec.params.values()]
    chosen = list(dict.fromkeys(value for value in values if isinstance(value, str) and value in cases))
    found: dict[str, list[Any] | Died] = {}
    for world in sorted({world_of(cases[name]) for name in chosen}):
        names = [name for name in chosen if world_of(cases[name]) == world]
        found |= zip(names, run_cases(world, [cases[name] for name in names], folder), strict=True)
    return found


def world_of(case: dict[str, Any]) -> int:
    return case.get("tp", 1) * case.get("pp", 1) * case.get("dp", 1)


def results_of(result: list[Any] | Died) -> list[Any]:
    if isinstance(result, Died):
        pytest.fail(result.report, pytrace=False)
    return result


def python_path() -> str:
    """For processes that are to find this repository, and what these tests themselves found."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _start(world: int, cases: list[dict[str, Any]], out: Path, case_seconds: float) -> str:
    """What the workers wrote, with the stacks of those that hung."""
    out.mkdir(parents=True)
    (out / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    command += ["-m", "tests.distributed.worker", str(out / "cases.json"), str(out), str(case_seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": python_path()}
    with (out / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code: Any = process.wait(60 + case_seconds * (len(cases) + 1))
        except subprocess.TimeoutExpired:
            code = "none: it was ended"
        finally:
            _end(process)
    text = f"exit code {code}\n{(out / 'output.txt').read_text()[-6000:]}"
    for rank in range(world):
        stack = out / f"stack-{rank}.txt"
        if stack.exists() and stack.stat().st_size:
            text += f"\nrank {rank} hung here:\n{stack.read_text()}"
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """The launcher ends its workers when it is asked to end itself."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
