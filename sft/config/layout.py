"""Settings: how the model is distributed over processes. What is not given is planned."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.settings import Group, setting

RECOMPUTES = ("none", "selective", "full")
COMPILES = ("auto", "off")


@dataclass(frozen=True, kw_only=True)
class LayoutSettings(Group):
    tp: int | None = setting(
        None, "tensor-parallel size (default: from checkpoints.toml, the path or the plan)", metavar="T", least=1
    )
    pp: int | None = setting(
        None, "pipeline stages (default: from checkpoints.toml, the path or the plan)", metavar="P", least=1
    )
    micro_batch: int | None = setting(
        None, "a packed row holds B * seq tokens (default: from the plan)", metavar="B", least=1
    )
    recompute: str | None = setting(
        None, "which activations the backward pass computes again (default: from the plan)", choices=RECOMPUTES
    )
    compile: str = setting(
        "auto",
        "compile the layers (auto: on GPUs, where tp is 1 and attention takes all documents at once)",
        choices=COMPILES,
    )
    sequence_parallel: bool | None = setting(None, "split activations as well (default: on when tp > 1)")
    gpu: str | None = setting(
        None, "kind of GPU to plan for, such as h100-80gb (default: the GPUs of this machine)", metavar="NAME"
    )
    gpu_file: str | None = setting(None, "TOML file with GPUs of your own, one table each", metavar="F")
