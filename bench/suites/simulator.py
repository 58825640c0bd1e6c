"""k. What simulated peers cost in real time."""

import json
import re
import subprocess
from collections.abc import Iterator

from harness import ROOT
from table import Row, failed, share

ALL_REDUCE = ("run", "--quiet", "--release", "-p", "potluck-net-sim", "--example", "all_reduce")
CHURN = ("test", "--release", "-p", "potluck-dht", "--test", "churn")
# The reference: about 12.5 simulated seconds.
REFERENCE_PEERS, REFERENCE_MS = 32, 100
CHURN_SECONDS = 60


def cargo(*arguments: str) -> str:
    """What a program of the workspace prints; `make bench` has built it."""
    return subprocess.run(
        ["cargo", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=900
    ).stdout


def simulator(quick: bool) -> Iterator[Row]:
    """The all-reduce of bare streams, and a thousand nodes of the DHT of which a tenth crashes every minute."""
    for line in cargo(*ALL_REDUCE).splitlines():
        found = json.loads(line)
        yield share(
            "simulator", f"all-reduce, {found['peers']} peers", found["real_milliseconds"], unit="ms",
            at_most=REFERENCE_MS if found["peers"] == REFERENCE_PEERS else None,
            note=f"{found['virtual_seconds']} simulated seconds, {found['bytes_per_peer'] >> 20} MiB per peer", details=found,
        )  # fmt: skip
    if quick:
        return
    what, said = "DHT, 1000 nodes, 3 minutes of churn", cargo(*CHURN)
    took = re.search(r"finished in ([\d.]+)s", said)
    if took is None:
        yield failed("simulator", what, f"<= {CHURN_SECONDS}", said)
        return
    yield share("simulator", what, float(took[1]), at_most=CHURN_SECONDS, unit="s", note="the whole test")
