"""d. A shaped link: how much of it a round uses."""

from collections.abc import Iterator

from harness import PeerDied, Swarm, alternate, median, pairwise, systems
from network import Links, missing
from suites.allreduce import minimum
from table import Row, failed, faster, share

# Mbit/s both ways, milliseconds one way, values: so that the bytes alone take about a second.
LINKS = [(20, 0, 1_000_000), (100, 0, 4_000_000), (100, 50, 4_000_000), (1000, 0, 20_000_000)]

DISTANCE = "the way of the first contribution, of the last average and of the agreement is in the time of the transfer, and nothing overlaps with it"


def shaped(quick: bool) -> Iterator[Row]:
    """Two peers, uncompressed, each behind a link of its own (network namespaces, `tc tbf`)."""
    if why := missing():
        yield failed("shaped link", "share of the link", ">= 0.9", why)
        return
    for rate, delay, numel in LINKS[1:2] if quick else LINKS:
        what = f"{rate} Mbit/s" + (f", {2 * delay} ms round trip" if delay else "")
        try:
            turns = _measure(rate, delay, numel, 2 if quick or rate < 100 else 3)
        except PeerDied as died:
            yield failed("shaped link", what, ">= 0.9" if rate == 100 else "", died)
            continue
        yield from _rows(what, rate, delay, numel, turns)


def _measure(rate: float, delay: float, numel: int, turns: int) -> list[dict]:
    swarms: dict[str, Swarm] = {}
    links: dict[str, Links] = {}
    try:
        for name in systems("potluck", "hivemind"):
            links[name] = net = Links(2, rate, one_way_ms=delay)
            extra = {"matchmaking_time": 1.5} if name == "hivemind" else {}
            swarms[name] = Swarm("averager", name, 2, net.hosts, net.options, numel=numel, **extra)
            swarms[name].ask("scheme none")
        alternate(swarms, 1)
        return alternate(swarms, turns, lambda name: max(links[name].sent()))
    finally:
        for swarm in swarms.values():
            swarm.end()
        for net in links.values():
            net.close()


def _rows(what, rate, delay, numel, turns) -> Iterator[Row]:
    ideal = minimum(numel, 2, "none") * 8 / (rate * 1e6)

    def part(name):
        wire, seconds = median(turns, name, "wire"), median(turns, name, "transfer")
        return wire * 8 / (rate * 1e6) / seconds if wire and seconds else None

    target = 0.9 if rate == 100 else None
    note = "bytes on the link with all headers, by what it carries in the time of the transfer (after the group was found)"
    if delay:
        note += "; the relay is in the path, and no packet passes it by"
    yield share("shaped link", f"{what}: share used", part("potluck"), target, note=note, peer=part("hivemind"), peer_name="hivemind").because(DISTANCE if delay else "see the time of the transfer")  # fmt: skip
    ours, theirs = (median(turns, name, "transfer") for name in ("potluck", "hivemind"))
    yield faster(
        "shaped link", f"{what}: transfer by bytes/rate", ours and ours / ideal, theirs and theirs / ideal, "hivemind",
        unit="x", ratio=pairwise(turns, "hivemind", "transfer"),
        note=f"{numel / 1e6:g}M floats, 2 peers: the least bytes alone take {ideal:.2f} s; Ethernet, IP and TCP headers add 4.6 %",
    )  # fmt: skip
