"""The header: a one-screen summary of a run before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sft.observe.progress import duration


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The header's facts. None means unknown."""

    family: str
    num_parameters: int
    vocabulary_size: int

    tp: int
    pp: int
    dp: int
    micro_batch: int
    seq: int
    sequence_parallel: bool
    recompute: str
    dtype: str

    num_documents: int
    num_tokens: int
    num_trained_tokens: int
    num_val_documents: int = 0
    fill: float | None = None  # share of the packed rows that holds tokens
    balance: float | None = None  # mean over maximum of tokens per replica

    epochs: float | None  # None: iterations were given
    global_batch: int
    iterations: int
    start: int = 0  # the iteration after which the run resumes

    layout_note: str = ""  # why the layout differs from the entry's
    placement: str = ""  # placement of processes on several nodes
    folder: Path
    expected_seconds: float | None = None
    adapters: str | None = None  # description of the adapters

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def header(console: Console, facts: Facts) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        (
            "model",
            f"{facts.family}, {_rounded(facts.num_parameters)} parameters, vocabulary of {facts.vocabulary_size:,}",
        ),
        ("adapters", facts.adapters or ""),
        ("layout", _layout(facts)),
        ("", facts.layout_note),
        ("", facts.placement),
        ("", _memory(facts)),
        ("data", _data(facts)),
        ("", _packing(facts)),
        ("iterations", iterations_text(facts)),
        (
            "",
            f"resuming after iteration {facts.start:,}, {facts.iterations - facts.start:,} left" if facts.start else "",
        ),
        ("output", str(facts.folder)),
        ("duration", f"about {duration(facts.expected_seconds)}" if facts.expected_seconds is not None else ""),
    ]
    for name, text in rows:
        if text:
            table.add_row(name, Text(text))
    console.print(Rule("training", align="left", style="dim"), table, Rule(style="dim"))


def iterations_text(facts: Facts) -> str:
    """Explain the number of iterations: ceil(3 epochs x 200,000 documents / 64) = 9,375 iterations."""
    count = _counted(facts.iterations, "iteration")
    documents = _counted(facts.num_documents, "document")
    if facts.epochs is None:
        epochs = facts.iterations * facts.global_batch / max(facts.num_documents, 1)
        return f"{count} given x {facts.global_batch:,} a batch / {documents} = {epochs:.3g} epochs"
    return (
        f"ceil({facts.epochs:g} {'epoch' if facts.epochs == 1 else 'epochs'} x {documents} / "
        f"{facts.global_batch:,}) = {count}"
    )


def _layout(facts: Facts) -> str:
    processes = "process" if facts.world == 1 else "processes"
    return (
        f"{facts.world:,} {processes} = tp {facts.tp} x pp {facts.pp} x dp {facts.dp}, sequence parallel "
        f"{_on(facts.sequence_parallel)}"
    )


def _memory(facts: Facts) -> str:
    room = facts.micro_batch * facts.seq
    return f"rows of {facts.micro_batch} x {facts.seq:,} = {room:,} tokens, recompute {facts.recompute}, {facts.dtype}"


def _data(facts: Facts) -> str:
    share = facts.num_trained_tokens / max(facts.num_tokens, 1)
    val = f"; {_counted(facts.num_val_documents, 'document')} for validation" if facts.num_val_documents else ""
    return (
        f"{_counted(facts.num_documents, 'document')}, {facts.num_tokens:,} tokens, {facts.num_trained_tokens:,} "
        f"trained ({share:.1%}){val}"
    )


def _packing(facts: Facts) -> str:
    fill = f"rows {facts.fill:.1%} full" if facts.fill is not None else ""
    balance = f"replicas {facts.balance:.1%} balanced" if facts.balance is not None else ""
    return ", ".join(part for part in (fill, balance) if part)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _on(value: bool) -> str:
    return "on" if value else "off"


def _rounded(count: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}" if count < 1000 * size else f"{count / size:,.0f}{letter}"
    return str(count)
