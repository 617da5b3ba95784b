"""Answers in batches against one by one, and scores: `python benchmarks/generate.py` makes
benchmarks/results/generate.md.

SmolLM2-135M-Instruct answers short questions (XSum's summaries, to be said otherwise) with `transformers`' own
`generate`, one by one, and with `sft`'s decoder in batches of 1 and 16; the ids are compared. Then 10,000 predictions
are scored, with all intervals.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import os
import platform
import time
from datetime import date
from importlib import metadata
from typing import Any

import torch

from benchmarks.real_rows import real_rows
from sft.evaluate import scores
from sft.evaluate.decode import Decoder, Prompt, Sampling
from sft.evaluate.models import find_model, load_model
from tests.real_parts import smollm2

_RESULT = Path(__file__).parent / "results" / "generate.md"
_GOAL_TIMES, _GOAL_SECONDS = 3.0, 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=32, help="default: 32")
    parser.add_argument("--max_tokens", type=int, default=48, help="default: 48")
    arguments = parser.parse_args()
    rows = [row for row in real_rows([]) if row["prompt"].startswith("Summarise")]
    loaded = load_model(find_model(str(smollm2())), device="cpu")
    asked = [f"Say it in other words: {row['gold']}" for row in rows[: arguments.questions]]
    prompts = [
        Prompt(number=n, ids=loaded.format.prompt([{"role": "user", "content": text}])) for n, text in enumerate(asked)
    ]
    decoder = Decoder(loaded.model, stop_ids=loaded.stop_ids, text_of=loaded.format.text)
    sampling = Sampling(max_tokens=arguments.max_tokens)
    list(decoder.write(prompts[:2], Sampling(max_tokens=2), 2))  # the first steps of a process are slow
    began = time.perf_counter()
    expected = {prompt.number: plain(loaded, prompt, arguments.max_tokens) for prompt in prompts}
    alone = time.perf_counter() - began
    seconds, same = {}, {}
    for size in (1, 16):
        began = time.perf_counter()
        found = {written.number: written.ids for written in decoder.write(prompts, sampling, size)}
        seconds[size] = time.perf_counter() - began
        same[size] = sum(found[number] == ids for number, ids in expected.items())
    tokens = sum(map(len, expected.values()))
    asked_tokens = sum(len(prompt.ids) for prompt in prompts) / len(prompts)
    scored = score_many(rows)
    lines = [
        "# Answers and scores",
        "",
        f"Made by `python benchmarks/generate.py --questions {len(prompts)} --max_tokens {arguments.max_tokens}` on "
        f"{date.today()}: "
        f"SmolLM2-135M-Instruct, {asked_tokens:.0f} tokens asked and {tokens / len(prompts):.0f} written a question, "
        "float32.",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{metadata.version('transformers')}; "
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}.",
        "",
        "| | tokens/s | times one by one | same ids | goal | |",
        "|---|---|---|---|---|---|",
        f"| `generate`, one by one | {tokens / alone:.0f} | 1 | | | |",
        (
            f"| `sft`, batches of 1 | {tokens / seconds[1]:.0f} | {alone / seconds[1]:.2f} | "
            f"{same[1]}/{len(prompts)} | | |"
        ),
        f"| `sft`, batches of 16 | {tokens / seconds[16]:.0f} | {alone / seconds[16]:.2f} | {same[16]}/{len(prompts)} "
        f"| {_GOAL_TIMES:g} "
        f"| {'holds' if alone / seconds[16] >= _GOAL_TIMES else 'missed'} |",
        "",
        f"10,000 predictions scored, with intervals: {scored[0]:.0f} s ({scored[1]:.0f} s of a processor); goal "
        f"{_GOAL_SECONDS:g} s, "
        f"{'holds' if scored[0] <= _GOAL_SECONDS else 'missed'}.",
        "",
    ]
    _RESULT.write_text("\n".join(lines))
    sys.stdout.write(_RESULT.read_text())
    return 0


def plain(loaded: Any, prompt: Prompt, max_tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt.ids)])
    settings = {
        "do_sample": False,
        "max_new_tokens": max_tokens,
        "eos_token_id": list(loaded.stop_ids),
        "pad_token_id": 0,
    }
    with torch.inference_mode():
        written = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.size(1) :].tolist()
    return written[:-1] if written[-1] in loaded.stop_ids else written


def score_many(rows: list[dict[str, str]]) -> tuple[float, float]:
    """Seconds by the clock, and of a processor: real summaries against those of other articles, which is as much work
    as right ones.
    """
    texts = [row["gold"] for row in rows]
    predictions: list[dict[str, Any]] = [
        {
            "answer": texts[n % len(texts)],
            "references": [texts[(n * 7 + n // len(texts)) % len(texts)]],
            "finish": "stop",
            "scores": {},
        }
        for n in range(10_000)
    ]
    began, worked = time.perf_counter(), time.process_time()
    for measure in scores.measures(predictions, processes=len(os.sched_getaffinity(0))):
        scores.score_of(measure)
    return time.perf_counter() - began, time.process_time() - worked


if __name__ == "__main__":
    sys.exit(main())
