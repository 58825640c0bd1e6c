"""i. DHT: one store and one get."""

from collections.abc import Iterator

from harness import Swarm, systems
from table import Row, failed, faster

PEERS, CALLS = 5, 30


def lookups(quick: bool) -> Iterator[Row]:
    """Five peers on loopback; one stores, another reads."""
    found = {}
    for system in systems("potluck", "hivemind"):
        with Swarm("averager", system, 3 if quick else PEERS, numel=1000) as swarm:
            stored = swarm.workers[1].ask(f"store {CALLS}", "store")
            found[system] = {**stored, **swarm.workers[2].ask(f"get {CALLS}", "get")}
            found[system]["missing"] += stored["missing"]
    ours, theirs = found["potluck"], found.get("hivemind", {})
    if ours["missing"]:
        yield failed("dht", "store and get", "", f"{ours['missing']} of {2 * CALLS} calls failed")
        return
    note = "mean of calls one after the other; a get asks the network even for what this peer holds (latest=True)"
    if theirs.get("missing"):
        note += f"; {theirs['missing']} of hivemind's calls failed"
    for call in ("store", "get"):
        yield faster("dht", call, 1e3 * ours[call], 1e3 * theirs[call] if theirs else None, "hivemind", unit="ms", note=note)  # fmt: skip
