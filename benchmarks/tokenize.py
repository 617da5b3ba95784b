"""How fast the data stage is, in one command: python benchmarks/tokenize.py [--rows N] [--rounds 3] [--json OUT].

The stage, the bare tokenizer, TRL's preparation and a plain `datasets.map` take the same real rows. First it is checked
that they make the same ids and masks; then each is run in turn, round after round, in a process of its own. The figure
is MB of JSONL text per second of CPU, so other work on the machine matters little; medians over the rounds. For two
workers it is wall-clock time that counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import contextlib
import json
import os
import pickle
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from datetime import date
from importlib import metadata
from typing import Any

from benchmarks.contestants import CONTESTANTS, Saved
from benchmarks.real_rows import as_line, real_rows, repeated
from tests.real_parts import mistral_tokenizer, smollm2_tokenizer
from tokenize_data.reader import ShardReader

_RESULT = Path(__file__).resolve().parent / "results" / "tokenize.md"
_NUM_ROWS = 13_000
_NUM_TINY_ROWS = 8
_STAGES = {"stage, 1 worker": 1, "stage, 2 workers": 2}
_PACKAGES = ("tokenizers", "tiktoken", "trl", "transformers", "datasets", "pyarrow", "numpy")

_WHY_DIFFERENT = (
    "Where ids differ: the stage tokenises the prompt as it will stand at generation time and the answer after it; "
    "the others tokenise "
    "both at once, and a token may then reach from the prompt into the answer, which the model can never be asked to "
    "write. "
    "Where masks differ: the stage trains up to the end-of-turn token; TRL trains all that follows the prompt, so "
    "also what the template "
    "writes after that token, which generation never reaches."
)

Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=_NUM_ROWS, help=f"rows, repeated as needed (default: {_NUM_ROWS:,}, about 20 MB)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        races = _make_races(Path(scratch), arguments.rows)
        results = {race.name: {"checks": race.check(), "rounds": []} for race in races}
        for number in range(arguments.rounds):
            for race in races:
                results[race.name]["rounds"].append(race.round())
                print(f"round {number + 1} of {arguments.rounds}, {race.name}: done", flush=True)
        size = races[0].size
    lines = [
        *_heading(size, arguments),
        *(line for name, result in results.items() for line in _table(name, result, size)),
    ]
    print("\n".join(lines))
    _RESULT.parent.mkdir(exist_ok=True)
    _RESULT.write_text("\n".join(lines) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "results": results}, indent=2))


def _make_races(scratch: Path, num_rows: int) -> list[Race]:
    from transformers import AutoTokenizer

    jinja = Path(__file__).resolve().parent.parent / "tokenize_data" / "jinja"
    tokenizers = []
    for name, base, template in (
        ("SmolLM2 (byte-level BPE)", smollm2_tokenizer(), "auto"),
        ("Mistral v1 (SentencePiece)", mistral_tokenizer("v1"), "mistral"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(str(base))
        if template != "auto":
            tokenizer.chat_template = (jinja / f"{template}.jinja").read_text()
        work = scratch / base.name
        tokenizer.save_pretrained(str(work / "tokenizer"))
        tokenizers.append((name, base, template, work, tokenizer))
    rows = repeated(real_rows([tokenizer.backend_tokenizer for *_, tokenizer in tokenizers]))
    lines = [as_line(next(rows)) for _ in range(num_rows)]
    for *_, work, _tokenizer in tokenizers:
        (work / "rows.jsonl").write_bytes(b"".join(lines))
        (work / "tiny.jsonl").write_bytes(b"".join(lines[:_NUM_TINY_ROWS]))
    return [Race(*parts) for parts in tokenizers]


class Race:
    """One tokenizer: the check, and rounds of all contestants."""

    def __init__(self, name: str, base: Path, template: str, work: Path, tokenizer: Any) -> None:
        self.name, self._base, self._template, self._work, self._tokenizer = name, base, template, work, tokenizer
        self.size = (work / "rows.jsonl").stat().st_size
        self._count = 0

    def check(self) -> list[str]:
        """What of the ids and masks is the same as the stage's; one line for each contestant."""
        self._contestant("render")
        self._stage(1, "rows.jsonl", "check")
        stage = [(document.ids.tolist(), document.trained().tolist()) for document in ShardReader(self._work / "check")]
        lines = []
        for name in CONTESTANTS:
            saved = self._work / "saved.pickle"
            self._contestant(name, "--save", str(saved))
            lines.append(f"{name}: {_compare(stage, pickle.loads(saved.read_bytes()), self._tokenizer)}")
            print(f"{self.name}: {lines[-1]}", flush=True)
        return lines

    def round(self) -> dict[str, Seconds]:
        found: dict[str, Seconds] = {}
        for name, workers in _STAGES.items():
            found[name] = self._stage(workers, "rows.jsonl")
            found[f"{name}, start"] = self._stage(workers, "tiny.jsonl")
        for name in CONTESTANTS:
            found[name] = json.loads(self._contestant(name).splitlines()[-1])
        return found

    def _stage(self, workers: int, rows: str, run_name: str = "") -> Seconds:
        self._count += 1
        command = [
            sys.executable,
            "-m",
            "tokenize_data",
            "--run_name",
            run_name or f"run{self._count}",
            "--data",
            str(self._work / rows),
            "--tokenized_data_dir",
            str(self._work),
            "--checkpoint",
            str(self._base),
            "--template",
            self._template,
            "--workers",
            str(workers),
            "--seq",
            "4096",
        ]
        with (self._work / "log").open("w+") as log:
            begun, busy = time.monotonic(), _busy_seconds()
            process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            wall, cpu = time.monotonic() - begun, used.ru_utime + used.ru_stime
            others = max(_busy_seconds() - busy - cpu, 0.0) / wall
            process.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            if process.returncode:
                raise SystemExit(f"the stage failed:\n{log.read()}")
        return {"cpu": cpu, "wall": wall, "others": others}

    def _contestant(self, name: str, *further: str) -> str:
        command = [
            sys.executable,
            "-m",
            "benchmarks.contestants",
            name,
            str(self._work / "tokenizer"),
            str(self._work),
            *further,
        ]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr}")
        return done.stdout


