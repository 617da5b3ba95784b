"""Inputs from outside, mutated under the guidance of coverage: python -m tests.fuzz [TARGET ...] --seconds N.

A target is a module with SEEDS and `one(data)`, which lets an exception through only where the product has a bug.
"""
