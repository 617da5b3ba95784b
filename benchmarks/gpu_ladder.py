"""Training speed on one GPU, technique by technique, and against TRL: python benchmarks/gpu_ladder.py [--budget_s 1500]
[--write].

Real shapes with random weights in bf16, AdamW with float32 masters, documents of random ids: rows that are full, and a
mix of lengths such as question-answer files have. Of each case 20 iterations warm up and 50 are timed, each in a
process of its own. A ladder adds one technique at a time to the first shape. MFU counts 6 operations for each weight
that a token is multiplied with and 12 * layers * hidden for each pair of tokens within a document that causal attention
looks at, against 989 TFLOP/s and the rate of large products measured here.

`--tiny` runs everything on whatever is here with shapes of a toy, which shows that it runs and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder has a tokenize.py, and so has the standard library
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from typing import Any
from unittest import mock

import numpy as np

from tokenize_data.chat import ASSISTANT, USER
from tokenize_data.reader import Document

_RESULTS = Path(__file__).resolve().parent / "results" / "gpu_ladder.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "trl", "liger-kernel")
_PEAK_FLOPS = 989e12  # H100 and H200, dense bf16
_RATE, _RANK = 1e-5, 16

_LLAMA = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "3B": _LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    }
    | {"tie_word_embeddings": True},
    "8B": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: str
    program: str = "sft"  # or TRL
    seq: int = 4096
    mix: bool = False  # a mix of lengths, a part of them trained, in place of full rows that are trained throughout
    rows: int = 4  # of `seq` tokens in an iteration, or as many tokens
    lora: bool = False
    recompute: str = "none"
    optimizer: str = "adamw"
    varlen: bool = True
    chunked: bool = True
    compiled: bool = False
    warm_up: int = 20
    timed: int = 50

    @property
    def label(self) -> str:
        kind = f"LoRA r{_RANK}" if self.lora else "full"
        what = "mix of lengths" if self.mix else "full rows"
        without = [
            word
            for word, has in (("one kernel for all documents", self.varlen), ("chunked loss", self.chunked))
            if not has
        ]
        notes = [f"recompute {self.recompute}"] if self.recompute != "none" else []
        notes += [f"without {word}" for word in without] + (["compiled layers"] if self.compiled else [])
        notes += [self.optimizer] if self.optimizer != "adamw" else []
        return f"{self.program} {self.shape} {kind}, {what} of {self.seq:,}" + (
            f" ({', '.join(notes)})" if notes else ""
        )


def ladder() -> list[Case]:
    base = Case(shape="1B", varlen=False, chunked=False, mix=True)
    steps = [base, replace(base, varlen=True), replace(base, varlen=True, chunked=True)]
    steps.append(replace(steps[-1], compiled=True))
    return steps


def table() -> list[Case]:
    """In the order of what matters most, should time run out."""
    best: dict[str, Any] = {"compiled": True}
    return [
        *ladder(),
        Case(shape="1B", program="TRL", mix=True),
        *(Case(shape=shape, **best) for shape in ("1B", "3B")),
        Case(shape="8B", lora=True, **best),
        Case(shape="8B", recompute="selective", optimizer="adamw8bit", rows=2, **best),
        Case(shape="8B", recompute="full", optimizer="adamw8bit", rows=2, **best),
        Case(shape="8B", program="TRL", lora=True),
        Case(shape="3B", mix=True, **best),
        *(Case(shape=shape, seq=seq, rows=4 * 4096 // seq, **best) for seq in (2048, 8192) for shape in ("1B", "3B")),
        Case(shape="3B", program="TRL", mix=True),
    ]


# ---------- # documents


class Documents:
    """Random ids. Full rows are trained throughout; of a mix, the answers: about a fifth of the tokens."""

    def __init__(self, case: Case, vocabulary: int, count: int) -> None:
        random = np.random.default_rng(0)
        if case.mix:
            lengths = np.clip(random.lognormal(6.0, 0.7, count).astype(int), 16, case.seq)
            answers = np.maximum(1, (lengths * random.uniform(0.05, 0.35, count)).astype(int))
        else:
            lengths = np.full(count, case.seq + 1)
            answers = np.full(count, case.seq)
        self.lengths, self.trained = lengths.astype(np.uint32), answers.astype(np.uint32)
        self._ids = random.integers(3, vocabulary, case.seq + 1).astype(np.uint32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Document:
        length, answer = int(self.lengths[number]), int(self.trained[number])
        return Document(
            self._ids[:length], np.array([length - answer, answer], np.uint32), np.array([USER, ASSISTANT], np.uint8)
        )

    def place(self, number: int) -> tuple[str, int]:
        return "random", number


def batches(case: Case, vocabulary: int) -> tuple[Documents, list[np.ndarray]]:
    """Documents, and which of them make an iteration: as many as fill its rows."""
    mean = float(np.mean(Documents(case, vocabulary, 1000).lengths)) - 1
    size = max(1, round(case.rows * case.seq / mean * (0.97 if case.mix else 1.0)))
    iterations = case.warm_up + case.timed
    documents = Documents(case, vocabulary, size * iterations)
    return documents, [np.arange(at * size, (at + 1) * size) for at in range(iterations)]


# ---------- one case, one process


def run_ours(case: Case) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig

    from sft.config.optimizer import OptimizerSpec
    from sft.engine.feed import Feed
    from sft.engine.groups import form_groups
    from sft.engine.pipeline import Pipeline
    from sft.engine.start import start_worker
    from sft.launcher.processes import set_single_process_env
    from sft.launcher.rendezvous import connect
    from sft.model import parts
    from sft.model.build import build_stage
    from sft.model.lora import LoraSettings, initialise
    from sft.objective.cross_entropy import CrossEntropy
    from sft.plan.chunks import tokens_at_once
    from sft.plan.layout import Layout

    set_single_process_env()
    device = start_worker(connect(600))
    config = LlamaConfig(**SHAPES[case.shape], max_position_embeddings=8192, architectures=["LlamaForCausalLM"])
    processes = form_groups(Layout(tp=1, pp=1, dp=1))
    lora = LoraSettings(rank=_RANK, alpha=2.0 * _RANK) if case.lora else None
    built = build_stage(
        config,
        range(config.num_hidden_layers),
        processes.tensor,
        sequence_parallel=False,
        recompute=case.recompute,
        dtype=torch.bfloat16,
        device=device,
        lora=lora,
    )
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            parameter.fill_(1.0) if parameter.dim() == 1 and "norm" in name else parameter.normal_(0.0, 0.02)
    if lora:
        initialise(built.parameters, built.places, 0)
    if case.compiled:
        torch._dynamo.config.cache_size_limit = 64
        for block in built.stage.blocks:
            block.layer.compile(dynamic=True)  # type: ignore[union-attr]
    settings = OptimizerSpec(name=case.optimizer, lr=_RATE, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    at_once = tokens_at_once(config.vocab_size, is_gpu=True) if case.chunked else 10**9
    pipeline = Pipeline(
        built,
        processes,
        optimizer=settings,
        objective=CrossEntropy(),
        tokens_at_once=at_once,
        clip=1.0,
        device=device,
        vocabulary_size=config.vocab_size,
    )
    documents, numbers = batches(case, config.vocab_size)
    reader: Any = documents
    feed = Feed(reader, capacity=case.seq, replicas=1, replica=0, objective=CrossEntropy())
    patch = mock.patch.object(parts, "bounds_of", return_value=None) if not case.varlen else mock.MagicMock()
    seconds, losses = [], []
    with patch:
        for chosen in numbers:
            batch = feed.plan(chosen)
            _synchronise(device)
            began = time.perf_counter()
            losses.append(pipeline.step(feed.micro_batches(batch), batch.plan.num_micro_batches, _RATE).loss)
            _synchronise(device)
            seconds.append(time.perf_counter() - began)
    return _result(case, documents, numbers, seconds, losses, sum(_weights(config, case)))


def run_trl(case: Case) -> dict[str, Any]:
    """Tuned: packed or padding-free rows, its best attention, Liger's kernels, fused AdamW."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(**SHAPES[case.shape], max_position_embeddings=8192)
    documents, numbers = batches(case, config.vocab_size)
    rows = []
    for number in (int(number) for chosen in numbers for number in chosen):
        ids, answer = documents[number].ids.astype(int).tolist(), int(documents.trained[number])
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[len(ids) - answer :]})
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            _synchronise(device)
            seconds.append(-time.perf_counter())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            _synchronise(device)
            seconds[-1] += time.perf_counter()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **options: Any) -> None:
            losses.extend(value for key, value in logs.items() if key == "loss")

    has_gpu = device.type == "cuda"
    attempts: list[dict[str, Any]] = [
        {"attn_implementation": "kernels-community/flash-attn2", "padding_free": True},
        {},
    ]
    for attempt in attempts if has_gpu and case.mix else attempts[1:]:
        chosen_attention = attempt.get("attn_implementation", "sdpa")
        try:
            with torch.device(device):
                model = LlamaForCausalLM._from_config(
                    config, dtype=torch.bfloat16, attn_implementation=chosen_attention
                )
            break
        except Exception as error:
            print(f"TRL without {chosen_attention}: {str(error)[:200]}", file=sys.stderr)
    size = len(numbers[0]) if attempt.get("padding_free") else max(1, case.rows // 2)
    options = SFTConfig(
        output_dir="/tmp/trl-ladder",
        max_steps=len(numbers),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=max(1, len(numbers[0]) // size),
        max_length=case.seq + 1,
        bf16=has_gpu,
        use_cpu=not has_gpu,
        report_to=[],
        save_strategy="no",
        learning_rate=_RATE,
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_liger_kernel=has_gpu,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        padding_free=attempt.get("padding_free", False),
    )
    adapters = None
    if case.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        callbacks=[Clock()],
        peft_config=adapters,
    )
    trainer.train()
    return _result(case, documents, numbers, seconds, losses, sum(_weights(config, case)))


def _tokenizer() -> Any:
    """TRL asks for one even where rows are tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _weights(config: Any, case: Case) -> tuple[float, float]:
    """(of the layers, of the head): what a token is multiplied with."""
    sizes = SHAPES[case.shape]
    heads, keys = sizes["num_attention_heads"] * sizes["head_dim"], sizes["num_key_value_heads"] * sizes["head_dim"]
    hidden = sizes["hidden_size"]
    layer = hidden * (2 * heads + 2 * keys) + 3 * hidden * sizes["intermediate_size"]
    return float(sizes["num_hidden_layers"] * layer), float(hidden * sizes["vocab_size"])


def _result(
    case: Case,
    documents: Documents,
    numbers: list[np.ndarray],
    seconds: list[float],
    losses: list[float],
    weights: float,
) -> dict[str, Any]:
    import torch

    timed = numbers[case.warm_up :]
    places = [float((documents.lengths[chosen].astype(float) - 1).sum()) for chosen in timed]
    pairs = [float(((documents.lengths[chosen].astype(float) - 1) ** 2 / 2).sum()) for chosen in timed]
    trained = [float(documents.trained[chosen].sum()) for chosen in timed]
    sizes = SHAPES[case.shape]
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    operations = [
        6 * weights * n + 12 * sizes["num_hidden_layers"] * width * p for n, p in zip(places, pairs, strict=True)
    ]
    taken = seconds[case.warm_up : case.warm_up + len(timed)]
    total = sum(taken)
    return {
        "label": case.label,
        "tokens_per_second": sum(places) / total,
        "trained_per_second": sum(trained) / total,
        "flops": sum(operations) / total,
        "iteration_ms": 1000 * statistics.median(taken),
        "first_loss": losses[0] if losses else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def _synchronise(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def matrix_rate(is_tiny: bool) -> float:
    """Operations a second of large products in bf16, the best of some."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 256 if is_tiny else 8192
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    rates = []
    for _ in range(5):
        _synchronise(device)
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        _synchronise(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - began))
    return max(rates)


