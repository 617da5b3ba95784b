"""Builds the question for the planner's search: the possible layouts and the documents per iteration. Typed values are
orders. Values from checkpoints.toml or from a base model's path are preferences: they are used if they fit the
processes and GPUs at hand. With `--gradient_accumulation` the documents per iteration depend on the layout, so both
are searched together.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft.config.settings import Settings
from sft.families.table import architecture_of
from sft.plan.gpus import Gpu
from sft.plan.layout import Layout, ModelShape, choose_layout
from sft.plan.rows import Batches
from sft.plan.search import Question, search
from sft.plan.stage_weights import Adapters
from sft.resolve.base import Described
from sft.resolve.naming import layout_of_path
from sft.spec.base import BaseModel
from tokenize_data.errors import UserError

Pack = Callable[[int], Batches]  # the batches of iterations with this many documents
Sizes = tuple[int | None, int | None]  # tp and pp; None: not given


@dataclass(frozen=True, kw_only=True)
class LayoutQuestion:
    """`question` allows all valid layouts, with the matching documents per iteration."""

    question: Question
    note: str | None = None  # why a preference is not used


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known about a run before its layout."""

    settings: Settings
    base: BaseModel | Described
    world: int
    gpu: Gpu | None  # None: a GPU that the plan does not know
    pack: Pack
    trained_share: float

    def question(self) -> LayoutQuestion:
        """Ask for the simplest layout on a CPU, and for the fastest on GPUs."""
        assert self.gpu is not None
        if self.gpu.name == "cpu":
            layout, note = self.simple_layout()
            return LayoutQuestion(question=self._question((layout.tp, layout.pp), layout.dp), note=note)
        if self._preferred == self._ordered:
            return LayoutQuestion(question=self._best_question(self._ordered))
        question = self._best_question(self._preferred)
        found = search(question)
        if found.fitting:
            return LayoutQuestion(question=question)
        reason = (
            "does not fit into the memory of these GPUs"
            if found.too_large
            else self._refusal(self._preferred) or "cannot be"
        )
        return LayoutQuestion(question=self._best_question(self._ordered), note=self._preference_note(reason))

    def simple_layout(self) -> tuple[Layout, str | None]:
        """Returns (the layout without a plan: the preference, or what was ordered; why the preference is not used)."""
        if self._preferred == self._ordered:
            return self._layout(self._ordered), None
        refusal = self._refusal(self._preferred)
        if refusal is None:
            return self._layout(self._preferred), None
        near = next((sizes for sizes in self._below_preference() if self._refusal(sizes) is None), self._ordered)
        return self._layout(near), self._preference_note(refusal)

    @property
    def _ordered(self) -> Sizes:
        return self.settings.layout.tp, self.settings.layout.pp

    @property
    def _preferred(self) -> Sizes:
        """tp and pp from the flags, the entry, or the path, in this order."""
        entry = self.base.entry
        of_path = layout_of_path(entry.path) or (None, None)
        return self.settings.layout.tp or entry.tp or of_path[0], self.settings.layout.pp or entry.pp or of_path[1]

    def _preference_note(self, reason: str) -> str:
        tp, pp = (size or 1 for size in self._preferred)
        where = "the entry's" if self.base.entry.tp or self.base.entry.pp else "the path's"
        if self.world % (tp * pp):
            reason = (
                f"needs a multiple of {tp * pp} processes, and there {'is' if self.world == 1 else 'are'} {self.world}"
            )
        return f"{where} tp {tp} x pp {pp} {reason}"

    def _below_preference(self) -> list[tuple[int, int]]:
        """Smaller layouts to try. On unknown GPUs the nearest to the preference comes first, since what fits is not
        known; processes on a CPU share its memory.
        """
        if self.gpu is not None:
            return []
        (most_tp, most_pp), (tp, pp) = (tuple(size or 1 for size in self._preferred), self._ordered)
        sizes = [
            (t, p) for t in range(1, most_tp + 1) for p in range(1, most_pp + 1) if t == (tp or t) and p == (pp or p)
        ]
        return sorted(sizes, key=lambda size: (-size[0] * size[1], -size[0]))

    def _layout(self, sizes: Sizes) -> Layout:
        tp, pp = sizes
        return choose_layout(
            self.world,
            ModelShape.of_config(self.base.config),
            tp=tp,
            pp=pp,
            sequence_parallel=self.settings.layout.sequence_parallel,
            global_batch=global_batch_of(self.settings, max(1, self.world // ((tp or 1) * (pp or 1)))),
        )

    def _refusal(self, sizes: Sizes) -> str | None:
        try:
            self._layout(sizes)
        except UserError as error:
            return f"cannot be used ({error})"
        return None

    def _best_question(self, sizes: Sizes) -> Question:
        """The question with the fastest answer, or, if nothing fits, the one that comes closest."""
        questions = [self._question(sizes, dp) for dp in self._replicas(sizes)]
        return questions[0] if len(questions) == 1 else min(questions, key=_order)

    def _replicas(self, sizes: Sizes) -> list[int | None]:
        """The numbers of replicas to try one by one, since each means another number of documents; None: any."""
        tp, pp = sizes
        if self.settings.schedule.gradient_accumulation is None:
            return [None]
        if tp and pp:
            return [max(1, self.world // (tp * pp))]
        return [dp for dp in range(1, self.world + 1) if self.world % (dp * (tp or pp or 1)) == 0] or [1]

    def _question(self, sizes: Sizes, dp: int | None) -> Question:
        assert self.gpu is not None
        settings, is_cpu, (tp, pp) = self.settings, self.gpu.name == "cpu", sizes
        global_batch = global_batch_of(settings, dp or 1)
        return Question(
            model=architecture_of(self.base.config),
            shape=ModelShape.of_config(self.base.config),
            batches=self.pack(global_batch),
            world=self.world,
            seq=settings.data.seq,
            global_batch=global_batch,
            trained_share=self.trained_share,
            gpu=self.gpu,
            dtype=settings.model.dtype or ("fp32" if is_cpu else "bf16"),
            optimizer=settings.optimizer.optimizer,
            momentum=settings.optimizer.momentum,
            adapters=_adapters(settings),
            tp=tp,
            pp=pp,
            dp=None if tp and pp else dp,
            micro_batch=settings.layout.micro_batch or (1 if is_cpu else None),
            recompute=recompute_of(settings),
            sequence_parallel=settings.layout.sequence_parallel,
        )


def global_batch_of(settings: Settings, dp: int) -> int:
    """Documents per iteration on `dp` replicas. With --gradient_accumulation, micro_batch is 1 unless typed."""
    if settings.schedule.gradient_accumulation is None:
        return settings.schedule.global_batch
    return settings.schedule.gradient_accumulation * (settings.layout.micro_batch or 1) * dp


def settled(settings: Settings, layout: Layout) -> Settings:
    """The settings with the global batch as a number, and the layout that it follows from."""
    if settings.schedule.gradient_accumulation is None:
        return settings
    return settings.replace(
        gradient_accumulation=None, global_batch=global_batch_of(settings, layout.dp), tp=layout.tp, pp=layout.pp
    )


def batch_values(settings: Settings) -> dict[str, int | None]:
    """The batch settings for other nodes, which would compute other values from fewer processes."""
    return {name: settings.value(name) for name in ("gradient_accumulation", "global_batch", "tp", "pp")}


def recompute_of(settings: Settings) -> str | None:
    """Recompute more by default on a quantised base: memory is scarce there."""
    return settings.layout.recompute or ("full" if settings.adapters.quantisation else None)


def _order(question: Question) -> tuple[int, float]:
    found = search(question)
    if found.fitting:
        return 0, found.fitting[0].seconds.total / found.fitting[0].rows.tokens
    return (1, found.too_large[0].peak.total) if found.too_large else (2, 0.0)


def _adapters(settings: Settings) -> Adapters | None:
    rank = settings.adapters.lora or (_rank_of(Path(settings.adapters.adapter)) if settings.adapters.adapter else None)
    if rank is None:
        return None
    return Adapters(rank=rank, targets=settings.adapters.lora_targets, quantisation=settings.adapters.quantisation)


def _rank_of(folder: Path) -> int:
    file = folder / "adapter_config.json"
    try:
        return int(json.loads(file.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--adapter {folder}: {file.name} does not say a rank ({error}): give a folder in PEFT's format"
        ) from error
