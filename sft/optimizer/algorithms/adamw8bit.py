"""AdamW with 8-bit moments, from bitsandbytes."""

from __future__ import annotations

import torch

from sft.optimizer.algorithms.interface import Work, decaying_groups
from tokenize_data.errors import UserError


def make(work: Work) -> list[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--optimizer adamw8bit needs bitsandbytes: pip install 'megasft[quantized]', or use --optimizer adamw"
        ) from error
    spec = work.spec
    return [AdamW8bit(decaying_groups(work), lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps)]
