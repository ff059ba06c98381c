"""`dqrm bench exchange` on hosts with slow links: `python benchmarks/slow_links.py 1gbit --ranks=4 --rows-scale=1`.

After the rate come the flags of `dqrm bench exchange`, as --name=value; or `sharded` and the flags of `dqrm bench
sharded`: `python benchmarks/slow_links.py 100mbit sharded --dim=64`. Needs Linux and root. Each rank runs in a
network namespace of its own with one interface; one namespace more holds a Linux bridge, the switch. The machine's own
network is left alone: every interface is made inside these. Both directions of a link are limited by a token bucket (tc
tbf), in the host for what it sends and at the switch for what it receives, where up to 50 ms of traffic may wait.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dqrm.bench.config import BenchExchangeConfig, BenchShardedConfig
from dqrm.bench.exchange import Host, run_exchange
from dqrm.bench.report import print_exchange, print_sharded
from dqrm.bench.sharded import run_sharded
from dqrm.errors import UserError
from dqrm.options import build

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LOWEST, _HIGHEST = 10**3, 10**11  # beyond them tc's bucket or its queue no longer fits the 32 bits it has
_BURST_SECONDS, _LEAST_BURST = 0.002, 16_384
_QUEUE_SECONDS = 0.05
_INTERFACE = "eth0"
_MTU = "9000"


@contextmanager
def hosts(ranks: int, rate: str) -> Iterator[list[Host]]:
    """Hosts in network namespaces of their own, with links of `rate` each way.

    The network is removed when the block is left, by an exception too; a kill leaves it (`ip netns list` shows it).
    Processes that still run in it are not ended.
    """
    bits = parse_rate(rate)
    _require_tools(rate)
    made: list[str] = []
    try:
        yield _build(ranks, bits, made)
    finally:
        _remove(made)


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
        raise UserError(f"links of {rate} need Linux's network namespaces")
    if os.geteuid() != 0:
        raise UserError(f"links of {rate} need root, this is user {os.geteuid()}")
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


BENCHMARKS: dict[str, tuple[type[Any], Callable[..., Any], Callable[..., Any]]] = {
    "exchange": (BenchExchangeConfig, run_exchange, print_exchange),
    "sharded": (BenchShardedConfig, run_sharded, print_sharded),
}
"""By the verb of `dqrm bench`: its options, what measures, and what prints that."""


def main(rate: str, *words: str) -> None:
    """Measure and print."""
    verb, flags = (words[0], words[1:]) if words and not words[0].startswith("-") else ("exchange", words)
    if verb not in BENCHMARKS:
        raise UserError(f"slow_links measures {' or '.join(BENCHMARKS)}, got {verb!r}")
    config, measure, show = BENCHMARKS[verb]
    values = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    options = build(config, values, "slow_links")
    with hosts(options.ranks, rate) as places:
        show(measure(options, hosts=places, links=f"links of {rate}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
