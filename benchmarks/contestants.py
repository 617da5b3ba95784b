"""What the stage is measured against, each in a process of its own: `python -m benchmarks.contestants NAME TOKENIZER
WORK [--save F]`.

Prints the seconds of CPU and of wall clock that the preparation itself took; imports, loading of the tokenizer and of
the rows are not counted. `--save` keeps the ids, and the masks where there are any, for the check that all of them make
the same.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEXTS_AT_ONCE = 256

Saved = list[tuple[list[int], list[int]]]  # ids and trained (empty where the contestant makes none), for each row


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def render(folder: Path, work: Path) -> None:
    """Write the text of each row: what the bare tokenizer gets, ready made."""
    tokenizer = _load(folder)
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(_messages(row), tokenize=False) for row in rows]
    (work / "texts.json").write_text(json.dumps(texts))


def bare(folder: Path, work: Path, method: str) -> tuple[dict[str, float], Callable[[], Saved]]:
    """The `tokenizers` object on texts that are rendered already; its results are not even looked at."""
    from tokenizers import Tokenizer

    texts = json.loads((work / "texts.json").read_text())
    encode = getattr(Tokenizer.from_file(str(folder / "tokenizer.json")), method)

    def encode_all() -> None:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            encode(texts[first : first + _TEXTS_AT_ONCE], add_special_tokens=False)

    taken = _measured(encode_all)
    return taken[0], lambda: [(encoding.ids, []) for encoding in encode(texts, add_special_tokens=False)]


def mapped(folder: Path, work: Path) -> tuple[dict[str, float], Callable[[], Saved]]:
    """`datasets.map` with apply_chat_template for each row: what most people write first."""
    tokenizer = _load(folder)
    data = _dataset(work)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)}

    seconds, made = _measured(lambda: data.map(tokenize))
    return seconds, lambda: [(ids, []) for ids in made["input_ids"]]


def trl(folder: Path, work: Path) -> tuple[dict[str, float], Callable[[], Saved]]:
    """What SFTTrainer does to a data set when it is constructed; the rest of the construction is not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = _load(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    seconds: dict[str, float] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
            taken, made = _measured(lambda: super(Timed, self)._prepare_dataset(*arguments, **options))
            seconds.update(taken)
            return made

    options = SFTConfig(
        output_dir=str(work / "trl"),
        completion_only_loss=True,
        max_length=None,
        shuffle_dataset=False,
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    )
    made = Timed(model=model, args=options, train_dataset=_dataset(work), processing_class=tokenizer).train_dataset
    return seconds, lambda: [(row["input_ids"], [int(label >= 0) for label in row["labels"]]) for row in made]


CONTESTANTS = {
    "bare, encode_batch_fast": lambda folder, work: bare(folder, work, "encode_batch_fast"),
    "bare, encode_batch": lambda folder, work: bare(folder, work, "encode_batch"),
    "TRL": trl,
    "datasets.map": mapped,
}


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _dataset(work: Path) -> Any:
    """Made in memory, so that `map` has no cache file to find again."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    return datasets.Dataset.from_list(
        [{"prompt": _messages(row)[:1], "completion": _messages(row)[1:]} for row in rows]
    )


def _messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["gold"]}]


def _measured(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    cpu, wall = cpu_seconds(), time.monotonic()
    made = work()
    return {"cpu": cpu_seconds() - cpu, "wall": time.monotonic() - wall}, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*CONTESTANTS, "render"])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if arguments.name == "render":
        render(arguments.tokenizer, arguments.work)
        return
    seconds, saved = CONTESTANTS[arguments.name](arguments.tokenizer, arguments.work)
    if arguments.save:
        arguments.save.write_bytes(pickle.dumps(saved()))
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
