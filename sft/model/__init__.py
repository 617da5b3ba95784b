"""Splits a Hugging Face causal LM into pipeline stages, which use the model's own layers.

In reading order: base_folder (where its files are), anatomy (where a model's parts are), attention (documents in a
packed row do not see each other), parts (embedding, block and head as modules that a stage is made of), collectives
(what tensor-parallel ranks exchange), slices, linear, parallel_layers and tensor_parallel (which parts of a parameter a
rank holds), lora, dropout and quantized (adapters, and a frozen base in few bits), matmul and norms (kernels used in
place of torch's), stage and loss (what a process computes), gradients (sums over ranks), build (configuration to
stage), weights (files to parameters), selfcheck (all of it is what transformers computes). Does not belong here:
processes and their groups, which are `engine`; files of a run, which are `checkpoint`.
"""
