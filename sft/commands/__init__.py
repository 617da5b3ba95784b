"""One file for each command: its flags, and `run`. Thin: they call what the other folders do, and print.

`asking` and `judging` are what `generate` and `evaluate` share. Each of the others has `add_flags(parser)`, which
imports nothing slow, and
`run(arguments) -> exit code`.
"""
