"""Day 4: nobody can be dialled, and there is one tiny relay, which carries under 1 % of the bytes: the NATs are not
symmetric, so that holes can be punched."""

import rules
from crew import ENDLESS

TITLE = "everyone behind NAT"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 60
# Enough bytes that what the relay carries before the holes are there, and its signals, do not count.
HIDDEN = 1024


def play(crew):
    """Three homes of two kinds and a relay."""
    where = crew.lab.public("relay")
    where.rate(10, 10)
    _, token = crew.node("relay", where, relay=True)
    kinds = ("full_cone", "port_restricted", "port_restricted")
    hosts = [crew.lab.home(f"home{seed}", kind) for seed, kind in enumerate(kinds)]
    peers = [
        crew.peer(f"home{seed}", host, join=token, seed=seed, batch=32, pace=0.1, hidden=HIDDEN, **TRAINING)
        for seed, host in enumerate(hosts)
    ]
    for peer in peers:
        peer.wait("epoch", lambda line: line["peers"] == 3)
    crew.until(peers, LAST)
    ends = crew.finish(peers, 400)
    paths = sorted({str(e["path"]) for end in ends for e in end["status"]["peers"] if not e["is_me"]})
    relayed = sum(where.bytes()) / 2
    carried = sum(sum(host.bytes()) for host in hosts) / 2
    crew.check(
        "the relay's share of the bytes",
        f"{relayed / carried:.2%} ({', '.join(paths)})",
        relayed < 0.01 * carried,
    )
    rules.all_of_them(crew, ends, peers, hidden=HIDDEN, **TRAINING)
