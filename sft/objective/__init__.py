"""The objectives: the loss of a micro-batch, its normaliser, and the figures of a validation.

In reading order: `interface`, `likelihood` (of tokens, on one rank or several), `cross_entropy`, the others, `choose`
(from settings). A new objective is one file here and one line in `choose`. Does not belong here: how batches are made
and gradients exchanged, which is the engine.
"""
