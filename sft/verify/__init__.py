"""Compares our engine with something else: plain transformers, on synthetic or the user's own rows, and the self-check
at start-up. Does not belong here: comparisons of our layouts with each other, which are tests.
"""
