"""The files of a run: models as Hugging Face folders, and checkpoints to resume from. In reading order: windows and
fragments (parts of tensors in files, readable by any layout), manifest (marks a checkpoint as complete), commit
(makes it visible), resume (save and restore), hf_folder and export (models), adapter_config, adapter and the merge
files (adapters in PEFT's format, and merged into their base). Does not belong here: reading a base model (`model`),
deciding when to save (`worker`).
"""
