"""The fine-tuner. In reading order: cli (argv to one command), commands (one file each, thin), config (what the user
asked for), sweep (a grid of runs), job (one run, from what was typed to the exported model), plan (layout, iterations
and rows, from the index), model (a Hugging Face model taken apart into this process's share), engine (many processes,
one update), checkpoint (states to resume from, whole models), evaluate (answers and what they are worth), observe (what
people see). Imports run one way: cli, commands, sweep, job, observe, evaluate, checkpoint, engine, model, plan, config.

Belongs here: what happens from shards to a tuned model. Does not belong here: how rows become shards, which is
`tokenize_data`.
"""

from tokenize_data import __version__

__all__ = ["__version__"]
