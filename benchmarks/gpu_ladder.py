"""Training speed on one GPU, technique by technique, and against TRL: python benchmarks/gpu_ladder.py --out F
[--budget_s 1500] [--write].

Real shapes with random weights in bf16, AdamW with float32 masters, documents of random ids: rows that are full, and a
mix of lengths such as question-answer files have. Each case runs in a process of its own, and leaves one line of JSON
in F at once: cases that F has already are not run again, so that what was measured before time ran out is kept. While
one case is measured, the process of the next one imports what it needs. MFU counts the operations that the case really
asks for: 6 for each weight that a token is multiplied with, or 4 and the adapters' where the base is frozen, and 12 *
layers * hidden for each pair of tokens within a document that causal attention looks at; against 989 TFLOP/s and the
rate of large matmuls measured here.

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
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from typing import Any

import numpy as np

from tokenize_data.reader import Document
from tokenize_data.rendered import ASSISTANT, USER

_RESULTS = Path(__file__).resolve().parent / "results" / "gpu_ladder.md"
_PACKAGES = ("torch", "deepspeed", "transformers", "trl", "liger-kernel")
_PEAK_FLOPS = 989e12  # H100 and H200, dense bf16
_RATE, _RANK = 1e-5, 16
_PADDED = 8  # documents of a mix in a padded batch

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
    compiled: bool = True
    profile: bool = False  # what the kernels of two iterations are, in place of a speed
    warm_up: int = 4
    timed: int = 10

    @property
    def label(self) -> str:
        kind = f"LoRA r{_RANK}" if self.lora else "full"
        what = "mix of lengths" if self.mix else "full rows"
        notes = [f"recompute {self.recompute}"] if self.recompute != "none" else []
        notes += ["as written"] if not self.compiled and self.program == "sft" else []
        notes += ["profile"] if self.profile else []
        notes += [self.optimizer] if self.optimizer != "adamw" else []
        return f"{self.program} {self.shape} {kind}, {what} of {self.seq:,}" + (
            f" ({', '.join(notes)})" if notes else ""
        )


def table() -> list[Case]:
    """In the order of what matters most, should time run out."""
    return [
        Case(shape="1B", mix=True, profile=True),
        Case(shape="8B", lora=True),
        Case(shape="8B", lora=True, program="TRL"),
        Case(shape="1B"),
        Case(shape="1B", profile=True),
        Case(shape="1B", program="TRL"),
        Case(shape="1B", mix=True),
        Case(shape="1B", mix=True, program="TRL"),
        Case(shape="1B", mix=True, compiled=False),
        Case(shape="8B", lora=True, profile=True),
        Case(shape="3B"),
        Case(shape="8B", recompute="selective", optimizer="adafactor", rows=2),
        Case(shape="8B", lora=True, mix=True),
        Case(shape="8B", lora=True, compiled=False),
        Case(shape="1B", compiled=False),
        Case(shape="3B", compiled=False),
        Case(shape="8B", recompute="full", optimizer="adafactor", rows=2),
        Case(shape="1B", seq=8192, rows=2),
        Case(shape="1B", optimizer="muon"),
        Case(shape="3B", mix=True),
    ]


# ---------- documents


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
    from sft.model.build import build_stage
    from sft.model.compiled import compile_blocks
    from sft.model.lora import LoraSettings, initialise
    from sft.objective.compiled import compiled_likelihood
    from sft.objective.cross_entropy import CrossEntropy
    from sft.objective.likelihood import negative_log_likelihood
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
    began = time.perf_counter()
    likelihood: Any = negative_log_likelihood
    if case.compiled:
        reason = compile_blocks(built.stage, config, device)
        likelihood, other_reason = compiled_likelihood(config.vocab_size, torch.bfloat16, device)
        if reason is not None or other_reason is not None:
            raise RuntimeError(f"not compiled: {reason} {other_reason}")
    compiling = time.perf_counter() - began
    settings = OptimizerSpec(name=case.optimizer, lr=_RATE, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    pipeline = Pipeline(
        built,
        processes,
        optimizer=settings,
        objective=CrossEntropy(),
        tokens_at_once=tokens_at_once(config.vocab_size, is_gpu=device.type == "cuda"),
        clip=1.0,
        device=device,
        vocabulary_size=config.vocab_size,
        likelihood=likelihood,
    )
    documents, numbers = batches(case, config.vocab_size)
    reader: Any = documents
    feed = Feed(reader, capacity=case.seq, replicas=1, replica=0, objective=CrossEntropy())
    seconds, losses = [], []

    def iteration(chosen: np.ndarray) -> None:
        batch = feed.plan(chosen)
        losses.append(pipeline.step(feed.micro_batches(batch), feed.row_lengths(batch), _RATE).loss)

    if case.profile:
        for chosen in numbers[: case.warm_up]:
            iteration(chosen)
        return {"label": case.label, "profile": profiled(lambda: iteration(numbers[case.warm_up]))}
    for chosen in numbers:
        _synchronise(device)
        began = time.perf_counter()
        iteration(chosen)
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return _result(case, documents, numbers, seconds, losses, _weights(config, case)) | {"compile_s": compiling}


def profiled(iteration: Callable[[], None]) -> dict[str, Any]:
    """Kernels, copies and waits of one iteration, with their share of the time."""
    from torch.profiler import ProfilerActivity, profile

    iteration()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    began = time.perf_counter()
    with profile(activities=activities) as found:
        iteration()
    seconds = time.perf_counter() - began
    events = found.key_averages()
    kernels = [event for event in events if event.self_device_time_total > 0 and event.self_cpu_time_total == 0]
    kernels = [event for event in kernels if "#" not in event.key]  # ranges, such as an optimizer's step
    kernels.sort(key=lambda event: -event.self_device_time_total)
    calls = {event.key: event.count for event in events}
    waits = {key: count for key, count in calls.items() if "Synchronize" in key or key.startswith("cudaMemcpy")}
    waits |= {key: calls.get(key, 0) for key in ("aten::item", "aten::nonzero", "aten::_local_scalar_dense")}
    return {
        "seconds": seconds,
        "device_ms": sum(event.self_device_time_total for event in kernels) / 1000,
        "launches": sum(count for key, count in calls.items() if "LaunchKernel" in key),
        "waits": waits,
        "kernels": [
            [event.key[:110], event.count, round(event.self_device_time_total / 1000, 2)] for event in kernels[:28]
        ],
    }


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
    padded = _PADDED if case.mix else max(1, case.rows // 2)
    size = len(numbers[0]) if attempt.get("padding_free") else padded
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
    return _result(case, documents, numbers, seconds, losses, _weights(config, case))


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
    weights: tuple[float, float],
) -> dict[str, Any]:
    import torch

    timed = numbers[case.warm_up :]
    places = [float((documents.lengths[chosen].astype(float) - 1).sum()) for chosen in timed]
    pairs = [float(((documents.lengths[chosen].astype(float) - 1) ** 2 / 2).sum()) for chosen in timed]
    trained = [float(documents.trained[chosen].sum()) for chosen in timed]
    sizes = SHAPES[case.shape]
    width = sizes["num_attention_heads"] * sizes["head_dim"]
    # The head's work is for trained tokens alone.
    layers, head = weights
    passes = 4.0 if case.lora else 6.0  # adapters: no gradients of the base's weights
    operations = [
        passes * layers * n + passes * head * k + 12 * sizes["num_hidden_layers"] * width * p
        for n, k, p in zip(places, trained, pairs, strict=True)
    ]
    taken = seconds[case.warm_up : case.warm_up + len(timed)]
    total = sum(taken)
    return {
        "label": case.label,
        "tokens_per_second": sum(places) / total,
        "trained_per_second": sum(trained) / total,
        "flops": sum(operations) / total,
        "iteration_ms": 1000 * statistics.median(taken),
        "losses": [round(loss, 5) for loss in losses[:4]],
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
    parser.add_argument("--out", type=Path, default=Path("gpu_ladder.jsonl"), help="a line for each case that is done")
    parser.add_argument("--budget_s", type=float, default=1e9, help="no case is begun after so many seconds")
    parser.add_argument("--case_s", type=float, default=150.0, help="a case that takes longer is ended")
    parser.add_argument("--only", default="", help="cases whose label has this")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=f"write {_RESULTS.name} from what is in --out")
    arguments = parser.parse_args()
    if arguments.case:
        run_when_told(Case(**json.loads(arguments.case)))
        return
    began = time.monotonic()
    done = _read(arguments.out)
    if "" not in done:
        rate = matrix_rate(arguments.tiny)
        versions = {name: _version(name) for name in _PACKAGES}
        _append(arguments.out, {"label": "", "rate": rate, "device": _device(), "versions": versions})
    cases = [case for case in table() if arguments.only in case.label]
    if arguments.tiny:
        small: dict[str, Any] = {"shape": "toy", "seq": 64, "compiled": False, "optimizer": "adamw", "profile": False}
        cases = [replace(case, **small, warm_up=1, timed=2) for case in cases]
    waiting = [case for case in dict.fromkeys(cases) if case.label not in done]
    processes = [_start(waiting[0])] if waiting else []
    for number, case in enumerate(waiting):
        process = processes.pop()
        if number + 1 < len(waiting):
            processes.append(_start(waiting[number + 1]))
        if time.monotonic() - began > arguments.budget_s:
            process.kill()
            break
        found = _finish(process, case, arguments.case_s)
        _append(arguments.out, found)
        print(json.dumps(found)[:400], flush=True)
    for process in processes:
        process.kill()
    text = as_text(_read(arguments.out))
    print(text)
    if arguments.write:
        _RESULTS.write_text(text)


def run_when_told(case: Case) -> None:
    """Imports first, so that they cost no time of the case before; then waits for a line."""
    import transformers  # noqa: F401

    if case.program == "TRL":
        import trl  # noqa: F401
    sys.stdin.readline()
    print(json.dumps(run_trl(case) if case.program == "TRL" else run_ours(case)))


def _start(case: Case) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def _finish(process: subprocess.Popen[str], case: Case, seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    try:
        out, errors = process.communicate("go\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"label": case.label, "error": f"took more than {seconds:.0f} s"}
    wall = {"wall_s": round(time.monotonic() - began, 1)}
    if process.returncode:
        lines = errors.strip().splitlines() or ["no message"]
        return {"label": case.label, "error": lines[-1][:300], "log": errors[-2500:], **wall}
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found | wall


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """By label. Cases that failed are run again."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["label"]: line for line in lines if "error" not in line}


