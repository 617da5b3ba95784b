"""A folder with a tiny base model and data, and `sft` run in it as a person would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.demo import make_rows
from tests.distributed.launch import python_path

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Site:
    """Commands, and what runs leave."""

    root: Path

    def sft(self, *arguments: str | int, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sft", *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.root, env=self.environment(env), capture_output=True, text=True, timeout=600
        )

    def train(
        self, *arguments: str | int, run_name: str = "orders", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        fixed = [
            "--checkpoint",
            "base",
            "--run_name",
            run_name,
            "--data",
            "train.jsonl",
            "--val",
            "val.jsonl",
            "--global_batch",
            "12",
        ]
        return self.sft(*fixed, "--lr", "1e-3", "--seq", "256", *arguments, env=env)

    def environment(self, further: dict[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "COLUMNS": "160", **(further or {})}

    def metrics(self, run: str) -> list[dict]:
        return [
            json.loads(line) for line in (self.root / "checkpoints" / run / "metrics.jsonl").read_text().splitlines()
        ]

    def status(self, run: str) -> dict:
        return json.loads((self.root / "checkpoints" / run / "status.json").read_text())


def make_site(root: Path, tokenizer: Path, **sizes: int) -> Site:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**_SIZES, **sizes}), dtype=torch.float32)
    model.save_pretrained(root / "base")
    for file in tokenizer.iterdir():
        shutil.copy(file, root / "base")
    for name, count, seed in (("train", 50, 1), ("val", 7, 2)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(count, seed)))
    return Site(root)
