"""Day 4: nobody can be dialled, and there is one tiny relay. Where holes can be punched it carries under 1 % of the bytes; a
home behind a symmetric NAT, which comes later, needs it for those through whose NAT it cannot get, and for nobody else."""

import rules
from crew import ENDLESS

TITLE = "everyone behind NAT"
TRAINING = {"epochs": ENDLESS, "target": 512}
PUNCHED, LAST = 45, 60
# Enough bytes that what the relay carries before the holes are there, and its signals, do not count.
HIDDEN = 1024
KINDS = ("full_cone", "port_restricted", "port_restricted", "symmetric")


def needs_relay(one, other):
    """A hole needs a port that the other side can know: a symmetric NAT has none, a port-restricted one insists on it."""
    return {one, other} == {"symmetric", "port_restricted"}


def paths(peers):
    """How each sees each other one: the kinds of both, and the path."""
    kinds = {peer.said("ready")[0]["peer"]: kind for peer, kind in zip(peers, KINDS, strict=False)}
    return [
        (kinds[peer.said("ready")[0]["peer"]], kinds[entry["peer"]], entry["path"])
        for peer in peers
        for entry in peer.status()["peers"]
        if not entry["is_me"]
    ]


def as_they_should(found):
    """Whether those are relayed who need it, and they only."""
    return all((path == "relayed") == needs_relay(one, other) for one, other, path in found)


def play(crew):
    """Three homes of two kinds and a relay; then the fourth."""
    where = crew.lab.public("relay")
    where.rate(10, 10)
    _, token = crew.node("relay", where, relay=True)
    hosts = [crew.lab.home(f"home{seed}", kind) for seed, kind in enumerate(KINDS)]

    def come(seed):
        return crew.peer(
            f"home{seed}", hosts[seed], join=token, seed=seed, batch=32, pace=0.1, hidden=HIDDEN, **TRAINING
        )

    peers = [come(seed) for seed in range(3)]
    for peer in peers:
        peer.wait("epoch", lambda line: line["peers"] == 3)
    crew.wait("epochs of the three", lambda: all(peer.epoch >= PUNCHED for peer in peers), 400)
    # Of those who need no relay: the one who does is not here yet.
    relayed = sum(where.bytes()) / 2
    carried = sum(sum(host.bytes()) for host in hosts[:3]) / 2
    names = sorted({str(path) for *_, path in paths(peers)})
    crew.check(
        "the relay's share of bytes that need none",
        f"{relayed / carried:.2%} ({', '.join(names)})",
        relayed < 0.01 * carried,
    )
    peers.append(come(3))
    for peer in peers:
        peer.wait("epoch", lambda line: line["peers"] == 4)
    crew.wait("paths of four", lambda: len(found := paths(peers)) == 12 and as_they_should(found))
    last = crew.until(peers, LAST)
    crew.arrive(peers, 400)
    found = paths(peers)
    shown = sorted({f"{one} to {other} {path}" for one, other, path in found})
    crew.check(
        "relayed: symmetric with port-restricted, no other",
        f"{', '.join(shown)}; at epoch {last}",
        len(found) == 12 and as_they_should(found),
    )
    ends = crew.finish(peers, 400)
    rules.all_of_them(crew, ends, peers, hidden=HIDDEN, **TRAINING)
