"""A worker's main function: join the process group, build, train, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.checkpoint import stage_adapters
from sft.checkpoint.adapter import AdapterFiles, AdapterOrigins, write_adapter
from sft.checkpoint.commit import peers_of
from sft.checkpoint.export import Origins, export
from sft.checkpoint.hf_folder import publish
from sft.checkpoint.merge_adapters import merge_into
from sft.checkpoint.stage import DTYPES, LoadedBase, load_stage, read_base
from sft.engine.groups import form_groups
from sft.engine.pipeline import Pipeline
from sft.engine.start import start_worker, stop_worker
from sft.model.compiled import compile_blocks
from sft.model.stage import Stage
from sft.objective.choose import objective_of
from sft.objective.compiled import compiled_likelihood
from sft.objective.likelihood import Likelihood, negative_log_likelihood
from sft.spec.run import RunSpec
from sft.verify.selfcheck import self_check
from sft.worker.ending import Interrupt
from sft.worker.loop import iterate
from sft.worker.saving import KEPT_TOKENIZER, Saver, facts_for, go_on, keep_tokenizer, training_facts
from sft.worker.watch import Watch, watched
from sft.worker.watchdog import Watchdog
from tokenize_data.errors import UserError


def work(spec: RunSpec, interrupt: Interrupt, store: Any) -> None:
    """Train and export. Every process of the run calls this. `store` is the rendezvous."""
    device = start_worker(store)
    with watched(spec, is_first=dist.get_rank() == 0) as watch:
        data = spec.open_data()
        processes = form_groups(spec.layout)
        base = read_base(spec)
        self_check(
            base.config,
            processes.tensor,
            spec.layout.sequence_parallel,
            recompute=spec.recompute,
            device=device,
            trust_remote_code=spec.settings.model.trust_remote_code,
            dtype=DTYPES[spec.dtype],
        )
        given = AdapterFiles(Path(spec.settings.adapters.adapter)) if spec.settings.adapters.adapter else None
        built, names = load_stage(spec, base, processes, device, given)
        likelihood = _compile(spec, built.stage, base.config, device, watch)
        pipeline = Pipeline(
            built,
            processes,
            optimizer=spec.settings.optimizer.spec(spec.settings.schedule.lr),
            objective=objective_of(spec.settings.objective),
            tokens_at_once=spec.tokens_at_once,
            clip=spec.settings.optimizer.clip,
            device=device,
            vocabulary_size=base.config.vocab_size,
            is_interrupted=lambda: interrupt.is_asked,
            likelihood=likelihood,
        )
        peers = peers_of(dist.new_group(backend="gloo") if device.type == "cuda" else None)
        start = go_on(spec, pipeline, peers, watch.say, watch.warn)
        if built.adapted is not None:
            watch.say(stage_adapters.trained_text(built))
        if dist.get_rank() == 0:
            keep_tokenizer(spec, data.training)
        watch.start(start)
        file_names = {name: names[name] for name in built.all_places}
        facts = facts_for(spec, file_names, data.training.manifest, stage_adapters.facts(built, spec))
        saver = Saver(spec, pipeline, peers, facts, watch.warn)
        watchdog = Watchdog(spec.settings.machine.hang_timeout, watch.warn)
        watchdog.start()
        result = iterate(spec, data, pipeline, watch, saver, peers, start, watchdog, interrupt)
        with watchdog.during("writing the model", folder=spec.folder):
            _write_result(
                spec, pipeline, _origins(spec, base, file_names, training_facts(facts, result)), facts["adapter"], watch
            )
        watchdog.end()
        watch.finish(spec.result_folder)
    stop_worker()


def _compile(spec: RunSpec, stage: Stage, config: Any, device: torch.device, watch: Watch) -> Likelihood:
    """Compile layers and loss on GPUs. Returns the likelihood function to use."""
    if device.type != "cuda" or spec.settings.layout.compile == "off":
        return negative_log_likelihood
    if spec.layout.tp > 1:
        watch.say("layers are not compiled, which is slower: they are tensor-parallel")
        return negative_log_likelihood
    reason = compile_blocks(stage, config, device, on_failure=watch.warn)
    if reason is not None:
        watch.say(f"layers are not compiled, which is slower: {reason}")
    if stage.head is None:
        return negative_log_likelihood
    likelihood, reason = compiled_likelihood(config.vocab_size, DTYPES[spec.dtype], device)
    if reason is not None:
        watch.say(f"the loss is not compiled, which is slower: {reason}")
    return likelihood


def _write_result(
    spec: RunSpec, pipeline: Pipeline, origins: Origins, adapter: Mapping[str, Any] | None, watch: Watch
) -> None:
    """Write the model or the adapter; the folder that marks the run as finished comes last. A collective call."""
    if adapter is None:
        export(pipeline, spec.result_folder, origins)
        return
    mine = AdapterOrigins(config=adapter["config"], tokenizer_folder=origins.tokenizer_folder, facts=origins.facts)
    if not spec.settings.adapters.merge_at_end:
        write_adapter(pipeline, spec.result_folder, mine)
        return
    waiting = spec.folder / ".adapter.to-merge"
    write_adapter(pipeline, waiting, mine)
    if pipeline.processes.rank == 0:
        stop_worker()  # the other processes need not wait for the merge
        try:
            trust = spec.settings.model.trust_remote_code
            merge_into(spec.folder / "hf", spec.base, [waiting], overwrite=True, trust_remote_code=trust, say=watch.say)
        except UserError as error:  # keep the adapter
            watch.warn(f"{spec.folder / 'hf'} was not written: {error}")
        publish(waiting, spec.result_folder, overwrite=True)


def _origins(spec: RunSpec, base: LoadedBase, names: Mapping[str, str], facts: Mapping[str, Any]) -> Origins:
    return Origins(
        config=base.config,
        generation_config=base.generation_config,
        tokenizer_folder=spec.folder / KEPT_TOKENIZER,
        names=names,
        facts=facts,
    )
