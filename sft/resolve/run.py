"""Resolves settings and tokenised data to a RunSpec: base model, layout, batches, iterations, folder."""

from __future__ import annotations

from pathlib import Path

from sft.config.settings import Settings
from sft.families.table import architecture_of, family_of
from sft.plan.chunks import tokens_at_once
from sft.plan.sampler import num_iterations
from sft.plan.stages import head_cost, layer_ranges
from sft.resolve import adapters
from sft.resolve.base import find_base_model
from sft.resolve.devices import visible_gpus
from sft.resolve.mixing import mix_of
from sft.resolve.naming import DEFAULT_SIZE, run_folder
from sft.resolve.planning import Chosen, choose, trained_share
from sft.resolve.question import settled
from sft.spec.base import BaseModel
from sft.spec.run import DataSet, RunSpec
from sft.spec.versions import versions
from tokenize_data.bases import default_file
from tokenize_data.dataset import FORMATS
from tokenize_data.errors import UserError
from tokenize_data.manifest import dataset_folder
from tokenize_data.reader import ShardReader


def resolve(settings: Settings, base: BaseModel | None = None, world: int | None = None) -> RunSpec:
    """Resolve a run from settings and existing shards. `world` is the number of processes if it is fixed."""
    asked = adapters.with_adapter(settings)
    base = base or find_base_model(asked)
    adapters.check_base(asked, base)
    reader, validation = _open_data(asked)
    machine = asked.machine
    world = world or machine.nodes * (machine.nproc_per_node or max(visible_gpus(), 1))
    chosen = choose(asked, base, reader, world)
    asked = settled(asked, chosen.layout)
    if asked.output.early_stopping and validation is None:
        raise UserError(f"--early_stopping {asked.output.early_stopping} needs a validation set: name one with --val")
    _check_context(reader, base)
    model = architecture_of(base.config)
    cost = head_cost(model, trained_share(asked, reader))
    of_tokenizer = int(reader.manifest.tokenizer["vocabulary_size"])
    vocabulary_size = max(int(base.config.get("vocab_size", 0)), of_tokenizer)
    return RunSpec(
        asked=asked,
        settings=_complete(asked, base, reader, chosen),
        base=base,
        adapter_fingerprint=adapters.fingerprint(asked),
        data=DataSet.of(reader),
        validation=None if validation is None else DataSet.of(validation),
        vocabulary_size=vocabulary_size,
        layout=chosen.layout,
        stages=tuple(layer_ranges(model.layers, chosen.layout.pp, head_cost=cost)),
        tokens_at_once=tokens_at_once(-(-vocabulary_size // chosen.layout.tp), visible_gpus() > 0),
        folder=run_folder(asked, base.family, base.is_entry),
        versions=versions(),
        seconds_per_iteration=chosen.seconds,
        mix=mix_of(asked, reader),
        layout_note=chosen.note,
    )


def _open_data(settings: Settings) -> tuple[ShardReader, ShardReader | None]:
    root, name, seq = Path(settings.data.tokenized_data_dir), settings.data.run_name, settings.data.seq
    reader = ShardReader(dataset_folder(root, name))
    validation = ShardReader(dataset_folder(root, f"{name}-val")) if settings.data.has_validation else None
    _check_early_stopping(settings.output.early_stopping_on, validation)
    for part in (reader, validation):
        if part is not None and part.manifest.seq > seq:
            raise UserError(
                f"{part.folder} was tokenised with --seq {part.manifest.seq}, longer than --seq {seq}: "
                f"use --seq {part.manifest.seq}, or --retokenize"
            )
    return reader, validation


def _check_early_stopping(part: str | None, validation: ShardReader | None) -> None:
    if part is None:
        return
    names = list(validation.parts) if validation is not None else []
    if len(names) < 2:
        raise UserError(
            f"--early_stopping_on {part} chooses one of several validation data sets, but there "
            f"{'is one' if names else 'are none'}: leave it out, or list them as val_datasets: in a recipe"
        )
    if part not in names:
        raise UserError(f"--early_stopping_on {part}: use one of the validation data sets {', '.join(names)}")


def _complete(asked: Settings, base: BaseModel, reader: ShardReader, chosen: Chosen) -> Settings:
    """The settings with every choice made. None now means off."""
    schedule, layout = asked.schedule, chosen.layout
    epoch = num_iterations(len(reader), 1.0, schedule.global_batch)
    formats = {data_set["format"] for data_set in reader.manifest.datasets}
    only = formats.pop() if len(formats) == 1 else None  # of rows with `columns`, it is no setting
    return asked.replace(
        size=asked.model.size or (DEFAULT_SIZE if base.is_entry else None),
        checkpoints_file=str(asked.model.checkpoints_file or default_file()) if base.is_entry else None,
        format=asked.data.format or (only if only in FORMATS else None),
        dtype=asked.model.dtype or ("bf16" if visible_gpus() else "fp32"),
        iters=schedule.iters or num_iterations(len(reader), schedule.epochs, schedule.global_batch),
        eval_interval=epoch if asked.output.eval_each_epoch else asked.output.eval_interval,
        save_interval=epoch if asked.output.save_each_epoch else asked.output.save_interval,
        lora_alpha=None if asked.adapters.lora is None else asked.adapters.alpha,
        tp=layout.tp,
        pp=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        micro_batch=chosen.micro_batch,
        recompute=chosen.recompute,
        gpu=chosen.gpu,
        nproc_per_node=layout.world // asked.machine.nodes,
    )


def _check_context(reader: ShardReader, base: BaseModel) -> None:
    """Raise UserError if documents exceed learned positions. Rotary positions have no hard end."""
    limit = base.config.get("max_position_embeddings", base.config.get("n_positions"))
    longest = int(reader.lengths.max())
    if family_of(base.family).has_position_limit and isinstance(limit, int) and longest - 1 > limit:
        raise UserError(
            f"{reader.folder} has documents of {longest:,} tokens, this model {limit:,} positions: tokenise with "
            f"--seq {limit}"
        )
