"""What a run will do, from the shards' index alone: layout, iterations, which documents make each, and how they are
packed into rows.

In reading order: layout (tensor ranks, stages, replicas), placement (on nodes), sampler (documents of an iteration),
packing (rows, micro-batches, replicas), schedule (its learning rate), stages (layers of a pipeline), communicators (who
talks to whom). Then what that takes: gpus (what they can do), activations and memory (bytes of a rank), speed (seconds
of an iteration), rows (of an iteration, for any layout), search (all layouts that could be, and the fastest that fits),
answer, explain and words (what is told). Pure arithmetic: no torch, no state, no files but a user's table of GPUs;
every process computes the same plan. Does not belong here: anything that needs a token id or a tensor.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """`sft.plan` is this package, and can be called as a function of the Python API."""

    def __call__(self, **settings: Any) -> dict[str, Any]:
        answer: dict[str, Any] = importlib.import_module("sft.api").plan(**settings)
        return answer


sys.modules[__name__].__class__ = _Package
