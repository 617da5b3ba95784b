"""What each process of a distributed test runs: a list of cases, one after the other, each with the result of every
rank in a file.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.config.objective import ObjectiveSettings
from sft.engine.start import start_worker, stop_worker
from sft.objective.choose import objective_of
from sft.plan.chunks import tokens_at_once
from sft.plan.layout import Layout
from sft.plan.sampler import Sampler
from sft.plan.stages import partition
from tests.distributed import plain
from tests.distributed.data import MemoryReader
from tests.models import tiny_config
from tests.quantisation import of_bits
from tokenize_data.errors import UserError

DOCUMENTS, SEQ, SEED = 40, 32, 7
GLOBAL_BATCH, ITERATIONS, VALIDATION_DOCUMENTS = 12, 8, 6
SMALL = 2**16  # tensors with fewer elements are not split over replicas: everything here, unless a case says otherwise
GRACE_SECONDS = 3  # between writing stacks and ending, so that all ranks get to write theirs


@dataclass
class Run:
    """One case's model and data, ready to train."""

    case: dict[str, Any]
    built: Any
    processes: Any
    pipeline: Any
    feed: Any
    sampler: Sampler
    reader: Any

    def train(self, lr: float = plain.LR) -> Iterator[dict[str, Any]]:
        from sft.engine.trainer import train

        iterations = self.case.get("iterations", ITERATIONS)
        return train(
            self.pipeline, self.feed, self.sampler, self.reader, rate=lambda _: lr, start=0, iterations=iterations
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.built.parameters.items()}


