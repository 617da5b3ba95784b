"""Hosts that are network namespaces of this machine, joined by a bridge, each with a name of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "sftbr0"


def are_possible() -> str | None:
    """None, or why not."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["ip", "netns", "add", "sftprobe"], capture_output=True, text=True) if _has_ip() else None
    if tried is None:
        return "there is no `ip` command (iproute2)"
    if tried.returncode:
        return f"network namespaces are not allowed: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "sftprobe"], check=True)
    return None


def _has_ip() -> bool:
    return any(Path(folder, "ip").exists() for folder in os.environ["PATH"].split(":"))


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Their namespaces' names; host n has the address 10.77.0.<n + 1>."""
    names = [f"sfthost{number}" for number in range(count)]
    _clear(names)
    _ip("link", "add", BRIDGE, "type", "bridge")
    _ip("link", "set", BRIDGE, "up")
    for number, name in enumerate(names):
        _ip("netns", "add", name)
        _ip("link", "add", f"sftv{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", f"sftv{number}", "master", BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-n", name, "link", "set", device, "up")
    try:
        yield names
    finally:
        _clear(names)


def address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def command_on(name: str, command: list[str], private: Path | None = None) -> list[str]:
    """The command line that runs `command` on a host; `private` hides a folder there behind an empty one."""
    inner = ["unshare", "--uts", "--mount", "sh", "-c"]
    hide = f"mount -t tmpfs none {private} && " if private is not None else ""
    script = f'hostname {name} && {hide}exec "$0" "$@"'
    return ["ip", "netns", "exec", name, *inner, script, *command]


def ssh_is_possible() -> str | None:
    """None, or why not."""
    missing = [
        program
        for program in ("sshd", "ssh", "ssh-keygen")
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    return f"there is no {missing[0]}" if missing else None


@contextlib.contextmanager
def ssh_servers(names: list[str], folder: Path) -> Iterator[dict[str, str]]:
    """A server on each host, for which a key is enough. Yields the environment in which `ssh` uses it."""
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user.pub", folder / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "AuthorizedKeysFile": folder / "authorized",
        "StrictModes": "no",
        "PermitRootLogin": "yes",
        "UsePAM": "no",
        "PidFile": "none",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    server = [
        shutil.which("sshd", path="/usr/sbin:/usr/bin") or "sshd",
        "-D",
        "-f",
        "/dev/null",
        "-h",
        str(folder / "host"),
        *flags,
    ]
    client = folder / "ssh"
    known = f"-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -i {folder / 'user'}"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {known} "$@"\n')
    client.chmod(0o755)
    servers = [subprocess.Popen(command_on(name, server), stderr=subprocess.DEVNULL) for name in names]
    try:
        yield {"PATH": f"{folder}:{os.environ['PATH']}"}
    finally:
        for process in servers:
            process.kill()
            process.wait()


def cut(number: int) -> None:
    """Pull the cable."""
    _ip("link", "set", f"sftv{number}", "down")


def _clear(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
