"""The likelihood compiled by torch.compile: logits stay in the model's dtype and are read and written less often.

The compiled version is compared with eager mode before it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sft.model.collectives import SingleRank
from sft.objective.likelihood import Likelihood, negative_log_likelihood

_TOKENS = 24
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # relative to the norm; for bf16, its epsilon


def compiled_likelihood(
    columns: int, dtype: torch.dtype, device: torch.device, backend: str = "inductor"
) -> tuple[Likelihood, str | None]:
    """Return the likelihood for a rank that holds the whole vocabulary, and why it is not compiled (None if it is)."""
    try:
        compiled: Likelihood = torch.compile(negative_log_likelihood, backend=backend)
        expected, found = (
            _losses_and_gradients(one, columns, dtype, device) for one in (negative_log_likelihood, compiled)
        )
        distances = [
            float((one.double() - other.double()).norm() / other.double().norm())
            for one, other in zip(found, expected, strict=True)
        ]
    except Exception as error:  # any kind: from Dynamo, from Inductor, or a missing C compiler
        return negative_log_likelihood, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not max(distances) <= _TOLERANCE[dtype]:
        return negative_log_likelihood, f"the compiled loss is off by {max(distances):.1e} of its size"
    return compiled, None


def _losses_and_gradients(
    likelihood: Likelihood, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the losses and gradients for two token counts, so that torch.compile already knows the count varies."""
    losses, gradients = [], []
    for tokens in (_TOKENS, 2 * _TOKENS):
        generator = torch.Generator(device).manual_seed(tokens)
        logits_NV = torch.randn(tokens, columns, generator=generator, device=device).mul_(3).to(dtype).requires_grad_()
        targets_N = torch.randint(0, columns, (tokens,), generator=generator, device=device)
        with torch.enable_grad():
            nll_N = likelihood(logits_NV, targets_N, columns, SingleRank())
            (gradient_NV,) = torch.autograd.grad(nll_N.sum(), [logits_NV])
        losses.append(nll_N.detach())
        gradients.append(gradient_NV)
    return torch.cat(losses), torch.cat(gradients)
