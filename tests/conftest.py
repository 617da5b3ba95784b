"""Fixtures: real and small tokenizers, and the two commands run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.cli import entry as sft_entry
from tests import families, real_parts, shared_tokenizer
from tokenize_data.cli import entry as tokenize_entry

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return real_parts.smollm2_tokenizer()


@pytest.fixture(scope="session")
def _loaded_once(smollm2: Path) -> Iterator[None]:
    with shared_tokenizer.loaded_once(smollm2):
        yield


@pytest.fixture(scope="session")
def mistral_v1() -> Path:
    return real_parts.mistral_tokenizer("v1")


@pytest.fixture(scope="session")
def mistral_v3() -> Path:
    return real_parts.mistral_tokenizer("v3")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")
    return lambda name: root / name if (root / name).exists() else families.make_family(name, root / name)


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@dataclass
class Workbench:
    """A folder to work in, and the commands with its tokenised data."""

    root: Path
    capture: Any
    base: Path

    def jsonl(self, rows: Sequence[Any], name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        return self.write("\n".join(lines) + "\n", name)

    def write(self, content: str | bytes, name: str = "data.jsonl") -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def tokenize(self, *arguments: Any, run_name: str = "r", checkpoint: Path | None = None) -> Outcome:
        fixed = [
            "--run_name",
            run_name,
            "--tokenized_data_dir",
            self.tokenized,
            "--checkpoint",
            checkpoint or self.base,
            "--workers",
            "1",
        ]
        return self._run(tokenize_entry, [*fixed, *arguments])

    def inspect(self, *arguments: Any, run_name: str = "r") -> Outcome:
        return self._run(
            sft_entry, ["inspect", "--run_name", run_name, "--tokenized_data_dir", self.tokenized, *arguments]
        )

    def documents(self, run_name: str = "r") -> list[dict[str, Any]]:
        outcome = self.inspect("--json", run_name=run_name)
        assert outcome.code == 0, outcome.err
        return [json.loads(line) for line in outcome.out.splitlines()]

    def manifest(self, run_name: str = "r") -> dict[str, Any]:
        return json.loads((self.tokenized / run_name / "manifest.json").read_text())

    @property
    def tokenized(self) -> Path:
        return self.root / "tokenized"

    def _run(self, entry: Callable[[list[str]], int], arguments: list[Any]) -> Outcome:
        self.capture.readouterr()
        try:
            code = entry([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self.capture.readouterr()
        return Outcome(code, captured.out, captured.err)


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], smollm2: Path, _loaded_once: None) -> Workbench:
    return Workbench(tmp_path, capsys, smollm2)


def pair(question: str = "Is it?", answer: str = "Yes.") -> dict[str, str]:
    return {"prompt": question, "gold": answer}
