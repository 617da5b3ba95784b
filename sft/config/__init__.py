"""What the user asked for: one frozen dataclass, checked on its own, whose fields are the command line's flags.

In reading order: train (the fields and their checks), flags (fields to argparse and back), recipe (YAML to fields and
back), foreign (recipes of other trainers) and convert, schema (for editors), naming (the run's folder). Does not belong
here: anything that follows from the data or the machine, which is `plan`.
"""