def as_text(done: dict[str, dict[str, Any]]) -> str:
    about = done.get("", {"rate": _PEAK_FLOPS, "device": "?", "versions": {}})
    lines = []
    for label, found in done.items():
        if "tokens_per_second" in found:
            peak = "" if found["peak_gb"] is None else f"{found['peak_gb']:.1f}"
            lines.append(
                f"| {label} | {found['tokens_per_second']:,.0f} | {found['trained_per_second']:,.0f} "
                f"| {found['iteration_ms']:,.1f} | {found['flops'] / _PEAK_FLOPS:.1%} "
                f"| {found['flops'] / about['rate']:.1%} | {peak} |"
            )
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        "# Training on one GPU",
        "",
        f"Large matmuls in bf16, measured: {about['rate'] / 1e12:.0f} TFLOP/s.",
        "",
        "| | tokens/s | trained tokens/s | ms an iteration | MFU of 989 | MFU of measured | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    found_on = f"{date.today()}: {about['device']}, Python {platform.python_version()}, {versions}."
    return "\n".join([*head, *lines, "", found_on, *_profiles(done), ""])


def _profiles(done: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for label, found in done.items():
        if "profile" in found:
            told = found["profile"]
            lines += [
                "",
                f"## {label}",
                "",
                f"One iteration: {1000 * told['seconds']:.0f} ms with the profiler, {told['device_ms']:.0f} ms of them "
                f"in kernels, {told['launches']:,} launches. Waits and copies: {told['waits']}.",
                "",
                "| kernel | calls | ms |",
                "|---|---|---|",
                *(f"| `{name}` | {count:,} | {milliseconds} |" for name, count, milliseconds in told["kernels"]),
            ]
    return lines


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
