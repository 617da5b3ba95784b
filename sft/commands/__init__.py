"""One thin file per command: it calls the other packages and prints. Each has `add_flags(parser)`, which imports
nothing slow, and `run(arguments) -> exit code`. `asking` and `judging` hold what `generate` and `evaluate` share.
"""
