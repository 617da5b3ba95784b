"""Builds a data set on several machines that share a folder: each makes its part, the last one joins them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tokenize_data.build import Plan, build_part
from tokenize_data.encode import FastPathError
from tokenize_data.parts import PartOf
from tokenize_data.sources import Source

_MOST_SHOWN = 8
Say = Callable[[str], None]


def has_all_parts(plan: Plan, part: PartOf, folder: Path, say: Say) -> bool:
    """Make this machine's part unless it exists. Returns whether all parts exist now."""
    folder.mkdir(parents=True, exist_ok=True)
    if part.file(folder).exists():
        say(f"part {part.number} of {part.count} exists already")
    else:
        try:
            build_part(plan, part, folder, say)
        except FastPathError as difference:
            say(f"the fast tokenizer differs on {str(difference)[:60]!r}: starting again without it")
            build_part(replace(plan, fast=False), part, folder, say)
    missing = part.missing(folder)
    if missing:
        shown = ", ".join(map(str, missing[:_MOST_SHOWN])) + (", ..." if len(missing) > _MOST_SHOWN else "")
        say(f"part {part.number} of {part.count} is written; missing: {shown}. The last one joins them")
    return not missing


def _changed(source: Source) -> int | str:
    return source.stamp if source.url is not None else source.path.stat().st_mtime_ns


def parts_folder(root: Path, plan: Plan, count: int) -> Path:
    """The folder for parts of exactly this data set, settings and files, so that others are never mixed in."""
    split = plan.split.facts() if plan.split is not None else None
    facts = {
        "files": [(source.name, source.size, _changed(source)) for source in plan.files],
        "specs": [spec.reading() for spec in plan.specs],
        "tokenizer": plan.tokenizer.fingerprint,
        "template": plan.template.fingerprint(),
        "how": [plan.seq, plan.seed, split, plan.is_validation, count],
    }
    key = hashlib.sha256(json.dumps(facts, default=str).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return root / f".{plan.run_name}.parts" / key
