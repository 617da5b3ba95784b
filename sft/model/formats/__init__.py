"""Formats of frozen weights, a file each, called as in `config.quantisation`: it has a `FORMAT`."""
