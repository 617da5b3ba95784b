"""Mixing of a run's data sets, from settings and shards."""

from __future__ import annotations

from sft.config.settings import Settings
from sft.plan.mixing import MixPart, mix
from sft.plan.sampler import Sampler
from tokenize_data.errors import UserError
from tokenize_data.reader import ShardReader


def mix_of(settings: Settings, reader: ShardReader) -> tuple[MixPart, ...]:
    schedule, sizes = settings.schedule, {name: len(part) for name, part in reader.parts.items()}
    if schedule.order == "curriculum" and len(sizes) < 2:
        raise UserError("--order curriculum takes data sets one by one, but there is one: list several in a recipe")
    return mix(sizes, schedule.mix_temperature, schedule.mix)


def sampler_of(settings: Settings, reader: ShardReader, global_batch: int) -> Sampler:
    """The sampler that selects the documents of each iteration."""
    return Sampler(
        len(reader),
        global_batch,
        settings.data.seed,
        mix_of(settings, reader),
        is_in_order=settings.schedule.order == "curriculum",
        shuffle=reader.manifest.shuffle,
    )
