"""The likelihood compiled by torch.compile: logits stay in the model's own format, and are read and written a few times
less.

Before it is used, it is compared with the one that is not compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sft.model.collectives import SingleRank
from sft.objective.likelihood import Likelihood, negative_log_likelihood

_TOKENS = 24
_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}  # of a gradient's size: of its last bit, here


def compiled_likelihood(
    columns: int, dtype: torch.dtype, device: torch.device, backend: str = "inductor"
) -> tuple[Likelihood, str | None]:
    """(what is to be used where one rank has all columns of the vocabulary, why that is not compiled)."""
    try:
        compiled: Likelihood = torch.compile(negative_log_likelihood, backend=backend)
        expected, found = (_measured(one, columns, dtype, device) for one in (negative_log_likelihood, compiled))
        distances = [
            float((one.double() - other.double()).norm() / other.double().norm())
            for one, other in zip(found, expected, strict=True)
        ]
    except Exception as error:  # of whatever kind: Dynamo's, Inductor's, a C compiler's that is not there
        return negative_log_likelihood, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not max(distances) <= _CLOSE[dtype]:
        return negative_log_likelihood, f"the compiled loss is off by {max(distances):.1e} of its size"
    return compiled, None


def _measured(likelihood: Likelihood, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum, of two numbers of tokens, so that later ones need no other compilation."""
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