# ---------- the whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget_s", type=float, default=1e9, help="no case is begun after so many seconds")
    parser.add_argument("--only", default="", help="cases whose label has this")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write {_RESULTS.name}")
    arguments = parser.parse_args()
    if arguments.case:
        case = Case(**json.loads(arguments.case))
        print(json.dumps(run_trl(case) if case.program == "TRL" else run_ours(case)))
        return
    began, lines, rate = time.monotonic(), [], matrix_rate(arguments.tiny)
    print(f"large products: {rate / 1e12:.1f} TFLOP/s", flush=True)
    cases = [case for case in table() if arguments.only in case.label]
    if arguments.tiny:
        cases = [
            replace(case, shape="toy", seq=64, compiled=False, optimizer="adamw", warm_up=1, timed=2) for case in cases
        ]
    for case in dict.fromkeys(cases):
        if time.monotonic() - began > arguments.budget_s:
            lines.append(f"| {case.label} | no time left | | | | | |")
            continue
        command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{case.label}: {done.stderr[-3000:]}", file=sys.stderr, flush=True)
            lines.append(f"| {case.label} | failed: {error[:120]} | | | | | |")
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        peak = "" if found["peak_gb"] is None else f"{found['peak_gb']:.1f}"
        lines.append(
            f"| {case.label} | {found['tokens_per_second']:,.0f} | {found['trained_per_second']:,.0f} "
            f"| {found['iteration_ms']:,.1f} "
            f"| {found['flops'] / _PEAK_FLOPS:.1%} | {found['flops'] / rate:.1%} | {peak} |"
        )
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    text = "\n".join(
        [
            "# Training on one GPU",
            "",
            f"Large products in bf16, measured: {rate / 1e12:.0f} TFLOP/s.",
            "",
            "| | tokens/s | trained tokens/s | ms an iteration | MFU of 989 | MFU of measured | peak GB |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"{date.today()}: {_device()}, Python {platform.python_version()}, {versions}.",
            "",
        ]
    )
    print(text)
    if arguments.write:
        _RESULTS.write_text(text)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
