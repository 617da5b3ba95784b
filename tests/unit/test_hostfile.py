"""Hosts of a file, and the same command on each."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from sft.config.settings import Settings
from sft.launcher import hostfile
from sft.launcher.hostfile import read_hostfile
from tokenize_data.errors import UserError


def hosts_of(tmp_path: Path, text: str) -> list[tuple[str, int | None]]:
    (tmp_path / "hosts").write_text(text)
    return [(one.host, one.slots) for one in read_hostfile(tmp_path / "hosts")]


def test_deepspeed_s_format(tmp_path: Path):
    text = "# the cluster\nnode1 slots=8\n\nme@node2   slots = 8  # rack 2\n"
    assert hosts_of(tmp_path, text) == [("node1", 8), ("me@node2", 8)]
    assert hosts_of(tmp_path, "a\nb\n") == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host: write lines as node1 slots=8"),
        ("a slots=8\na slots=8\n", "line 2: a is listed twice"),
        ("a slots=8\nb slots=4\n", r"different slots \(a 8, b 4\)"),
        ("a slots=8\nb\n", r"different slots \(a 8, b none\)"),
        ("a slots=0\n", "slots=0 leaves no process"),
        ("a gpus=8\n", "line 1: 'a gpus=8' is not a host"),
        ("-oProxyCommand=evil slots=1\n", "line 1: .* is not a host"),
        ("a slots=" + "9" * 5000 + "\n", "line 1: .* is not a host"),
        ("a slots=\u0663\n", "line 1: .* is not a host"),
        ("a\0b slots=1\n", "line 1: .* is not a host"),
        ("a\x1b[2Jb\n", "line 1: .* is not a host"),
    ],
)
def test_what_is_no_hostfile(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        hosts_of(tmp_path, text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 2}, "leave --nodes and --rank out"),
        ({"no_autoaccept_iters": True}, "give --iters"),
        ({"hostfile": "missing"}, "--hostfile missing cannot be read"),
    ],
)
def test_flags_that_it_rules_out(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        hostfile.run(Settings.of(**{"run_name": "r", "hostfile": "hosts", **values}), [])


_SSH = """#!{python}
import os, shlex, subprocess, sys
host, script = sys.argv[-2:]
if host == "unreachable":
    sys.stderr.write("ssh: connect to host unreachable port 22: No route to host\\n")
    sys.exit(255)
words = shlex.split(script.partition("exec env ")[2])
flags = words[words.index("train") + 1:]
open(host, "w").write(shlex.join(flags))
sys.stdout.write(f"from {{host}}\\n")
sys.stdout.flush()
if "--wait" in flags:
    word = sys.stdin.readline().strip()
    open(host + "-signal", "w").write(word)
    sys.exit(75)
sys.exit(3 if host == "bad" else 0)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which an `ssh` notes what it was asked for."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(_SSH.format(python=sys.executable))
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "a b")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return tmp_path


def start(*hosts: str, argv: tuple[str, ...] = ()) -> int:
    Path("hosts").write_text("".join(f"{host} slots=2\n" for host in hosts))
    flags = ["--run_name", "r", "--hostfile", "hosts", *argv]
    return hostfile.run(Settings.of(run_name="r", hostfile="hosts"), flags)


def test_each_host_gets_the_command_with_its_number(cluster: Path, capfd: pytest.CaptureFixture[str]):
    assert start("me@node1", "node2") == 0
    assert shlex.split((cluster / "me@node1").read_text()) == shlex.split(
        "--run_name r --nodes 2 --rank 0 --addr node1 --nproc_per_node 2"
    )
    assert "--rank 1 --addr node1" in (cluster / "node2").read_text()
    out = capfd.readouterr().out
    assert "from me@node1\n" in out
    assert "node2: from node2\n" in out


def test_what_is_passed_on_and_what_is_not(cluster: Path, monkeypatch: pytest.MonkeyPatch):
    command = hostfile._remote_command(
        hostfile.HostLine(host="a", slots=2), ["--hostfile=hosts", "--lr", "1"], 0, 2, "a", None
    )
    script = command[-1]
    assert "'NCCL_DEBUG=a b'" in script
    assert "hf_secret" not in script
    assert "--hostfile" not in script
    assert "--lr 1 --nodes 2 --rank 0 --addr a --nproc_per_node 2" in script


_EVIL = (
    "$(touch canary)",
    "; touch canary",
    "`touch canary`",
    'it\'s "quoted"',
    "a\nb",
    "*",
    "~",
    "${HOME}",
    "é\udcff",
    "",
    "-",
    "a\\",
)


def test_words_reach_the_far_shell_as_they_were_typed(cluster: Path, monkeypatch: pytest.MonkeyPatch):
    """With a real shell at the far end, as sshd starts it."""
    folder = cluster / 'it\'s $(touch canary) ; "here"'
    folder.mkdir()
    program = folder / "python $(touch canary)"
    program.write_text(
        f'#!{sys.executable}\nimport json, os, sys\njson.dump([sys.argv, os.environ["NCCL_DEBUG"], os.getcwd()], '
        'open("told", "w"))\n'
    )
    program.chmod(0o755)
    (cluster / "bin" / "ssh").write_text('#!/bin/sh\nfor word; do last="$word"; done\nexec sh -c "$last"\n')
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("NCCL_DEBUG", "$(touch canary) ' \" \n x")
    monkeypatch.chdir(folder)
    assert start("node1", argv=_EVIL) == 0
    argv, value, where = json.loads((folder / "told").read_text())
    assert tuple(argv[argv.index("r") + 1 : argv.index("--nodes")]) == _EVIL
    assert value == "$(touch canary) ' \" \n x"
    assert where == str(folder)
    assert not list(cluster.glob("**/canary"))


def test_a_host_that_is_not_reached_ends_the_others_with_its_name(cluster: Path, capfd: pytest.CaptureFixture[str]):
    assert start("waits", "unreachable", argv=("--wait",)) == 3
    assert (cluster / "waits-signal").read_text() == "SIGTERM"
    errors = capfd.readouterr().err
    assert "unreachable: ssh: connect to host unreachable port 22: No route to host" in errors
    assert "ssh to unreachable failed, or `sft` was killed there: see that `ssh unreachable true` works" in errors


def test_the_worst_exit_code_counts(cluster: Path):
    assert start("good", "bad") == 3
