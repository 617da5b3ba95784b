"""Formats of frozen weights: one file each, named as in `config.quantisation`, with a `FORMAT`."""
