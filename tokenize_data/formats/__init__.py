"""Formats of rows: one file each, with a `FORMAT` that turns a row into messages.

In reading order: interface (what a format is), then the formats by name; turns is shared by those with lists of
messages. A new format is a file here and its name in `FORMATS` of `tokenize_data/dataset.py`. Does not belong here:
formats of files, which are `sources` and `rows`; masks and templates, which know messages only.
"""
