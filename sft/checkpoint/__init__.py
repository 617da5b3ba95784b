"""Files that a run leaves behind: whole models as Hugging Face folders, and states that it is resumed from.

Does not belong here: reading a base model, which is `model`; deciding when something is written, which is `engine`.
"""
