"""Files that a run leaves behind: whole models as Hugging Face folders, and states that it is resumed from.

In reading order: state (what of a pipeline has to be kept), windows and fragments (parts of tensors in files, read by
any layout), manifest (by which a checkpoint is known to be whole), commit (how it becomes visible), resume (save and
restore), hf_folder and export (models), adapter_config, adapter and merge (adapters in PEFT's format, and into their
base). Does not belong here: reading a base model, which is `model`; deciding when something is written, which is `job`.
"""
