"""Masks what looks like a key or a password in reports, converted recipes and messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "[hidden]"
_NAME = re.compile(
    r"(?i)(?:api|access|secret|private|auth|account|storage)[_-]?key|passw(?:or)?d|passphrase|secret|credential"
    r"|(?:^|[_-])(?:pwd|token)$|(?:auth|access|api|hub|hf|bearer|github|wandb)[_-]?token"
)
_WHOLE = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|AKIA|xox[abp]-|glpat-)[\w-]{8,}|(?i:bearer|basic)\s+[\w.~+/-]{8,}=*"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
    r"|(?<![\w/@.-])[0-9a-fA-F]{40}(?![\w-])"  # Weights & Biases keys; after / or @ it is a commit
)
# A name that marks a secret, in a command, a URL, YAML, JSON or Python.
_NAMED = re.compile(
    r"(?i)(?P<name>(?<![a-z])(?:[\w-]*(?:api|access|secret|private|auth)[_-]?key|[\w-]*passw(?:or)?d|passphrase|[\w-]*secret"
    r"|[\w-]*(?:auth|access|api|hub|hf|bearer|github|wandb)[_-]?token|token(?==))[\"']?\s*[=:]\s*)"
    r"(?P<value>\"[^\"]*\"|'[^']*'|[^\s&\"',;)}\]]+)"
)
_COMMITS = ("revision", "commit", "commit_hash", "sha")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return _NAME.search(name) is not None


def masked(text: str) -> str:
    return _WHOLE.sub(MASK, _NAMED.sub(lambda found: found["name"] + MASK, text))


def masked_value(value: Any, name: str = "") -> Any:
    """Mask secrets in a value, also within mappings and lists."""
    if isinstance(value, Mapping):
        return {key: masked_value(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [masked_value(part, name) for part in value]
    if (
        isinstance(value, str | int | float)
        and not isinstance(value, bool)
        and value not in ("", "...")
        and is_secret_name(name)
    ):
        return MASK
    if isinstance(value, str) and name.lower() not in _COMMITS:
        return masked(value)
    return value
