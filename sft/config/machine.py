"""Settings: nodes, processes, and what happens when one of them fails."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.errors import UserError
from tokenize_data.settings import Group, setting


@dataclass(frozen=True, kw_only=True)
class MachineSettings(Group):
    rank: int = setting(0, "number of this node", metavar="R", least=0, recipe=False)
    nodes: int = setting(1, "number of nodes", metavar="N", least=1)
    addr: str = setting("localhost", "address of the first node")
    port: int = setting(6020, "port of the first node", least=1, most=65535)
    node_timeout: float = setting(1800.0, "seconds to wait for other nodes at the start", metavar="S", above=0)
    nproc_per_node: int | None = setting(
        None, "processes on this node (default: one for each visible GPU, else 1)", metavar="N", least=1
    )
    hang_timeout: float | None = setting(
        None,
        "seconds without progress that end a run (default: ten usual iterations, at least 120; one hour for files)",
        metavar="S",
        above=0,
    )
    replace_timeout: float = setting(
        300.0, "seconds to wait for a lost node before going on with fewer replicas", metavar="S", above=0
    )
    hostfile: str | None = setting(
        None, "start on all hosts of this file over ssh: lines of `host slots=8`", metavar="F", recipe=False
    )
    max_restarts: int = setting(
        0, "restart from the latest checkpoint up to N times when a run fails", metavar="N", least=0
    )

    def check(self) -> None:
        if self.rank >= self.nodes:
            raise UserError(
                f"--rank {self.rank} with --nodes {self.nodes}: nodes are counted from 0, so use 0 to {self.nodes - 1}"
            )
