"""Time for one operation on a GPU (a matmul, moved bytes, traffic), and the parts of an iteration."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sft.plan.gpus import Gpu
from sft.plan.layout import Layout

LAUNCH_SECONDS = 4e-6  # per kernel


EXCHANGE_SECONDS = 20e-6  # latency of a collective


_ACROSS_NODES = 0.6  # share of a node's network cards that a tensor-parallel collective across nodes reaches


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The time of one iteration, as a sum of parts."""

    products: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    recompute: float = 0.0
    head: float = 0.0
    tensor_traffic: float = 0.0
    pipeline_traffic: float = 0.0
    bubble: float = 0.0
    data_traffic: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.memory_bound + self.recompute + self.head

    def times(self, factor: float) -> Seconds:
        return Seconds(**{field.name: getattr(self, field.name) * factor for field in fields(self)})

    def plus(self, other: Seconds) -> Seconds:
        return Seconds(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


class Clock:
    """The time that a GPU takes for one operation."""

    def __init__(self, gpu: Gpu, dtype: str) -> None:
        self._gpu, self._each = gpu, 2 if dtype == "bf16" else 4
        peak = gpu.bf16_tflops if dtype == "bf16" else gpu.fp32_tflops
        self.rate = peak * 1e12 * gpu.matrix_efficiency
        self.memory = gpu.memory_gbps * 1e9 * gpu.memory_efficiency
        self.link = gpu.link_gbps * 1e9 * gpu.link_efficiency
        self.network = gpu.network_gbps * 1e9 * gpu.network_efficiency

    def product(self, rows: float, columns: float, inner: float, count: float = 1.0) -> float:
        traffic = self._each * (rows * inner + inner * columns + rows * columns)
        return count * (2 * rows * columns * inner / self.rate + traffic / self.memory) + LAUNCH_SECONDS

    def moved(self, num_bytes: float, launches: int = 1) -> float:
        return num_bytes / self.memory + launches * LAUNCH_SECONDS

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        """All-reduce over neighbouring ranks; beyond a node, its network is the limit."""
        if ranks == 1:
            return 0.0
        bandwidth = (
            self.link
            if ranks <= self._gpu.gpus_per_node
            else min(self.link, self.network * self._gpu.gpus_per_node * _ACROSS_NODES)
        )
        return 2 * (ranks - 1) / ranks * num_bytes / bandwidth + EXCHANGE_SECONDS

    def replicas_bandwidth(self, layout: Layout) -> float:
        """Bandwidth between replicas, which are tp ranks apart: those in one node share its network cards."""
        here = max(1, min(layout.dp, self._gpu.gpus_per_node // layout.tp))
        return self.link if here == layout.dp else min(self.link, here * self.network)

    def stages_bandwidth(self, layout: Layout) -> float:
        return self.link if layout.world <= self._gpu.gpus_per_node else self.network
