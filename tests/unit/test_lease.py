"""A lease that a person, a disk or another program has spoilt: whoever lives keeps it, and nobody crashes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sft.launcher import lease
from tokenize_data.errors import UserError


def content(**changes: Any) -> str:
    """Of a lease that this process holds."""
    return json.dumps({**json.loads(lease._content("t")), **changes})


SPOILT = {
    "renewed in words": content(renewed="yesterday"),
    "renewed never": content(renewed=None),
    "renewed at infinity": content(renewed=1e999),
    "renewed in ages": content(renewed=10**400),
    "a process in words": content(pid="one"),
    "a host of none": content(host=None),
    "a list": content(token=[]),
    "no object": "[1]",
    "half": content()[:20],
    "deep": "[" * 100_000,
    "not UTF-8": "\udcff",
    "nothing": "",
    "more": content(pid=True, renewed=False, started=3),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_lease_that_nobody_renews_is_no_obstacle(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)
    file = tmp_path / lease.NAME
    file.write_text(SPOILT[name], errors="surrogateescape")
    assert lease.is_free(tmp_path, 0.0)
    with lease.held(tmp_path, watch_seconds=0.05):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert not file.exists()


def test_a_spoilt_lease_of_a_living_run_is_written_again_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / lease.NAME
    file.write_text(content(renewed="yesterday"))
    waits: list[float] = []

    def renew(seconds: float) -> None:
        waits.append(seconds)
        file.write_text(content())

    monkeypatch.setattr(lease.time, "sleep", renew)
    with pytest.raises(UserError, match="is being trained by process"), lease.held(tmp_path, watch_seconds=60.0):
        pass
    assert len(waits) == 1


def test_whole_seconds_are_a_number(tmp_path: Path):
    (tmp_path / lease.NAME).write_text(content(renewed=1_700_000_000))
    assert not lease.is_free(tmp_path, 0.0)
