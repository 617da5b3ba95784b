"""What each process of a run does, from connecting to the others to the exported model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.checkpoint.adapter import AdapterFiles, AdapterOrigins, write_adapter
from sft.checkpoint.commit import peers_of
from sft.checkpoint.export import Origins, export
from sft.checkpoint.hf_folder import publish
from sft.checkpoint.merging import merge_into
from sft.config.optimizer import OptimizerSpec
from sft.engine.groups import Processes, form_groups
from sft.engine.pipeline import Pipeline
from sft.engine.start import start_worker, stop_worker
from sft.model.build import BuiltStage, build_stage
from sft.model.lora import is_adapter
from sft.model.quantized import fill
from sft.model.weights import WeightFiles, load, match_names
from sft.resolve import adapters
from sft.resolve.prepare import Job, stage_layers
from sft.verify.selfcheck import self_check
from sft.worker.ending import Interrupt
from sft.worker.loop import iterate
from sft.worker.saving import KEPT_TOKENIZER, Saver, facts_for, go_on, keep_tokenizer, training_facts
from sft.worker.watch import Watch, watched
from sft.worker.watchdog import Watchdog
from tokenize_data.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """The base model as transformers describes it, grown to the tokenizer's size."""

    config: Any
    generation_config: Any | None


def work(job: Job, interrupt: Interrupt, store: Any = None) -> None:
    """Train and export. Every process of the run calls this. `store` is where they have met already."""
    device = start_worker(store=store)
    with watched(job, is_first=dist.get_rank() == 0) as watch:
        processes = form_groups(job.layout)
        base = read_base(job)
        self_check(
            base.config,
            processes.tensor,
            job.layout.sequence_parallel,
            recompute=job.recompute,
            device=device,
            trust_remote_code=job.settings.model.trust_remote_code,
            dtype=DTYPES[job.dtype],
        )
        given = AdapterFiles(Path(job.settings.adapters.adapter)) if job.settings.adapters.adapter else None
        built, names = load_stage(job, base, processes, device, given)
        pipeline = Pipeline(
            built,
            processes,
            optimizer=optimizer_settings(job),
            clip=job.settings.optimizer.clip,
            device=device,
            vocabulary_size=base.config.vocab_size,
            is_interrupted=lambda: interrupt.is_asked,
        )
        peers = peers_of(dist.new_group(backend="gloo") if device.type == "cuda" else None)
        start = go_on(job, pipeline, peers, watch.say, watch.warn)
        if built.adapted is not None:
            watch.say(adapters.trained_text(built))
        if dist.get_rank() == 0:
            keep_tokenizer(job)
        watch.start(start)
        file_names = {name: names[name] for name in built.all_places}
        facts = facts_for(job, file_names, base.config.vocab_size, adapters.facts(built, job.settings, job.base))
        saver = Saver(job, pipeline, peers, facts, watch.warn)
        watchdog = Watchdog(job.settings.machine.hang_timeout, watch.warn)
        watchdog.start()
        result = iterate(job, pipeline, watch, saver, peers, start, watchdog, interrupt)
        with watchdog.during("writing the model", folder=job.folder):
            _write_result(
                job, pipeline, _origins(job, base, file_names, training_facts(facts, result)), facts["adapter"], watch
            )
        watchdog.end()
        watch.finish(job.result_folder)
    stop_worker()


def read_base(job: Job) -> LoadedBase:
    from transformers import AutoConfig, GenerationConfig

    trust = job.settings.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(job.base.folder, trust_remote_code=trust)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{job.base.folder} has code of its own, which is not run: read it, then use --trust_remote_code, or "
            "use another base model"
        ) from error
    config.vocab_size = max(config.vocab_size, int(job.reader.manifest.tokenizer["vocabulary_size"]))
    has_generation = (job.base.folder / "generation_config.json").exists()
    generation = GenerationConfig.from_pretrained(job.base.folder) if has_generation else None
    return LoadedBase(config=config, generation_config=generation)


def load_stage(
    job: Job, base: LoadedBase, processes: Processes, device: torch.device, given: AdapterFiles | None = None
) -> tuple[BuiltStage, dict[str, str]]:
    """This process's stage with the base model's weights, and each parameter's name in the base's files. `given` is its
    first adapter.
    """
    layers = stage_layers(job)[processes.stage]
    built = build_stage(
        base.config,
        layers,
        processes.tensor,
        sequence_parallel=job.layout.sequence_parallel,
        recompute=job.recompute,
        dtype=DTYPES[job.dtype],
        device=device,
        trust_remote_code=job.settings.model.trust_remote_code,
        lora=adapters.settings_of(job.settings, given),
        bits=adapters.bits_of(job.settings),
    )
    adapters.check_vocabulary(built, int(job.base.config["vocab_size"]), base.config.vocab_size)
    files = WeightFiles(job.base.folder)
    anatomy = built.anatomy
    head, embedding = f"{anatomy.head}.weight", f"{anatomy.embedding}.weight"
    grown = {
        name: base.config.vocab_size for name in (embedding, head, f"{anatomy.head}.bias") if name in built.all_places
    }
    names = match_names(
        {name: place.shape for name, place in built.all_places.items()},
        files,
        base_prefix=built.base_prefix,
        tied={head: embedding} if built.tied_name else {},
        ignore=built.ignored,
        grown=grown,
        renames=built.renames,
    )
    own = {
        name: (parameter, built.places[name].part)
        for name, parameter in built.parameters.items()
        if not is_adapter(name)
    }
    load(own, files, names, grown=grown)
    fill(built.quantized, built.places, lambda name, part: files.read(names[name], part, DTYPES[job.dtype]))
    adapters.begin(built, given)
    return built, names


def optimizer_settings(job: Job) -> OptimizerSpec:
    settings = job.settings
    return OptimizerSpec(
        name=settings.optimizer.optimizer,
        lr=settings.schedule.lr,
        beta1=settings.optimizer.beta1,
        beta2=settings.optimizer.beta2,
        eps=settings.optimizer.eps,
        weight_decay=settings.optimizer.weight_decay,
        momentum=settings.optimizer.momentum,
    )


def _write_result(
    job: Job, pipeline: Pipeline, origins: Origins, adapter: Mapping[str, Any] | None, watch: Watch
) -> None:
    """A collective call. The folder by which a run counts as finished comes last."""
    if adapter is None:
        export(pipeline, job.result_folder, origins)
        return
    mine = AdapterOrigins(config=adapter["config"], tokenizer_folder=origins.tokenizer_folder, facts=origins.facts)
    if not job.settings.adapters.merge_at_end:
        write_adapter(pipeline, job.result_folder, mine)
        return
    waiting = job.folder / ".adapter.to-merge"
    write_adapter(pipeline, waiting, mine)
    if pipeline.processes.rank == 0:
        stop_worker()  # the others are done, and merging takes a time that they need not wait for
        try:
            trust = job.settings.model.trust_remote_code
            merge_into(job.folder / "hf", job.base, [waiting], overwrite=True, trust_remote_code=trust, say=watch.say)
        except UserError as error:  # no reason to lose the adapter
            watch.warn(f"{job.folder / 'hf'} was not written: {error}")
        publish(waiting, job.result_folder, overwrite=True)


def _origins(job: Job, base: LoadedBase, names: Mapping[str, str], facts: Mapping[str, Any]) -> Origins:
    return Origins(
        config=base.config,
        generation_config=base.generation_config,
        tokenizer_folder=job.folder / KEPT_TOKENIZER,
        names=names,
        facts=facts,
    )
