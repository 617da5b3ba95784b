"""Processes on this node and on others: start, rendezvous, signals, leases, exit codes.

Does not belong here: what a run does (`resolve` decides it, `worker` does it).
"""
