"""Runs a model on many processes: the only package that uses DeepSpeed. In reading order: start (a worker's device and
process group), groups (which processes share what), feed and sending (documents to tensors on the device), loss,
pipeline (DeepSpeed's engine), trainer (iterations and validations as records). Does not belong here: what a model
computes (`model`), what people see (`observe`), when something is saved (`worker`).
"""
