"""What launcher and workers share: the RunSpec and run.json, the run's folder and its files, exit codes, errors.

Does not belong here: how any of it is decided (`resolve`) or used.
"""
