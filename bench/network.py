"""Networks for the measurements: loopback of one's own to count bytes on, shaped links, and a relay that adds latency.

They need root, as network namespaces do; who has no root gets the figures that do without.
"""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests/hard_days"))

import netlab  # noqa: E402  the laboratory of the hard days

missing = netlab.missing


class Loopback:
    """A namespace with nothing but loopback: every byte on it, TCP and TLS included, is this swarm's."""

    def __init__(self):
        self.lab = netlab.Lab()
        self.namespace, self.address = self.lab.core, "127.0.0.1"

    def command(self, *command: str) -> list[str]:
        """The command that runs `command` here."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def sent(self) -> int:
        """Bytes that all peers here have sent so far: loopback counts each packet once, headers included."""
        return int(netlab.run(*self.command("cat", "/sys/class/net/lo/statistics/tx_bytes")))

    def close(self):
        """Remove it."""
        self.lab.close()


@contextmanager
def loopbacks(systems):
    """A loopback for each system, or None for each without root."""
    if missing():
        yield dict.fromkeys(systems)
        return
    made = {}
    try:
        for system in systems:
            made[system] = Loopback()
        yield made
    finally:
        for loopback in made.values():
            loopback.close()


class Links:
    """Hosts on one bridge, each with a shaped link; with `one_way_ms` they meet through relays only."""

    def __init__(self, peers: int, up_mbit: float, down_mbit: float | None = None, one_way_ms: float = 0):
        self.lab = netlab.Lab()
        self.relays: list[subprocess.Popen] = []
        self.one_way_ms = one_way_ms
        try:
            self.hosts = [self.lab.public(f"h{index}") for index in range(peers)]
            for host in self.hosts:
                host.rate(up_mbit, down_mbit or up_mbit)
            if one_way_ms:
                self._relay()
        except BaseException:
            self.close()
            raise

    def _relay(self):
        """No packet from host to host: the bridge lets each reach only the relays, at the bridge's own address."""
        core = self.lab.core
        netlab.run("ip", "-n", core, "address", "add", "203.0.113.1/24", "dev", "br0")
        for number, host in enumerate(self.hosts):
            netlab.run("bridge", "-n", core, "link", "set", "dev", host.far_device, "isolated", "on")
            command = ["ip", "netns", "exec", core, sys.executable, str(HERE / "workers/delay.py")]
            relay = subprocess.Popen(
                [*command, f"203.0.113.1:{4000 + number}", f"{host.address}:4001", str(self.one_way_ms)],
                stdout=subprocess.PIPE,
                text=True,
            )
            self.relays.append(relay)
            relay.stdout.readline()

    def options(self, rank: int) -> dict:
        """Arguments of the worker on this host: what it tells others about where it is."""
        return {"port": 4001, "announce": f"/ip4/203.0.113.1/tcp/{4000 + rank}"} if self.one_way_ms else {}

    def sent(self) -> list[int]:
        """Bytes that each host has put on its link so far, as `tc` counts them: Ethernet, IP and TCP headers included."""
        found = []
        for host in self.hosts:
            listing = netlab.run(*host.command("tc", "-s", "-j", "qdisc", "show", "dev", host.device))
            found.append(json.loads(listing)[0]["bytes"])
        return found

    def close(self):
        """Remove all of it."""
        for relay in self.relays:
            relay.kill()
            relay.wait()
            relay.stdout.close()
        self.lab.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
