"""Updating weights: float32 sums of gradients, who owns which rows, the exchange between replicas, the norm, and the
optimizers themselves.

In reading order: ownership (who owns what), sums (gradients of an iteration), exchange (between replicas), shards,
algorithms (the optimizers over shards, one file each) with whole, norm, sharded (an update
from end to end), states with eight_bits (for checkpoints). Does not belong here: how gradients come about, which is
`model`; when there is an update, which is `engine`; files, which are
`checkpoint`. Knows nothing of DeepSpeed.
"""
