"""From what the user typed to a complete RunSpec: settings, base model, devices, layout, batches, folders.

Does not belong here: starting processes (`launcher`), anything that a worker does (`worker`), planning arithmetic
(`plan`).
"""
