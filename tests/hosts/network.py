"""Hosts of our own: each has its network, name, processes and mounts, and shares the file system.

A host is a process that holds namespaces; its cable is a veth pair whose other end is in the bridge
of this process' namespace. So nothing has a name on the machine that runs this, and nothing is left
when it ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("ip", "unshare", "nsenter", "mount")
_INSIDE = "TILENET_IN_NAMESPACES"
_BRIDGE = "switch"


_KINDS = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
_OUTER = (["unshare", *_KINDS], ["unshare", "--map-root-user", *_KINDS])  # as root, or as anybody


def _try(outer: list[str]) -> str:
    """Return why there can be no hosts in such namespaces; "" if there can."""
    tried = "ip link add name one type bridge && ip link add name two type veth peer name three"
    done = subprocess.run(
        [*outer, "sh", "-c", tried], capture_output=True, text=True, timeout=30, check=False
    )
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else ""


def lacking() -> str:
    """Return why there can be no hosts here; "" if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    return min(map(_try, _OUTER), key=len)


def enter() -> None:
    """Run this program again in namespaces of its own, once, and exit as it does."""
    if _INSIDE in os.environ:
        return
    outer = next(outer for outer in _OUTER if not _try(outer))
    line = [*outer, sys.executable, *sys.argv]
    os.execvpe(line[0], line, {**os.environ, _INSIDE: "1"})


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=30)


@dataclass(frozen=True)
class Host:
    """One host.

    Parameters
    ----------
    name : str
        Its hostname.
    address : str
        Its address.
    pid : int
        Of its first process; all others end with it.
    """

    name: str
    address: str
    pid: int

    @property
    def prefix(self) -> list[str]:
        """What makes a command run here."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--pid", "--mount", "--"]

    def start(self, line: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command here; what it says goes to a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                [*self.prefix, *line], stdout=file, stderr=file, start_new_session=True, **options
            )

    def processes(self, *words: str) -> list[int]:
        """Return the processes of this host whose command lines hold all these words."""
        found: list[int] = []
        try:
            place = Path(f"/proc/{self.pid}/ns/net").readlink()
        except OSError:  # without power
            return found
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (path / "cmdline").read_bytes().decode(errors="replace")
                ours = all(word in line for word in words) and "nsenter" not in line
                if ours and (path / "ns" / "net").readlink() == place:
                    found.append(int(path.name))
        return found

    def kill(self, *words: str) -> int:
        """Kill the processes with these words; return how many there were."""
        found = self.processes(*words)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def pull(self) -> None:
        """Pull the cable: packets are dropped, no end is told, the interface stays up."""
        _ip("link", "set", "dev", self.name, "nomaster")

    def plug(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", "dev", self.name, "master", _BRIDGE)

    def down(self) -> None:
        """Take the host's interface down: it knows that there is no network."""
        self._inside("ip", "link", "set", "eth0", "down")

    def up(self) -> None:
        """Take the interface up again."""
        self._inside("ip", "link", "set", "eth0", "up")
        self._inside("ip", "route", "replace", "default", "dev", "eth0")

    def lose_power(self) -> None:
        """Pull the cable, then end every process: nobody hears a last word."""
        self.pull()
        os.kill(self.pid, signal.SIGKILL)

    def _inside(self, *line: str) -> None:
        subprocess.run([*self.prefix, *line], check=True, capture_output=True, timeout=30)


def _add(name: str, number: int) -> Host:
    told, tell = os.pipe()
    script = f"hostname {name} && ip link set lo up && echo >&{tell} && exec sleep infinity"
    line = ["unshare", *_KINDS, "sh", "-c", script]
    holder = subprocess.Popen(line, pass_fds=[tell], stderr=subprocess.DEVNULL)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        assert file.readline(), f"no host {name}"
    pid = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
    _ip("link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", pid)
    _ip("link", "set", "dev", name, "master", _BRIDGE, "up")
    host = Host(name, f"10.77.0.{number}", pid)
    host._inside("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    host.up()
    return host


@contextmanager
def switched(*names: str) -> Iterator[list[Host]]:
    """Hosts with these names on one switch, until the end of the body."""
    _ip("link", "add", "name", _BRIDGE, "type", "bridge")
    _ip("link", "set", "dev", _BRIDGE, "up")
    hosts: list[Host] = []
    try:
        for number, name in enumerate(names, 1):
            hosts.append(_add(name, number))
        yield hosts
    finally:
        for host in hosts:
            with suppress(ProcessLookupError):
                os.kill(host.pid, signal.SIGKILL)
            subprocess.run(
                ["ip", "link", "delete", "dev", host.name], stderr=-3, check=False, timeout=30
            )
        _ip("link", "delete", "dev", _BRIDGE)


def wait_until(true: Any, seconds: float) -> bool:
    """Wait until a function returns something true; False if it does not in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
