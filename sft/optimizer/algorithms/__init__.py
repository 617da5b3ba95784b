"""The optimizers: one file each, whose `make` returns torch optimizers over the shards of this process. They are
torch's and bitsandbytes' own where those exist.

In reading order: interface, then the optimizers by name. A new optimizer is a file here and a line in
`sft/config/optimizer.py`.
"""
