"""Recipes, ours and other trainers'. A file is refused in one line, or gives a configuration that it gives again when
it is written out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from sft.config.recipe import make_settings, read_recipe, recipe_text
from sft.sweep.grid import read_sweep
from tokenize_data.errors import UserError
from tokenize_data.recipe_file import parse_yaml

_ROOT = Path(__file__).resolve().parents[2]
_FILE = Path(tempfile.mkdtemp(prefix="fuzz-recipes-")) / "recipe.yaml"
_SWEEP = b"""name: grid
recipe: {run_name: r, data: [a.jsonl], seq: 128}
axes:
  model: {small: {checkpoint: ./small}, big: {checkpoint: ./big, lr: 1e-5}}
  samples: [60, 120]
constraints: ["samples >= 120 or model == 'small'"]
exclude: {too dear: {model: big, samples: [120]}}
after: ["echo {model} 'a b'"]
"""
SEEDS = [
    b"r" + file.read_bytes()
    for folder in ("recipes", "tests/foreign")
    for file in sorted((_ROOT / folder).glob("*.y*ml"))
]
SEEDS += [seed[:1] + json.dumps(parse_yaml(seed[1:].decode(), "seed")).encode() for seed in [*SEEDS, b"s" + _SWEEP]]
SEEDS += [
    b"s" + _SWEEP,
    b"r" + b"datasets: [{files: [a.jsonl], weight: 2, clean: {drop: '[a'}}]\nlr: 2e-5\n",
    b"r" + b"a: &a [*a]\n",
]
PREFIX = 1  # bytes before the JSON, which is YAML too


def one(data: bytes) -> None:
    _FILE.write_bytes(data[1:])
    try:
        if data[:1] == b"s":
            read_sweep(_FILE)
            return
        config = make_settings(read_recipe(_FILE))
    except UserError as error:
        assert len(str(error)) < 5000, str(error)[:200]
        return
    text = recipe_text(config)
    _FILE.write_text(text, encoding="utf-8")
    again = make_settings(read_recipe(_FILE))
    assert repr(again) == repr(config) or recipe_text(again) == text, (text, recipe_text(again))
