"""Checks of a tokenised data set before a GPU is paid for: repeats, leaks, answers, outliers, private data.

Here: what is counted, on which documents, and the sentence that says it. Not here: how it is shown (`sft/observe`).
Read `check.py` first. `quick.py` has the checks that the data stage makes by itself.
"""
