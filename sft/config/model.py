"""Settings: which base model, in which precision."""

from __future__ import annotations

from dataclasses import dataclass

from tokenize_data.settings import BaseSettings, setting

DTYPES = ("bf16", "fp32")


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BaseSettings):
    intermediate_iter: int | None = setting(None, "an early release of the base model", metavar="I", least=0)
    trust_remote_code: bool = setting(
        False, "run code that comes with the base model; its revision must be pinned by a folder"
    )
    dtype: str | None = setting(None, "default: bf16 on GPUs, fp32 on the CPU", choices=DTYPES)
