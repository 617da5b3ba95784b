"""The fine-tuner. From Python, `sft.fine_tune`, `sft.load_run`, `sft.plan` and `sft.tokenize` do what the commands do.

In reading order, from top to bottom: api (the functions) and cli (argv to one command), commands (one thin file
each), sweep (a grid of runs), launcher (processes), resolve (settings to a RunSpec) and worker (what each process
does), verify (comparisons with plain transformers), checkpoint (states and models on disk), evaluate (answers and
scores), observe (what people see), engine (many processes, one update), objective (the loss), optimizer, model (a
Hugging Face model as this process's share), spec (the RunSpec), plan (layout, iterations and rows, from the index),
families (what is peculiar to one) and config (the settings). Imports run in this order only.

Belongs here: what happens from shards to a tuned model. Does not belong here: how rows become shards, which is
`tokenize_data`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenize_data import __version__

if TYPE_CHECKING:
    from sft.api import FailedError, Run, UserError, fine_tune, load_run, plan, tokenize

__all__ = ["FailedError", "Run", "UserError", "__version__", "fine_tune", "load_run", "plan", "tokenize"]


def __getattr__(name: str) -> Any:
    """The API is imported when it is used, so that `import sft` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'sft' has no attribute '{name}'")
    return importlib.import_module("sft.plan") if name == "plan" else getattr(importlib.import_module("sft.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
