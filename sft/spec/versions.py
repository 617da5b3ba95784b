"""The versions that a run records."""

from __future__ import annotations

import sys
from importlib import metadata

from tokenize_data import __version__

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "sft": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