def prepare(case: dict[str, Any], device: torch.device) -> Run:
    from sft.config.optimizer import OptimizerSpec
    from sft.engine.feed import Feed
    from sft.engine.groups import form_groups
    from sft.engine.pipeline import Pipeline
    from sft.model.build import build_stage
    from sft.model.compiled import compile_blocks
    from sft.model.lora import initialise, is_adapter
    from sft.model.quantized import fill
    from sft.objective.compiled import compiled_likelihood
    from sft.objective.likelihood import negative_log_likelihood
    from sft.optimizer import ownership
    from tests.distributed import adapters, reference

    ownership._SMALL_ELEMENTS = case.get("small", SMALL)
    config, dtype = config_of(case), getattr(torch, case.get("dtype", "float32"))
    layout = layout_of(case)
    processes = form_groups(layout)
    layers = partition(case.get("costs", [1.0] * config.num_hidden_layers), layout.pp)[processes.stage]
    built = build_stage(
        config,
        layers,
        processes.tensor,
        sequence_parallel=layout.sequence_parallel,
        recompute=case.get("recompute", "none"),
        dtype=dtype,
        device=device,
        lora=adapters.settings_of(case) if "lora" in case else None,
        quantisation=of_bits(case.get("bits")),
    )
    whole = dict(plain.make_model(config).named_parameters())
    with torch.no_grad():
        for name, parameter in built.parameters.items():
            part = built.places[name].part
            if not is_adapter(name):
                parameter.copy_(part.take(whole[name]) if part else whole[name])
    fill(built.quantized, built.places, lambda name, part: part.take(whole[name]) if part else whole[name])
    initialise(built.parameters, built.places, adapters.SEED)
    likelihood = negative_log_likelihood
    if case.get("compile"):
        reason = compile_blocks(built.stage, config, device)
        likelihood, other_reason = compiled_likelihood(config.vocab_size, dtype, device)
        assert reason is None and other_reason is None, (reason, other_reason)  # noqa: PT018
    optimizer = case.get("optimizer", "adamw")
    settings = OptimizerSpec(
        name=optimizer.partition(",")[0],
        momentum=reference.MOMENTUM if "momentum" in optimizer else 0.0,
        lr=plain.LR,
        beta1=plain.BETAS[0],
        beta2=plain.BETAS[1],
        eps=plain.EPS,
        weight_decay=plain.DECAY,
    )
    objective = objective_of(
        ObjectiveSettings(loss_mask=case.get("loss_mask", 0.0), label_smoothing=case.get("label_smoothing", 0.0))
    )
    pipeline = Pipeline(
        built,
        processes,
        optimizer=settings,
        objective=objective,
        tokens_at_once=case.get("at_once") or tokens_at_once(-(-config.vocab_size // processes.layout.tp), False),
        clip=plain.CLIP,
        device=device,
        vocabulary_size=config.vocab_size,
        likelihood=likelihood,
    )
    reader: Any = MemoryReader(DOCUMENTS, config.vocab_size, SEQ)
    feed = Feed(
        reader,
        capacity=case.get("micro_batch", 2) * SEQ,
        replicas=layout.dp,
        replica=processes.replica,
        objective=objective,
        multiple=layout.tp if layout.sequence_parallel else 1,
        pack=case.get("pack", True),
        keyed="dropout" in case.get("lora", {}),
    )
    return Run(
        case, built, processes, pipeline, feed, Sampler(DOCUMENTS, case.get("global_batch", GLOBAL_BATCH), SEED), reader
    )


def config_of(case: dict[str, Any]) -> Any:
    """The family's tiny configuration, with as many of its layers as the case wants."""
    config = tiny_config(case["family"])
    if "tied" in case:
        config.tie_word_embeddings = case["tied"]
    for name, value in case.get("sizes", {}).items():
        setattr(config, name, value)
    config.num_hidden_layers = case.get("layers", config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def layout_of(case: dict[str, Any]) -> Layout:
    sequence_parallel = case.get("sequence_parallel", False)
    return Layout(tp=case.get("tp", 1), pp=case.get("pp", 1), dp=case.get("dp", 1), sequence_parallel=sequence_parallel)


def train_and_validate(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    from sft.engine.trainer import validate

    run = prepare(case, device)
    records = [(record["loss"], record["grad_norm"]) for record in run.train()]
    validation = validate(run.pipeline, run.feed, {"all": range(case.get("val_documents", VALIDATION_DOCUMENTS))})
    weights = {name: (run.built.places[name].part, weight) for name, weight in run.weights().items()}
    return {"records": records, "validation": validation, "weights": weights, "run": run}


def go_on(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """From a checkpoint that lies there already, as `resume_worker` trains."""
    from sft.checkpoint.commit import peers_of
    from sft.checkpoint.fragments import Checkpoint
    from sft.checkpoint.resume import restore
    from tests.distributed import resume_worker

    run = prepare(case, device)
    start = restore(run.pipeline, Checkpoint(Path(case["checkpoint"])), peers_of())
    return {"start": start, "losses": resume_worker._train(run, start, ITERATIONS)}


def hang(case: dict[str, Any], device: torch.device) -> None:
    """One rank, while the others wait for it."""
    if dist.get_rank() == 1:
        time.sleep(600)


def reuse_groups() -> None:
    """Of groups with the same ranks make one: each has threads of its own, and many cases make many groups."""
    new_group, made = dist.new_group, {}

    def once(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        key = (tuple(ranks or ()), repr(arguments), repr(options))
        if key not in made:
            made[key] = new_group(ranks, *arguments, **options)
        return made[key]

    dist.new_group = once


def arm(out: Path, seconds: float) -> Callable[[], None]:
    """Where the process has not called the result after `seconds`, it writes its stacks to a file and ends."""
    file = (out / f"stack-{dist.get_rank()}.txt").open("w")
    faulthandler.dump_traceback_later(seconds, file=file)
    timer = threading.Timer(seconds + GRACE_SECONDS, os._exit, [3])
    timer.daemon = True
    timer.start()

    def disarm() -> None:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
        file.close()

    return disarm


def main(cases_file: str, out: str, seconds: str) -> None:
    from sft.launcher.rendezvous import connect
    from tests.distributed import adapters, bubble, memory, parity, trouble

    kinds = {
        "train": train_and_validate,
        "not_finite": trouble.not_finite,
        "masters": trouble.masters,
        "self_check": trouble.check,
        "hang": hang,
        "memory": memory.measure,
        "adapters": adapters.train_adapters,
        "bubble": bubble.measure,
        "parity": parity.train,
        "old": go_on,
    }
    device = start_worker(connect(600), timeout_seconds=600)
    reuse_groups()
    for number, case in enumerate(json.loads(Path(cases_file).read_text())):
        disarm = arm(Path(out), float(seconds))
        began = time.perf_counter()
        try:
            result = kinds[case.get("kind", "train")](case, device) or {}
        except UserError as error:
            result = {"refusal": str(error)}
        result.pop("run", None)
        torch.save(result | {"seconds": time.perf_counter() - began}, Path(out) / f"{number}-{dist.get_rank()}.pt")
        dist.barrier()
        disarm()
    stop_worker()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
