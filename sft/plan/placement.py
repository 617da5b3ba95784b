"""The node of each process: tensor groups stay inside a node, and pipeline neighbours are next to each other."""

from __future__ import annotations

from dataclasses import dataclass

from sft.plan.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Processes are numbered node by node."""

    layout: Layout
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.layout.world // self.per_node)

    @property
    def nodes_of_a_tensor_group(self) -> int:
        """The largest number of nodes of a tensor group."""
        tp = self.layout.tp
        return max(self._node(first + tp - 1) - self._node(first) + 1 for first in range(0, self.layout.world, tp))

    @property
    def transfers(self) -> tuple[int, int]:
        """(pipeline neighbours on the same node, all pipeline neighbours), for the first tensor rank."""
        tp, pp = self.layout.tp, self.layout.pp
        pairs = [(first, first + tp) for first in range(0, self.layout.world, tp) if first // tp % pp < pp - 1]
        return sum(self._node(one) == self._node(other) for one, other in pairs), len(pairs)

    def _node(self, process: int) -> int:
        return process // self.per_node

    def text(self) -> str:
        """One line for the header."""
        inside, pairs = self.transfers
        parts = [f"{self.nodes} nodes of {self.per_node}"]
        if self.layout.tp > 1:
            spread = self.nodes_of_a_tensor_group
            parts.append("tensor groups inside a node" if spread == 1 else f"tensor groups over up to {spread} nodes")
        if pairs:
            share = "all" if inside == pairs else f"{inside} of {pairs}" if inside else ""
            parts.append(
                f"{share} pipeline transfers inside a node" if share else "pipeline transfers to the next node"
            )
        if self.layout.dp > 1:
            parts.append(f"{self.layout.dp} replicas")
        return ", ".join(parts)

    def warning(self, *, layers: int, hidden: int, row_tokens: int, bytes_per_value: int) -> str | None:
        """The cost of tensor groups that span nodes."""
        tp = self.layout.tp
        if self.nodes_of_a_tensor_group == 1:
            return None
        # Two sums forward and two backward in each layer, each of which moves 2 (n - 1) / n of the activations through
        # every process.
        moved = 4 * layers / self.layout.pp * row_tokens * hidden * bytes_per_value * 2 * (tp - 1) / tp
        fitting = [n for n in range(1, self.per_node + 1) if tp % n == 0 and self.per_node % n == 0]
        better = fitting[-1]
        remedy = f"use --tp {better} and --pp {self.layout.pp * tp // better}"
        return (
            f"--tp {tp} does not fit into nodes of {self.per_node} processes: for each row of {row_tokens:,} tokens "
            "every process sends "
            f"{moved / 1e9:.2g} GB between nodes, while all wait; inside a node it would be many times as fast: "
            f"{remedy}"
        )
