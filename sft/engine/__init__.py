"""Running a model on many processes: the only folder that touches DeepSpeed.

In reading order: listen and rendezvous (where processes meet), start (a worker's device and connection), groups (who
shares what), feed (documents to tensors), pipeline (DeepSpeed's engine), trainer (iterations and validations as
records). Does not belong here: what a model computes, which is `model`; what a person sees, which is `observe`; when
something is saved, which is `job`.
"""
