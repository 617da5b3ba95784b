"""The fine-tuner. In reading order, from top to bottom: cli (argv to one command), commands (one thin file each), sweep
(a grid of runs), launcher (processes), resolve (settings to a RunSpec) and worker (what each process does), verify
(comparisons with plain transformers), checkpoint (states and models on disk), evaluate (answers and scores), observe
(what people see), engine (many processes, one update), objective (the loss), optimizer, model (a Hugging Face model as
this process's share), spec (the RunSpec), plan (layout, iterations and rows, from the index), families (what is
peculiar to one) and config (the settings). Imports run in this order only.

Belongs here: what happens from shards to a tuned model. Does not belong here: how rows become shards, which is
`tokenize_data`.
"""

from tokenize_data import __version__

__all__ = ["__version__"]
