"""Peers at home behind routers: one that gives out ports (UPnP), and ones through which a hole is punched without UDP.

The first runs the daemon that many such routers have: whoever has the token of a peer behind it comes in directly, through
two NATs that let no hole be punched and without any relay. `make setup` unpacks that daemon and never installs it. It gives
out ports of a public address only, so its internet is 11.0.0.0/8, in a namespace without uplink.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import run
from test_short import why_not

import netlab

ROOT = Path(__file__).resolve().parents[2]
DAEMON = ROOT / ".build/router/usr/sbin/miniupnpd"
CHAINS = """
table inet ports {
  chain forward { type filter hook forward priority 0; jump miniupnpd
  }
  chain miniupnpd { }
  chain prerouting { type nat hook prerouting priority -90; jump prerouting_miniupnpd
  }
  chain prerouting_miniupnpd { }
  chain postrouting { type nat hook postrouting priority 90; jump postrouting_miniupnpd
  }
  chain postrouting_miniupnpd { }
}
"""
SETTINGS = """
ext_ifname=eth0
listening_ip=lan0
ipv6_disable=yes
upnp_table_name=ports
upnp_nat_table_name=ports
uuid=00000000-0000-4000-8000-000000000001
allow 1024-65535 10.0.0.0/8 1024-65535
"""
TOKEN_OF_PYTHON = """
import potluck
dht = potluck.DHT(start=True)
print(*potluck._core.Node.read_token(dht.token("home"))[1])
dht.shutdown()
"""


@contextmanager
def giving_out_ports(home: netlab.Host, folder: Path) -> Iterator[None]:
    """The router of this host gives out ports."""
    # What the router forwards to the host is let through by the home's own table as well.
    netlab.run(
        *on_router(home, "nft", "insert", "rule", "ip", "filter", "forward", "ct", "status", "dnat", "accept")
    )
    netlab.run(*on_router(home, "nft", "-f", "-"), stdin=CHAINS)
    settings = folder / "miniupnpd.conf"
    settings.write_text(SETTINGS)
    with open(folder / "miniupnpd.log", "w") as log:
        daemon = subprocess.Popen(
            on_router(home, str(DAEMON), "-d", "-f", str(settings), "-P", str(folder / "pid")),
            stdout=log,
            stderr=log,
        )
        try:
            while "HTTP listening" not in (folder / "miniupnpd.log").read_text():
                assert daemon.poll() is None, (folder / "miniupnpd.log").read_text()
                time.sleep(0.05)
            yield
        finally:
            daemon.terminate()
            daemon.wait(10)


def on_router(home: netlab.Host, *command: str) -> list[str]:
    assert home.router is not None
    return ["ip", "netns", "exec", home.router, *command]


def ports(home: netlab.Host) -> int:
    """How many ports the router has given out."""
    rules = netlab.run(*on_router(home, "nft", "list", "chain", "inet", "ports", "prerouting_miniupnpd"))
    return rules.count("dnat")


@contextmanager
def running(host: netlab.Host, *arguments: str) -> Iterator[dict[str, str]]:
    """`potluck` with these arguments on this host: what it said first."""
    with subprocess.Popen(
        host.command(run.binary(), *arguments), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            assert process.wait(10) == 0


def a_node(host: netlab.Host, folder: Path, *more: str) -> AbstractContextManager[dict[str, str]]:
    """The first peer of a run."""
    return running(host, "node", "--json", "--identity", str(folder / "identity"), *more)


def call(host: netlab.Host, token: str, peer: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Send something to a peer and back."""
    command = host.command(run.binary(), "probe", "--join", token, "--call", peer, *more)
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.fixture
def homes() -> Iterator[tuple[netlab.Host, netlab.Host]]:
    """Two hosts behind routers through which no hole can be punched."""
    if reason := why_not():
        pytest.skip(reason)
    if not DAEMON.exists():
        pytest.skip("no miniupnpd: `make setup` unpacks it where apt works")
    with netlab.Lab("11.22.33") as lab:
        yield lab.home("home", "symmetric"), lab.home("away", "symmetric")


def test_a_hole_is_punched_without_udp(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with netlab.Lab() as lab:
        relay = lab.public("relay")
        tcp = ("--listen", "/ip4/0.0.0.0/tcp/4001")
        announce = ("--announce", f"/ip4/{relay.address}/tcp/4001")
        callee, caller = lab.home("callee", "port_restricted"), lab.home("caller", "port_restricted")
        with (
            a_node(relay, tmp_path, "--relay", *tcp, *announce) as node,
            running(callee, "probe", "--join", node["token"], *tcp) as ready,
        ):
            called = call(caller, node["token"], ready["peer"], "--patience", "45", "--limit", "60", *tcp)
        assert called.returncode == 0, called.stderr
        assert json.loads(called.stdout)["path"] == "hole_punched"


def test_whoever_has_the_token_comes_in_through_a_port_of_the_router(
    homes: tuple[netlab.Host, netlab.Host], tmp_path: Path
) -> None:
    home, away = homes
    with a_node(home, tmp_path, "--no-port-mapping") as said:
        assert call(away, said["token"], said["peer"], "--limit", "5").returncode != 0, (
            "there is no other way in"
        )
    with giving_out_ports(home, tmp_path):
        with a_node(home, tmp_path) as said:
            assert ports(home) == 2, "TCP and QUIC"
            called = call(away, said["token"], said["peer"])
            assert called.returncode == 0, called.stderr
            found = json.loads(called.stdout)
            assert (found["path"], found["relayed_bytes"]) == ("direct", 0)
        assert ports(home) == 0, "the router has them back"


def test_a_token_made_in_python_has_the_routers_address(
    homes: tuple[netlab.Host, netlab.Host], tmp_path: Path
) -> None:
    home, _ = homes
    with giving_out_ports(home, tmp_path):
        program = [sys.executable, "-c", TOKEN_OF_PYTHON]
        said = subprocess.run(
            home.command(*program),
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.returncode == 0, said.stderr
        outside = [address for address in said.stdout.split() if address.startswith("/ip4/11.22.33.")]
        assert len(outside) == 2, said.stdout
        assert ports(home) == 0
