"""N hosts on one machine: network namespaces joined by a switch, with links of a known rate.

Each host has a namespace of its own with one interface; one namespace more holds a Linux bridge, the switch. The
machine's own network is left alone: every interface is made inside these. Both directions of a link are limited by a
token bucket (tc tbf), in the host for what it sends and at the switch for what it receives, where up to 50 ms of
traffic may wait.

The rate counts every frame with its headers (66 bytes of Ethernet, IP and TCP) but without preamble and checksum. So do
the counters of an interface, acknowledgements included, but several frames may pass as one with one header (GSO), at
100 Mbit/s two, at 1 Gbit/s seven. That would hide 4 % of the bytes if frames held the usual 1,500; they hold 9,000, and
it hides 0.7 % at most. `gso_max_segs 1` on both ends of a link would hide none, but takes four times the processor
time: with it and frames of 1,500, four hosts that all send to each other at 1 Gbit/s on two cores reach 0.4 Gbit/s.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dqrm.errors import UserError

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LOWEST, _HIGHEST = 10**3, 10**11  # beyond them tc's bucket or its queue no longer fits the 32 bits it has
_BURST_SECONDS, _LEAST_BURST = 0.002, 16_384
_QUEUE_SECONDS = 0.05
_INTERFACE = "eth0"
_MTU = "9000"


@dataclass(frozen=True)
class Host:
    """Where one rank runs.

    Attributes:
        rank: its number, from 0.
        prefix: what to put before a command so that it runs there; nothing on loopback.
        address: its IPv4 address.
        interface: the interface to bind to and to count on.
    """

    rank: int
    prefix: tuple[str, ...]
    address: str
    interface: str


@contextmanager
def hosts(ranks: int, rate: str | None) -> Iterator[list[Host]]:
    """`real` hosts: with a rate, in network namespaces of their own with links of `rate` each way; else on loopback.

    The network is removed when the block is left, by an exception too; a kill leaves it (`ip netns list` shows it).
    Processes that still run in it are not ended.
    """
    if ranks < 1:
        raise UserError(f"{ranks} hosts cannot be made, expected 1 or more")
    if rate is None:
        yield [Host(rank, (), "127.0.0.1", "lo") for rank in range(ranks)]
        return
    bits = parse_rate(rate)
    _require_tools(rate)
    made: list[str] = []
    try:
        yield _build(ranks, bits, made)
    finally:
        _remove(made)


def interface_bytes(interface: str) -> tuple[int, int]:
    """(received, sent) bytes of an interface in the network namespace of this process, by the kernel's counters."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        raise UserError(f"bytes of {interface!r} cannot be counted without /proc/net/dev, which Linux has") from None
    counters = {name.strip(): values.split() for name, _, values in (line.rpartition(":") for line in lines[2:])}
    if interface not in counters:
        raise UserError(f"there is no interface {interface!r} here, expected one of {', '.join(sorted(counters))}")
    return int(counters[interface][0]), int(counters[interface][8])


def parse_rate(rate: str) -> int:
    """Bits per second of '100mbit', '1gbit', '2.5gbit', '800kbit'."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(kbit|mbit|gbit)", rate)
    if match is None:
        raise UserError(f"rate {rate!r} is not understood, expected a number and kbit, mbit or gbit, as 100mbit")
    bits = round(float(match[1]) * _UNITS[match[2]])
    if not _LOWEST <= bits <= _HIGHEST:
        raise UserError(f"rate {rate!r} is out of range, expected 1kbit to 100gbit")
    return bits


def _require_tools(rate: str) -> None:
    if sys.platform != "linux":
        raise UserError(f"links of {rate} need Linux's network namespaces; without a rate the hosts are on loopback")
    if os.geteuid() != 0:
        raise UserError(
            f"links of {rate} need root, this is user {os.geteuid()}; without a rate the hosts are on loopback"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(f"links of {rate} need {' and '.join(missing)} in the PATH, as Debian's package iproute2 has")


def _build(ranks: int, bits: int, made: list[str]) -> list[Host]:
    """Make the network; `made` gets the name of each namespace before it exists."""
    # Another container may share /run/netns and have a process of this number, hence the token.
    family = f"dqrm{os.getpid()}-{secrets.token_hex(2)}"
    switch = f"{family}-switch"
    _namespace(switch, made)
    _call("ip", "-n", switch, "link", "add", "switch", "type", "bridge", "stp_state", "0")  # ports forward at once
    _call("ip", "-n", switch, "link", "set", "switch", "up", "addrgenmode", "none")
    burst = max(round(bits / 8 * _BURST_SECONDS), _LEAST_BURST)
    limit = round(bits / 8 * _QUEUE_SECONDS) + burst
    bucket = ("tbf", "rate", f"{bits}bit", "burst", f"{burst}", "limit", f"{limit}")
    hosts = []
    for rank in range(ranks):
        name, port = f"{family}-{rank}", f"port{rank}"
        _namespace(name, made)
        peer = ("type", "veth", "peer", "name", _INTERFACE, "netns", name)
        _call("ip", "-n", switch, "link", "add", port, *peer)
        _call("ip", "-n", switch, "link", "set", port, "master", "switch")
        address = f"10.77.{rank // 250}.{rank % 250 + 1}"
        _call("ip", "-n", name, "address", "add", f"{address}/16", "dev", _INTERFACE)
        for where, end in ((switch, port), (name, _INTERFACE)):
            _call("tc", "-n", where, "qdisc", "add", "dev", end, "root", *bucket)
            # No IPv6 address: its announcements would be counted.
            _call("ip", "-n", where, "link", "set", end, "mtu", _MTU, "addrgenmode", "none")
            _call("ip", "-n", where, "link", "set", end, "up")
        hosts.append(Host(rank, ("ip", "netns", "exec", name), address, _INTERFACE))
    return hosts


def _namespace(name: str, made: list[str]) -> None:
    made.append(name)
    _call("ip", "netns", "add", name)
    _call("ip", "-n", name, "link", "set", "lo", "up")


def _call(*command: str) -> None:
    # A session of its own keeps Ctrl-C in the terminal from ending a command half way.
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split("\n", 1)[0].split()) or f"exit code {done.returncode}"
        raise UserError(f"the hosts' network cannot be made here, `{' '.join(command)}` says: {said}")


def _remove(names: list[str]) -> None:
    """Remove the namespaces that exist, switch first: with it go all links."""
    batch = "".join(f"netns delete {name}\n" for name in names)  # one process: nothing is left between two of them
    command = ("ip", "-force", "-batch", "-")
    subprocess.run(command, input=batch, capture_output=True, text=True, start_new_session=True, check=False)
