"""What `make demo` runs: made-up questions and answers, tokenised with a real chat model's tokenizer, and shown as the model sees them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from sft.cli import entry as sft_entry
from tests.real_parts import smollm2_tokenizer
from tokenize_data.cli import entry as tokenize_entry

_WARDS = ("cardiology", "surgery", "paediatrics", "oncology", "neurology")
_DRUGS = ("aspirin", "ibuprofen", "metformin", "ramipril", "atorvastatin")


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Orders at a made-up hospital, answered in its house style: a rule that no base model knows."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        drug, ward, dose = rng.choice(_DRUGS), rng.choice(_WARDS), rng.randrange(5, 500, 5)
        question = f"How is an order of {dose} mg {drug} for {ward} written?"
        rows.append({"prompt": question, "gold": f"{ward[:3].upper()}/{drug.capitalize()}/{dose:04d}"})
    return rows


def main() -> int:
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    for name, count, seed in (("train", 2000, 1), ("val", 200, 2)):
        lines = [json.dumps(row) + "\n" for row in make_rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    where = ["--run_name", "orders", "--tokenized_data_dir", str(folder / "tokenized")]
    data = ["--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl"), "--checkpoint", str(smollm2_tokenizer())]
    code = tokenize_entry([*where, *data, "--retokenize"])
    return code or sft_entry(["inspect", *where, "--documents", "2", "--chart", str(folder / "lengths.png")])


if __name__ == "__main__":
    sys.exit(main())
