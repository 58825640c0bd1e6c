"""Hosts, home routers and rates on one machine: network namespaces, a bridge as the internet, nftables NAT, `tc tbf`.

Needs root, iproute2 and nftables. Everything made here is named `pl<pid>-...` and removed by `Lab.close()`; nothing is
ever sent to an address outside this machine (the "internet" is a bridge in a namespace without uplink).
"""

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass


class LabError(Exception):
    """A network could not be made; the message holds the command and what it said."""


def run(*command: str, stdin: str | None = None) -> str:
    """Run a command, return its output."""
    result = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def missing() -> str | None:
    """Why networks cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    absent = [tool for tool in ("ip", "tc", "nft") if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@dataclass
class Host:
    """One machine: a namespace, its address, the namespace of its router if it is behind one."""

    name: str
    namespace: str
    address: str
    device: str
    far_namespace: str
    far_device: str
    router: str | None = None

    def command(self, *command: str) -> list[str]:
        """The command that runs `command` on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def rate(self, up_mbit: float | None = None, down_mbit: float | None = None):
        """Shape what this host sends and (at the other end of its cable) receives."""
        for namespace, device, mbit in ((self.namespace, self.device, up_mbit), self._far_end(down_mbit)):
            if mbit is None:
                continue
            burst = max(16_000, int(mbit * 1e6 / 8 / 100))
            run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", device, "root", "tbf",
                "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms")  # fmt: skip

    def _far_end(self, mbit):
        return (self.far_namespace, self.far_device, mbit)

    def link(self, up: bool):
        """Plug the cable in, or pull it."""
        run(
            "ip",
            "netns",
            "exec",
            self.far_namespace,
            "ip",
            "link",
            "set",
            self.far_device,
            "up" if up else "down",
        )

    def bytes(self) -> tuple[int, int]:
        """Bytes received and sent by this host's interface since it was made."""
        base = f"/sys/class/net/{self.device}/statistics"
        text = run("ip", "netns", "exec", self.namespace, "cat", f"{base}/rx_bytes", f"{base}/tx_bytes")
        received, sent = (int(line) for line in text.split())
        return received, sent


class Lab:
    """An internet of its own: 203.0.113.0/24 (or another) on a bridge, hosts on it or behind NAT routers."""

    _counter = itertools.count()

    def __init__(self, internet: str = "203.0.113"):
        self.internet = internet
        self.prefix = f"pl{os.getpid() % 100000}x{next(self._counter)}"
        self.namespaces: list[str] = []
        self.next_public = 10
        self.next_home = 1
        self.core = self._namespace("net")
        self._in(self.core, "ip", "link", "add", "br0", "type", "bridge")
        self._in(self.core, "ip", "link", "set", "br0", "up")

    def _namespace(self, name: str) -> str:
        namespace = f"{self.prefix}-{name}"
        run("ip", "netns", "add", namespace)
        self.namespaces.append(namespace)
        run("ip", "netns", "exec", namespace, "ip", "link", "set", "lo", "up")
        return namespace

    def _in(self, namespace: str, *command: str, stdin: str | None = None) -> str:
        return run("ip", "netns", "exec", namespace, *command, stdin=stdin)

    def _cable(self, inner: str, device: str, outer: str, far: str, address: str, bridge: bool):
        run("ip", "link", "add", device, "netns", inner, "type", "veth", "peer", "name", far, "netns", outer)
        self._in(inner, "ip", "address", "add", address, "dev", device)
        self._in(inner, "ip", "link", "set", device, "up")
        if bridge:
            self._in(outer, "ip", "link", "set", far, "master", "br0")
        self._in(outer, "ip", "link", "set", far, "up")

    def public(self, name: str) -> Host:
        """A host with a public address that anybody can dial."""
        namespace, number = self._namespace(name), self.next_public
        self.next_public += 1
        address = f"{self.internet}.{number}"
        self._cable(namespace, "eth0", self.core, f"p{number}", f"{address}/24", bridge=True)
        return Host(name, namespace, address, "eth0", self.core, f"p{number}")

    def home(self, name: str, nat: str) -> Host:
        """A host behind a router. `nat`: full_cone, port_restricted, symmetric, or outbound_only (and no UDP)."""
        router = self.public(f"{name}-r")
        namespace, number = self._namespace(name), self.next_home
        self.next_home += 1
        inside = f"10.77.{number}"
        self._cable(namespace, "eth0", router.namespace, "lan0", f"{inside}.2/24", bridge=False)
        self._in(router.namespace, "ip", "address", "add", f"{inside}.1/24", "dev", "lan0")
        self._in(namespace, "ip", "route", "add", "default", "via", f"{inside}.1")
        self._in(router.namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self._in(router.namespace, "nft", "-f", "-", stdin=ruleset(nat, f"{inside}.2"))
        return Host(name, namespace, f"{inside}.2", "eth0", router.namespace, "lan0", router.namespace)

    def close(self):
        """Remove every namespace, and with it every device, rule and process-less socket."""
        for namespace in reversed(self.namespaces):
            pids = subprocess.run(
                ["ip", "netns", "pids", namespace], capture_output=True, text=True
            ).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], capture_output=True)
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        self.namespaces.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def ruleset(nat: str, host: str) -> str:
    """nftables rules of a home router of this kind.

    What comes unasked for is dropped: if the router answered it, the kernel would remember that flow, and give the
    host's own packets to the same place, which shall punch a hole, another port.
    """
    masquerade = {
        "full_cone": "masquerade",
        "port_restricted": "masquerade",
        "symmetric": "masquerade fully-random",
        "outbound_only": "masquerade fully-random",
    }[nat]
    inbound = f"iifname eth0 dnat to {host}" if nat == "full_cone" else ""
    drop_udp = "iifname lan0 meta l4proto udp drop" if nat == "outbound_only" else ""
    accept_new = f"iifname eth0 ip daddr {host} accept" if nat == "full_cone" else ""
    return f"""
table ip nat {{
  chain prerouting {{ type nat hook prerouting priority -100; {inbound}
  }}
  chain postrouting {{ type nat hook postrouting priority 100; oifname eth0 {masquerade}
  }}
}}
table ip filter {{
  chain input {{ type filter hook input priority 0; iifname eth0 ct state new drop
  }}
  chain forward {{ type filter hook forward priority 0; policy drop;
    ct state established,related accept
    {drop_udp}
    iifname lan0 accept
    {accept_new}
  }}
}}
"""
