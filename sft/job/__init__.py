"""A training job, from what was typed to the exported model.

In reading order: settings (flags and recipe) and devices, base (the base model's facts), question and planning (which layouts are open to
the plan, what is known of data and machine), prepare (what will be done) and speed (of this CPU), launch (questions and processes), lease
(one run at a time in a folder) and identity (whose folder it is), nodes, meeting, door, lines, preflight and network (the same command on
several nodes), hostfile (over ssh), torchrun (workers that torchrun started), processes (this node's workers, and how they ended), ending
(how a worker ends: errors, signals), watchdog (hangs), worker (what each process does), loop (all iterations), saving (when, and what a
checkpoint says), watch (what is told), hub (uploading the model), adapters and merging (what adapters a job trains, and what they are
merged into). parity compares a layout with plain (a loop over transformers) on synthetic data, parity_rows the base itself on the user's
rows. Does not belong here: how any of that is done, which is in the folders below.
"""