def _busy_seconds() -> float:
    """CPU seconds that the whole machine has spent on anything; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        user, nice, system, _idle, _wait, *interrupts = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
        )
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": sys.path[0], "HF_HUB_OFFLINE": "1"}


def _compare(stage: Saved, other: Saved, tokenizer: Any) -> str:
    """How many rows are the same, and what the others differ in."""
    pairs = list(zip(stage, other, strict=True))
    same = sum(ours[0] == theirs[0] for ours, theirs in pairs)
    line = f"ids of {same:,} of {len(pairs):,} rows are identical"
    if same < len(pairs):
        line += (
            "; "
            f"{_first_difference([(ours[0], theirs[0]) for ours, theirs in pairs if ours[0] != theirs[0]], tokenizer)}"
        )
    if not other[0][1]:
        return line
    masks = sum(ours == theirs for ours, theirs in pairs)
    line += f", ids and masks of {masks:,}"
    extra: Counter[str] = Counter()
    for (ids, ours), (their_ids, theirs) in pairs:
        if ids == their_ids and ours != theirs:
            extra[_mask_difference(ids, ours, theirs, tokenizer)] += 1
    return line + "".join(f"; in {number:,} rows {text}" for text, number in extra.most_common(4))


def _first_difference(pairs: list[tuple[list[int], list[int]]], tokenizer: Any) -> str:
    kinds: Counter[str] = Counter()
    for ours, theirs in pairs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        shown = [tokenizer.convert_ids_to_tokens(ids[max(at - 1, 0) : at + 3]) for ids in (ours, theirs)]
        kinds[f"{shown[0]} is {shown[1]} there"] += 1
    return "; ".join(f"in {number:,} rows {kind}" for kind, number in kinds.most_common(2))


def _mask_difference(ids: list[int], ours: list[int], theirs: list[int], tokenizer: Any) -> str:
    only = {
        who: [i for i, a, b in zip(ids, mine, other, strict=True) if a > b]
        for who, mine, other in (("the stage", ours, theirs), ("it", theirs, ours))
    }
    return " and ".join(f"only {who} trains {tokenizer.decode(some)!r}" for who, some in only.items() if some)


# ---- the report


def _heading(size: int, arguments: argparse.Namespace) -> list[str]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return [
        "# Tokenising",
        "",
        f"Made by `python benchmarks/tokenize.py --rows {arguments.rows} --rounds {arguments.rounds}` on "
        f"{date.today()}: "
        f"{arguments.rows:,} rows, {size / 1e6:.1f} MB of JSONL; medians.",
        "",
        f"Python {platform.python_version()}, {versions}; {_processor()}, {os.cpu_count()} cores.",
    ]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _table(title: str, result: dict[str, Any], size: int) -> list[str]:
    rounds = result["rounds"]
    megabytes = size / 1e6

    def median(name: str, kind: str, start: str | None = None) -> float:
        return statistics.median(found[name][kind] - (found[start][kind] if start else 0) for found in rounds)

    bare = median("bare, encode_batch_fast", "cpu")
    lines = ["", f"## {title}", "", "| | MB per CPU-second | CPU s | wall s | bare = 1 |", "|---|---|---|---|---|"]
    for name in [*_STAGES, *CONTESTANTS]:
        for start in [None, f"{name}, start"] if name in _STAGES else [None]:
            cpu, wall = median(name, "cpu", start), median(name, "wall", start)
            shown = f"{name}, without start-up" if start else name
            lines.append(f"| {shown} | {megabytes / cpu:.2f} | {cpu:.2f} | {wall:.2f} | {bare / cpu:.2f} |")
    one, two = _STAGES
    speed_up = statistics.median(
        (found[one]["wall"] - found[f"{one}, start"]["wall"]) / (found[two]["wall"] - found[f"{two}, start"]["wall"])
        for found in rounds
    )
    stage = median(one, "cpu", f"{one}, start")
    goals = (
        ("stage, one worker, over the bare tokenizer (encode_batch_fast)", bare / stage, 0.9),
        ("two workers over one, wall clock", speed_up, 1.8),
        ("stage, one worker, over TRL", median("TRL", "cpu") / stage, 3.0),
        ("stage, one worker, over datasets.map", median("datasets.map", "cpu") / stage, None),
    )
    lines += ["", "| ratio, without start-up | found | goal | |", "|---|---|---|---|"]
    for text, found, goal in goals:
        lines.append(
            f"| {text} | {found:.2f} | {goal or ''} | "
            f"{'' if goal is None else 'holds' if found >= goal else 'missed'} |"
        )
    others = median(two, "others")
    lines += [
        "",
        f"Other work kept {others:.2f} cores busy during the runs with two workers"
        + (": their wall clock says little, run this again on an idle machine." if others > 0.1 else "."),
    ]
    checks = [f"- {line}" for line in result["checks"]]
    return [*lines, "", "The same work? Against the stage with one worker:", "", *checks, "", _WHY_DIFFERENT]


if __name__ == "__main__":
    main()
