"""Hosts on one machine: rates, refusals before anything is made, and a real network where this machine allows one."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dqrm.bench.exchange_rank import interface_bytes
from dqrm.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import slow_links
from slow_links import hosts, parse_rate

SIZE = 3_000_000
RATE = "100mbit"
# Each rank sends SIZE bytes to the next one; the receiver says when, or its buffers would fill before its clock starts.
CHILD = """
import json, socket, sys, threading, time
from dqrm.bench.exchange_rank import interface_bytes

mine, following, interface, size = *sys.argv[1:4], int(sys.argv[4])
before = interface_bytes(interface)
server = socket.create_server((mine, 7000))

def send():
    deadline = time.monotonic() + 600
    while True:
        try:
            connection = socket.create_connection((following, 7000), timeout=600)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    connection.recv(1)
    connection.sendall(bytes(size))
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)  # the other has read everything

sender = threading.Thread(target=send, daemon=True)
sender.start()
server.settimeout(600)
connection, _ = server.accept()
connection.settimeout(600)
start = time.perf_counter()
connection.sendall(b"x")
received = 0
while piece := connection.recv(1 << 16):
    received += len(piece)
seconds = time.perf_counter() - start
connection.close()
sender.join(60)
after = interface_bytes(interface)
print(json.dumps([received, seconds, after[0] - before[0], after[1] - before[1]]))
"""


def left():
    """Namespaces that this process made and that still have a name."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"dqrm{os.getpid()}-")]


@pytest.fixture
def _never_called(monkeypatch):
    """Fails where a refusal comes after the first command."""

    def run(command, **_):
        raise AssertionError(f"{command} was called")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.fixture(scope="module")
def _namespaces():
    """Skips where the machine has no namespaces, bridges or token buckets; asks it without the code under test."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not in the PATH")
    name = f"probe-{uuid.uuid4().hex[:8]}"
    commands = (
        f"ip netns add {name}",
        f"ip netns exec {name} true",
        f"ip -n {name} link add switch type bridge",
        f"ip -n {name} link add one type veth peer name two",
        f"tc -n {name} qdisc add dev one root tbf rate 1mbit burst 16384 latency 50ms",
    )
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"`{command}` says: {done.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("rate", "bits"),
    [
        ("100mbit", 100_000_000),
        ("1gbit", 1_000_000_000),
        ("2.5gbit", 2_500_000_000),
        ("800kbit", 800_000),
        ("1kbit", 1000),
        ("100gbit", 100_000_000_000),
    ],
)
def test_rates(rate, bits):
    assert parse_rate(rate) == bits


@pytest.mark.parametrize(
    "rate",
    ["100mb", "100", "mbit", "", "-1mbit", "1e3kbit", "1.mbit", ".5gbit", "100 mbit", "100mbit\n", "nanmbit", "١mbit"],
)
def test_rates_not_understood(rate):
    with pytest.raises(UserError, match="is not understood, expected a number and kbit, mbit or gbit, as 100mbit"):
        parse_rate(rate)


@pytest.mark.parametrize("rate", ["0mbit", "0.9kbit", "100.1gbit", "999999999999gbit"])
def test_rates_out_of_range(rate):
    with pytest.raises(UserError, match=f"rate '{rate}' is out of range, expected 1kbit to 100gbit"):
        parse_rate(rate)


@pytest.mark.usefixtures("_never_called")
@pytest.mark.skipif(sys.platform != "linux", reason="refused for another reason")
def test_needs_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="links of 100mbit need root, this is user 1000"), hosts(2, RATE):
        pass


@pytest.mark.usefixtures("_never_called")
@pytest.mark.skipif(sys.platform != "linux", reason="refused for another reason")
@pytest.mark.parametrize(
    ("present", "said"), [({"ip"}, "need tc in"), ({"tc"}, "need ip in"), ((), "need ip and tc in")]
)
def test_needs_tools(monkeypatch, present, said):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: tool if tool in present else None)
    with pytest.raises(UserError, match=said), hosts(2, RATE):
        pass


def test_what_the_kernel_refuses_is_quoted_and_nothing_is_left(monkeypatch):
    calls = []

    def run(command, **options):
        calls.append((command, options.get("input")))
        refused = "bridge" in command
        return subprocess.CompletedProcess(command, int(refused), "", "Error: Unknown device type.\nmore\n" * refused)

    monkeypatch.setattr(slow_links, "_require_tools", lambda rate: None)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"cannot be made here, `ip .* bridge .*` says: Error: Unknown device type.$"):
        hosts(2, RATE).__enter__()
    (made,) = [command[-1] for command, _ in calls if command[:3] == ("ip", "netns", "add")]
    assert calls[-1] == (("ip", "-force", "-batch", "-"), f"netns delete {made}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the counters are Linux's")
def test_interface_bytes():
    received, sent = interface_bytes("lo")
    assert received >= 0
    assert sent >= 0
    with pytest.raises(UserError, match=r"there is no interface 'eth99' here, expected one of .*lo"):
        interface_bytes("eth99")


@pytest.mark.usefixtures("_namespaces")
def test_three_hosts_and_their_links():
    machine = sorted(os.listdir("/sys/class/net"))
    with hosts(3, RATE) as found:
        assert [host.rank for host in found] == [0, 1, 2]
        assert len({host.address for host in found}) == len({host.prefix for host in found}) == 3
        assert len(left()) == 4
        assert sorted(os.listdir("/sys/class/net")) == machine
        started = []
        for host in found:
            following = found[(host.rank + 1) % 3].address
            arguments = (sys.executable, "-c", CHILD, host.address, following, host.interface, str(SIZE))
            started.append(subprocess.Popen([*host.prefix, *arguments], stdout=subprocess.PIPE, text=True))
        printed = [process.communicate(timeout=600)[0] for process in started]
    for received, seconds, counted_in, counted_out in map(json.loads, printed):
        assert received == SIZE
        assert seconds > 8 * SIZE / parse_rate(RATE) / 1.3
        assert SIZE < counted_in < 1.15 * SIZE
        assert SIZE < counted_out < 1.15 * SIZE
    assert left() == []
    assert sorted(os.listdir("/sys/class/net")) == machine


@pytest.mark.usefixtures("_namespaces")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error_inside(error):
    inside = []

    def fail():
        with hosts(2, RATE):
            inside.extend(left())
            raise error

    with pytest.raises(error):
        fail()
    assert len(inside) == 3
    assert left() == []


@pytest.mark.usefixtures("_namespaces")
def test_nothing_is_left_of_a_half_made_network(monkeypatch):
    monkeypatch.setattr(slow_links, "_MTU", "1")
    with pytest.raises(UserError, match=r"cannot be made here, `ip .* mtu 1 .*` says: .*mtu"), hosts(2, RATE):
        pass
    assert left() == []


@pytest.mark.usefixtures("_namespaces")
def test_two_networks_at_once():
    with hosts(1, "1gbit") as one, hosts(1, "800kbit") as other:
        assert one[0].prefix != other[0].prefix
        assert len(left()) == 4
    assert left() == []


@pytest.mark.distributed
@pytest.mark.usefixtures("_namespaces")
def test_the_benchmark_on_slow_links(capsys):
    slow_links.main(RATE, "--ranks=2", "--rows-scale=0.0001", "--steps=2", "--warmup=1", "--variants=int8")
    assert "2 ranks x batch 128, links of 100mbit" in capsys.readouterr().out


def test_another_benchmark_is_refused():
    with pytest.raises(UserError, match="slow_links measures exchange or sharded, got 'shraded'"):
        slow_links.main("100mbit", "shraded", "--ranks=2")
