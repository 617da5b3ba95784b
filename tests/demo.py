"""What `make demo` runs: a real chat model learns a made-up hospital's way of writing orders, and is asked before and
after.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.real_parts import smollm2

FOLDER = Path("demo")
NUM_TRAIN, NUM_VAL, NUM_ASKED = 240, 24, 24
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
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    train, held_out = make_rows(NUM_TRAIN, 1), make_rows(NUM_VAL + NUM_ASKED, 2)
    known = {row["prompt"] for row in train}
    held_out = [row for row in held_out if row["prompt"] not in known]
    for name, rows in (("train", train), ("val", held_out[:NUM_VAL])):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = smollm2()  # SmolLM2-135M-Instruct as a GGUF file
    command = ["sft", "--checkpoint", str(base), "--run_name", "orders", "--data", str(FOLDER / "train.jsonl"), "--val"]
    command += [
        str(FOLDER / "val.jsonl"),
        "--tokenized_data_dir",
        str(FOLDER / "tokenized"),
        "--save_checkpoint_dir",
        str(FOLDER / "runs"),
    ]
    command += ["--epochs", "1", "--global_batch", "8", "--lr", "3e-4", "--min_lr", "3e-5", "--eval_interval", "10"]
    command += ["--no_tensorboard"]  # which is not installed for this
    _say("$ " + " ".join(command))
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    if code:
        return code
    (run,) = (FOLDER / "runs").iterdir()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in records)
    _say(
        f"\n{len(records)} iterations, {sum(record['tokens'] for record in records) / seconds:,.0f} tokens/s; "
        "asking before and after ..."
    )
    training = json.loads((run / "hf" / "training.json").read_text())
    asked = held_out[NUM_VAL:]
    before = _ask(training["resolved"]["base_folder"], run / "hf", asked)
    after = _ask(str(run / "hf"), run / "hf", asked)
    _report(asked, before, after)
    _say(f"\nmodel: {run / 'hf'}   ({time.monotonic() - began:.0f} s in all)")
    return 0


def _ask(model_folder: str, tokenizer_folder: Path, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers, all rows at once."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_folder).to(device).eval()
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in output[:, inputs["input_ids"].size(1) :]]


def _report(rows: list[dict[str, str]], before: list[str], after: list[str]) -> None:
    for row, old, new in list(zip(rows, before, after, strict=True))[:2]:
        _say(
            f"\nquestion  {row['prompt']}\nexpected  {row['gold']}\nbefore    {' '.join(old.split())}\nafter     {new}"
        )
    for name, answers in (("before", before), ("after", after)):
        right = sum(answer == row["gold"] for answer, row in zip(answers, rows, strict=True))
        _say(f"{chr(10) if name == 'before' else ''}exact match {name:<6} {right}/{len(rows)}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
