"""Comparisons of our engine with something else: plain transformers, the user's own rows, the start-up self-check.

Does not belong here: comparisons of our layouts with each other, which are tests.
"""
