"""A grid of runs: each of them an ordinary `sft train` with a recipe of its own.

In reading order: condition (small expressions), grid (axes to trials), durations (how long they may take), pool
(processes on disjoint GPUs), trials (what has been done, what is next), results (the table, sweep.csv), charts (a
picture for each axis). Does not belong here: anything about one run, which is `job`.
"""
