"""Starts and watches processes on this node and others: rendezvous, signals, leases, exit codes. Does not belong here:
what a run does (`resolve` decides it, `worker` does it).
"""
