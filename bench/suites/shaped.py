"""d. A shaped link: how much of it a round uses."""

from collections.abc import Iterator
from itertools import groupby

from harness import PeerDied, Swarm, alternate, end_all, median, pairwise, systems
from network import Links, missing
from suites.allreduce import SHORT_WINDOW, minimum
from table import Row, failed, faster, share

# Mbit/s both ways, milliseconds one way, values: so that the bytes alone take about a second.
LINKS = [(20, 0, 1_000_000), (100, 0, 4_000_000), (1000, 0, 20_000_000), (100, 50, 4_000_000)]

DISTANCE = "the way of the first contribution, of the last average and of the agreement is in the time of the transfer, and nothing overlaps with it"


def shaped(quick: bool) -> Iterator[Row]:
    """Two peers, uncompressed, each behind a link of its own (network namespaces, `tc tbf`)."""
    if why := missing():
        yield failed("shaped link", "share of the link", ">= 0.9", why)
        return
    for delay, links in groupby(LINKS[1:2] if quick else LINKS, key=lambda link: link[1]):
        pairs: dict[str, Pair] = {}
        try:
            for rate, _, numel in links:
                yield from _link(pairs, rate, delay, numel, quick)
        finally:
            end_all(pairs)


class Pair:
    """Two peers of one system, whose links may become other ones."""

    def __init__(self, system: str, rate: float, delay: float):
        self.links = Links(2, rate, one_way_ms=delay)
        try:
            self.swarm = Swarm("averager", system, 2, self.links.hosts, self.links.options)
        except BaseException:
            self.links.close()
            raise

    def set(self, rate: float, numel: int):
        """Other links from now on, and other tensors."""
        for host in self.links.hosts:
            host.rate(rate, rate)
        self.swarm.ask(f"size {numel} {SHORT_WINDOW} 2")
        self.swarm.ask("scheme none")

    def end(self):
        self.swarm.end()
        self.links.close()


def _link(pairs: dict[str, Pair], rate: float, delay: float, numel: int, quick: bool) -> Iterator[Row]:
    what = f"{rate} Mbit/s" + (f", {2 * delay} ms round trip" if delay else "")
    try:
        for name in systems("potluck", "hivemind"):
            if name not in pairs:
                pairs[name] = Pair(name, rate, delay)
            pairs[name].set(rate, numel)
        swarms = {name: pair.swarm for name, pair in pairs.items()}
        alternate(swarms, 1)
        turns = alternate(swarms, 2 if quick or rate < 100 else 3, lambda name: max(pairs[name].links.sent()))
    except PeerDied as died:
        yield failed("shaped link", what, ">= 0.9" if rate == 100 else "", died)
        end_all(pairs)
    else:
        yield from _rows(what, rate, delay, numel, turns)


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
