"""The settings: what a user can ask for, with defaults, help and limits.

In reading order: settings (all groups together), one file for each group (model, objective, schedule, optimizer,
adapters, layout, machine, output; the data's group is `tokenize_data.settings`), flags, recipe (YAML to settings and
back), foreign (recipes of other trainers) and convert, schema (for editors). Does not belong here: anything that
follows from the data or the machine, which is `resolve` and `plan`.
"""
