"""How much memory a rank takes at most while it trains: a case for the workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sft.objective.cross_entropy import CrossEntropy
from sft.plan.chunks import tokens_at_once
from sft.plan.sampler import Sampler
from tests.allocations import Allocations
from tests.distributed import plain
from tests.quantisation import of_bits
from tokenize_data.reader import Document
from tokenize_data.rendered import ASSISTANT, USER


class EvenReader:
    """Documents that each fill a row of `places`, `share` of which are trained."""

    def __init__(self, num_documents: int, vocabulary_size: int, places: int, share: float) -> None:
        self._ids = np.random.default_rng(0).integers(3, vocabulary_size, places + 1).astype(np.uint16)
        self._answer = round(places * share)
        self.lengths = np.full(num_documents, places + 1, np.uint32)
        self.trained = np.full(num_documents, self._answer, np.uint32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Document:
        question = len(self._ids) - self._answer
        return Document(self._ids, np.array([question, self._answer], np.uint16), np.array([USER, ASSISTANT], np.uint8))


def measure(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Bytes at rest and at the peak of the second and third iteration, when the optimizer has its moments."""
    from sft.config.optimizer import OptimizerSpec
    from sft.engine.feed import Feed
    from sft.engine.groups import form_groups
    from sft.engine.pipeline import Pipeline
    from sft.engine.trainer import train
    from sft.model.build import build_stage
    from sft.model.lora import LoraSettings
    from sft.plan.stages import partition
    from tests.distributed.worker import layout_of
    from tests.models import tiny_config

    with Allocations() as allocations:
        config, dtype, layout = tiny_config(case["family"]), getattr(torch, case["dtype"]), layout_of(case)
        for name, value in case["sizes"].items():
            setattr(config, name, value)
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * config.num_hidden_layers)[: config.num_hidden_layers]
        processes = form_groups(layout)
        layers = partition([1.0] * config.num_hidden_layers, layout.pp)[processes.stage]
        built = build_stage(
            config,
            layers,
            processes.tensor,
            sequence_parallel=layout.sequence_parallel,
            recompute=case["recompute"],
            dtype=dtype,
            device=device,
            lora=LoraSettings(rank=case["rank"], alpha=16.0) if "rank" in case else None,
            quantisation=of_bits(case.get("bits")),
        )
        with torch.no_grad():
            for parameter in built.parameters.values():
                parameter.normal_(0.0, 0.02)
            for weight in built.quantized.values():
                weight.fill(torch.randn(weight.shape, dtype=dtype) * 0.02)
        settings = OptimizerSpec(name="adamw", lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        objective = CrossEntropy()
        pipeline = Pipeline(
            built,
            processes,
            optimizer=settings,
            objective=objective,
            tokens_at_once=case.get("at_once") or tokens_at_once(-(-config.vocab_size // processes.layout.tp), False),
            clip=plain.CLIP,
            device=device,
            vocabulary_size=config.vocab_size,
        )
        rows = case["rows"]
        reader: Any = EvenReader(rows * layout.dp, config.vocab_size, case["places"], case["share"])
        feed = Feed(
            reader,
            capacity=case["places"],
            replicas=layout.dp,
            replica=processes.replica,
            objective=objective,
            multiple=layout.tp if layout.sequence_parallel else 1,
        )
        sampler = Sampler(len(reader), rows * layout.dp, 0)
        steps = train(pipeline, feed, sampler, reader, rate=lambda _: 1e-4, start=0, iterations=3)
        next(steps)
        at_rest = allocations.live
        allocations.begin(details=case.get("details", False))
        for _ in steps:
            pass
    weights = sum(parameter.numel() for parameter in built.parameters.values())
    return {
        "at_rest": at_rest,
        "peak": allocations.peak,
        "stage": processes.stage,
        "weights": weights,
        "details": allocations.at_peak,
    }
