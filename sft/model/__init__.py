"""One Hugging Face causal LM, taken apart into what a pipeline stage needs, from its own layers.

In reading order: attention (documents in a packed row do not see each other), anatomy (where a model's parts are), parts (embedding, block
and head as modules that a stage is made of), selfcheck (the parts put together are what transformers computes). Does not belong here:
processes and their groups, which are `engine`; files of a run, which are `checkpoint`.
"""
