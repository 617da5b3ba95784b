"""Versions that a run records, and a check for another project's package that has our command's name."""

from __future__ import annotations

import sys
from importlib import metadata

from tokenize_data import __version__

_OUR_ENTRY = "sft.cli:entry"
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "sft": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main_versions() -> dict[str, str]:
    """What `sft --version` prints, without importing the packages."""
    known = versions()
    return {
        "megasft": known["sft"],
        **{name: known.get(name, "missing") for name in ("torch", "transformers", "deepspeed")},
    }


def foreign_package_warning() -> str | None:
    """A warning if `pip install sft` was run: it installs a seismology program over our files."""
    try:
        found = metadata.distribution("sft")
    except metadata.PackageNotFoundError:
        return None
    if any(entry.value == _OUR_ENTRY for entry in found.entry_points):  # an earlier release of ours
        return None
    return (
        f"the installed package `sft` {found.version} is another project's and may have overwritten files of this "
        "one: pip uninstall sft, then pip install --force-reinstall --no-deps megasft"
    )
