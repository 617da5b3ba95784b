"""Running a model on many processes: the only folder, with `checkpoint`, that touches torch.distributed and DeepSpeed.

In reading order: groups (who shares what), feed (documents to tensors), pipeline (DeepSpeed's engine), trainer (iterations), validate.
Does not belong here: what a model computes, which is `model`; what a person sees, which is `observe`.
"""
