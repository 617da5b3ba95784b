"""A grid of runs, each an ordinary `sft train` with its own recipe. In reading order: condition (small expressions),
grid (axes to trials), durations (how long trials may take), pool (processes on disjoint GPUs), trials (what is done
and what is next), results (the table, sweep.csv), charts (one per axis). Does not belong here: anything about a
single run.
"""
