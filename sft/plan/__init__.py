"""What a run will do, from the shards' index alone: layout, iterations, which documents make each, and how they are packed into rows.

In reading order: layout (tensor ranks, stages, replicas), placement (on nodes), sampler (documents of an iteration), packing (rows,
micro-batches, replicas), schedule (its learning rate), stages (layers of a pipeline). Pure arithmetic: no torch, no files, no state; every
process computes the same plan. Does not belong here: anything that needs a token id or a tensor.
"""
