"""The result of a plan: for the page that people read, and as plain data for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sft.config.optimizer import kind_of
from sft.families.architecture import Architecture
from sft.plan.communicators import communicators
from sft.plan.gpus import GB
from sft.plan.search import Choice, Found, Question, reason_it_loses
from sft.plan.stage_weights import stage_weights


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is known about the documents, and the source."""

    documents: int | None
    tokens: float | None  # positions per epoch
    trained_tokens: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    model: Architecture
    num_parameters: int
    data: Data
    epochs: float | None  # None: iterations were given
    iterations: int | None
    question: Question
    choice: Choice
    found: Found
    learning_rate: str = ""  # the schedule in words
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.choice.rows.tokens / self.choice.seconds.total

    @property
    def total_seconds(self) -> float | None:
        return None if self.iterations is None else self.iterations * self.choice.seconds.total

    @property
    def num_trained(self) -> int:
        """The number of trained weights in the whole model."""
        layout = self.choice.layout
        if self.question.adapters is None:
            return self.num_parameters
        stages = enumerate(self.choice.ranges)
        return (
            sum(
                stage_weights(self.model, layout, stage, layers, self.question.adapters).trained
                for stage, layers in stages
            )
            * layout.tp
        )

    @property
    def checkpoint_bytes(self) -> float:
        """Bytes of a checkpoint: float32 weights and moments, in whatever format training keeps them. Factored moments
        are negligible.
        """
        kind = kind_of(self.question.optimizer, self.question.momentum)
        moments = 0 if kind.is_factored else len(kind.states) if kind.matrix_bytes == kind.other_bytes else 1
        return 4.0 * (1 + moments) * self.num_trained

    @property
    def exported_bytes(self) -> float:
        return float((2 if self.question.dtype == "bf16" else 4) * self.num_trained)


def first_choices(plan: Plan, most: int = 5) -> list[tuple[Choice, str]]:
    """The best choices and why each loses: one per layout and recompute mode, at its best micro-batch."""
    kept: list[tuple[Choice, str]] = []
    seen = set()
    for choice in plan.found.fitting:
        key = (choice.layout, choice.recompute)
        if key not in seen and len(kept) < most:
            seen.add(key)
            kept.append(
                (
                    choice,
                    "chosen" if choice is plan.found.fitting[0] else reason_it_loses(plan.found.fitting[0], choice),
                )
            )
    return kept


def as_data(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, in bytes and seconds; None means unknown."""
    question, total = plan.question, plan.total_seconds
    return {
        "model": plan.name,
        "family": plan.model.kind,
        "parameters": plan.num_parameters,
        "trained_parameters": plan.num_trained,
        "gpu": asdict(question.gpu),
        "gpus": question.world,
        "dtype": question.dtype,
        "documents": plan.data.documents,
        "tokens_per_epoch": plan.data.tokens,
        "trained_tokens_per_epoch": plan.data.trained_tokens,
        "data_source": plan.data.source,
        "global_batch": question.global_batch,
        "iterations": plan.iterations,
        "learning_rate": plan.learning_rate,
        **choice_data(plan.choice),
        "hours": None if total is None else total / 3600,
        "gpu_hours": None if total is None else total / 3600 * question.world,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "exported_bytes": plan.exported_bytes,
        "choices": [{**choice_data(choice), "reason": reason} for choice, reason in first_choices(plan)],
        "does_not_fit": [_short(choice) for choice in plan.found.too_large[:5]],
        "refused": [{"tp": tp, "pp": pp, "reason": reason} for (tp, pp), reason in plan.found.refused.items()],
        "notes": list(plan.notes),
    }


def choice_data(choice: Choice) -> dict[str, Any]:
    layout = choice.layout
    return {
        **_short(choice),
        "sequence_parallel": layout.sequence_parallel,
        "micro_batches": choice.rows.micro_batches,
        "tokens_per_iteration": choice.rows.tokens,
        "fill": choice.rows.fill,
        "balance": choice.rows.balance,
        "layers": [len(layers) for layers in choice.ranges],
        "usable_bytes": choice.usable_bytes,
        "communicators": communicators(layout),
        "memory": [{**asdict(stage), "total": stage.total} for stage in choice.memory],
        "seconds_per_iteration": choice.seconds.total,
        "seconds": asdict(choice.seconds),
        "mfu": choice.mfu,
        "tokens_per_second": choice.rows.tokens / choice.seconds.total,
    }


def _short(choice: Choice) -> dict[str, Any]:
    layout = choice.layout
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "micro_batch": choice.micro_batch,
        "recompute": choice.recompute,
        "peak_bytes": choice.peak.total,
        "peak_gb": round(choice.peak.total / GB, 2),
        "peak_stage": choice.peak.stage,
    }
