"""Turns what the user typed into a complete RunSpec: settings, base model, devices, layout, batches, folders. Does not
belong here: starting processes (`launcher`), what workers do (`worker`), planning arithmetic (`plan`).
"""
