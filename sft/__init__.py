"""The fine-tuner. In reading order: cli (argv to one command), commands (one file each, thin), config (what the user asked for),
plan (iterations and rows, from the index), model (a Hugging Face model taken apart into stages), observe (what people see).

Belongs here: what happens from shards to a tuned model. Does not belong here: how rows become shards, which is `tokenize_data`.
"""

from tokenize_data import __version__

__all__ = ["__version__"]
