"""One file for each command: its flags, and `run`. Thin: they call what the other folders do, and print.

Each has `add_flags(parser)`, which imports nothing slow, and `run(arguments) -> exit code`.
"""
