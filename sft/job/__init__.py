"""A training job, from what was typed to the exported model.

In reading order: base (the base model's facts), prepare (what will be done), launch (questions and processes), worker (what each process
does), watch (what it tells). Does not belong here: how any of that is done, which is in the folders below.
"""
