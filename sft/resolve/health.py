"""What this machine has and what is installed, for `sft doctor`. Imports no torch and shows no secrets."""

from __future__ import annotations

import netrc
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sft.resolve.devices import visible
from sft.spec.versions import foreign_package_warning

_US = "megasft"
_GIB = 1 << 30
_NOT_FOR_USERS = ("dev", "docs", "bench")
_OUTPUT = ("checkpoints", "tokenized")
_WANDB_HOST = "api.wandb.ai"
# Environment variables with tokens; they take precedence over files.
TOKEN_VARIABLES = {"hub": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"), "wandb": ("WANDB_API_KEY",)}


@dataclass(frozen=True, kw_only=True)
class Finding:
    topic: str
    text: str
    level: str = "ok"  # ok, note or problem


def findings(folder: Path) -> list[Finding]:
    """All findings except whether training works. Runs would be written to `folder`."""
    return [*packages(), *extras(), *devices(), *memory(), *disk(folder), *tokens(), *foreign_package()]


def packages() -> list[Finding]:
    """Python and the required packages, each compared with the supported range."""
    try:
        wanted = metadata.metadata(_US)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        text = f"not installed as a package: its requirements are unknown; pip install {_US}"
        return [Finding(topic=_US, text=text, level="note")]
    found = [_compared("python", sys.version.split()[0], wanted)]
    return found + [_package(name, spec) for name, spec, extra in _requirements() if extra is None]


def extras() -> list[Finding]:
    """The extras, each with the packages that are missing."""
    parts: dict[str, list[Finding]] = {}
    for name, spec, extra in _requirements():
        if extra is not None and extra not in _NOT_FOR_USERS:
            parts.setdefault(extra, []).append(_package(name, spec))
    return [_extra(name, found) for name, found in sorted(parts.items())]


def devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    avx = "with" if _has_avx512() else "without"
    found = [Finding(topic="cpu", text=f"{cores} core{'' if cores == 1 else 's'}, {avx} AVX-512")]
    gpus = visible()
    if not gpus:
        return [*found, Finding(topic="gpus", text="none: training runs on the CPU, in float32", level="note")]
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    return [*found, Finding(topic="gpus", text=f"{len(gpus)} ({names})")]


def memory() -> list[Finding]:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError, IndexError):
        return [Finding(topic="memory", text="unknown: /proc/meminfo cannot be read", level="note")]
    return [Finding(topic="memory", text=f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free")]


def disk(folder: Path) -> list[Finding]:
    """Free space in the folders that runs write to, or where these folders would be created."""
    found = []
    for name in _OUTPUT:
        place = (folder / name).absolute()
        there = next(part for part in (place, *place.parents) if part.is_dir())
        free = shutil.disk_usage(there).free
        can_write = os.access(there, os.W_OK)
        text = f"{free / _GIB:.1f} GiB free" if can_write else f"{there} cannot be written"
        found.append(Finding(topic=f"disk {name}", text=text, level="ok" if can_write else "note"))
    return found


def tokens() -> list[Finding]:
    """Which tokens exist and where they come from, never the tokens themselves."""
    return [token_of("hub"), token_of("wandb"), Finding(**{**vars(token_of("hub")), "topic": "token trackio"})]


def token_of(service: str) -> Finding:
    file = _hub_file() if service == "hub" else wandb_netrc()
    source = next((name for name in TOKEN_VARIABLES[service] if os.environ.get(name)), file)
    if source is None:
        return Finding(topic=f"token {service}", text=f"none: `sft login {service}` stores one", level="note")
    return Finding(topic=f"token {service}", text=f"present ({source})")


def wandb_netrc() -> Path | None:
    """The netrc file with a W&B key, if there is one."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return path if netrc.netrc(str(path)).authenticators(_WANDB_HOST) else None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return None


def foreign_package() -> list[Finding]:
    warning = foreign_package_warning()
    if warning is None:
        return [Finding(topic="package sft", text="the other project of that name is not installed")]
    return [Finding(topic="package sft", text=warning, level="problem")]


def _hub_file() -> Path | None:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
    return path if path.is_file() else None


def _requirements() -> list[tuple[str, str, str | None]]:
    """The direct requirements of megasft as (package, range, extra or None)."""
    from packaging.requirements import InvalidRequirement, Requirement

    found: list[tuple[str, str, str | None]] = []
    try:
        texts = metadata.requires(_US) or []
    except metadata.PackageNotFoundError:
        return found
    for text in texts:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.name != _US:
            extra = None if wanted.marker is None else str(wanted.marker).partition('extra == "')[2].rstrip('"') or None
            found.append((wanted.name, str(wanted.specifier), extra))
    return found


def _package(name: str, spec: str) -> Finding:
    try:
        return _compared(name, metadata.version(name), spec)
    except metadata.PackageNotFoundError:
        return Finding(topic=name, text=f"missing, needs {spec or 'any version'}", level="problem")


def _compared(name: str, version: str, spec: str) -> Finding:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        fits = SpecifierSet(spec).contains(version, prereleases=True)
    except InvalidVersion:
        fits = True  # built from source
    text = version if fits else f"{version} does not fit {spec}: pip install '{name}{spec}'"
    return Finding(topic=name, text=text, level="ok" if fits else "problem")


def _extra(name: str, found: Sequence[Finding]) -> Finding:
    lacking = [finding for finding in found if finding.level != "ok"]
    if lacking:
        missing = ", ".join(finding.topic for finding in lacking)
        text = f"not installed ({missing}): pip install 'megasft[{name}]'"
        return Finding(topic=f"extra {name}", text=text, level="note")
    return Finding(topic=f"extra {name}", text=", ".join(f"{finding.topic} {finding.text}" for finding in found))


def _has_avx512() -> bool:
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
