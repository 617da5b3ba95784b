"""Objectives: the loss of a micro-batch, its normaliser, and the validation metrics.

In reading order: `interface`, `likelihood` (of tokens, on one rank or several), `cross_entropy`, the others, `choose`
(from settings). A new objective is one file here and one line in `choose`. Does not belong here: building batches and
exchanging gradients, which the engine does.
"""
