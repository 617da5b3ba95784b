"""Settings: how long to train, in which batches, at which learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.errors import UserError
from tokenize_data.settings import Group, setting

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt", "polynomial", "cosine_with_restarts", "wsd")


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings(Group):
    epochs: float = setting(
        3.0, "iterations = ceil(E * documents / global batch)", metavar="E", above=0, suffix=(1, "ep")
    )
    iters: int | None = setting(None, "number of iterations; overrides --epochs", metavar="N", least=1)
    no_autoaccept_iters: bool = setting(False, "show the number of iterations and ask before starting")
    global_batch: int = setting(64, "documents per iteration", metavar="N", least=1, fixed=True)
    mix: tuple[str, ...] = setting(
        (), "shares of several data sets in an epoch, by name; the others divide the rest by size", metavar="NAME=SHARE"
    )
    mix_temperature: float = setting(
        1.0, "draws data sets by size to the power of 1/T: above 1, small ones count more", metavar="T", above=0
    )
    order: str = setting(
        "shuffled", "or curriculum: an epoch takes one data set after another", choices=("shuffled", "curriculum")
    )
    gradient_accumulation: int | None = setting(
        None,
        "replaces --global_batch: A * micro_batch * dp documents per iteration; micro_batch counts as 1 unless given",
        metavar="A",
        least=1,
    )
    lr: float = setting(2e-5, "peak learning rate", above=0)
    min_lr: float = setting(2e-6, "learning rate at the end", least=0)
    warmup_fraction: float = setting(0.1, "fraction of the iterations used for warm-up", metavar="F", least=0, most=1)
    warmup_iters: int | None = setting(
        None, "number of warm-up iterations; overrides --warmup_fraction", metavar="N", least=0
    )
    schedule: str = setting("cosine", "how the learning rate decays", choices=SCHEDULES)
    schedule_cycles: int = setting(1, "of cosine_with_restarts: how often it falls", metavar="N", least=1)
    schedule_power: float = setting(1.0, "of polynomial: 1 falls in a straight line, 2 faster at first", above=0)
    decay_fraction: float = setting(
        0.1, "of wsd: share of the iterations, the last ones, in which it falls", metavar="F", above=0, most=1
    )

    @property
    def warmup_text(self) -> str:
        if self.warmup_iters is not None:
            return f"{self.warmup_iters:,} iterations"
        return f"{self.warmup_fraction:.3g} of the iterations"

    def check(self) -> None:
        if self.min_lr > self.lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --lr {self.lr:g}: lower min_lr, or raise lr")
