"""Day 1: a laptop behind a symmetric NAT, a spot machine on 1 Gbit/s, and an outbound-only notebook that joins late and is
killed in the middle of a round."""

import signal
import time

import rules
from crew import ENDLESS

TITLE = "home, spot, notebook"
# Rounds take long enough that one can be hit in the middle: 860 kB of gradients at 10 Mbit/s.
HIDDEN = 1024
TRAINING = {"epochs": ENDLESS, "target": 512, "hidden": HIDDEN}
LAST = 70


def longest_pause(peer, since):
    """The most seconds between two changes of the epoch from this epoch on."""
    times = [line["at"] for line in peer.said("epoch") if line["epoch"] >= since]
    return max(later - sooner for sooner, later in zip(times, times[1:], strict=False))


def play(crew):
    """Home and spot from the start, the notebook from round 20 to round 30."""
    _, token = crew.node("relay", crew.lab.public("relay"), relay=True)
    spot_host, home_host = crew.lab.public("spot"), crew.lab.home("home", "symmetric")
    spot_host.rate(1000, 1000)
    home_host.rate(10, 100)
    options = {"join": token, "batch": 32, "pace": 0.1, **TRAINING}
    spot = crew.peer("spot", spot_host, seed=0, **options)
    home = crew.peer("home", home_host, seed=1, **options)
    both = [spot, home]
    spot.wait("epoch", lambda line: line["epoch"] >= 20 and line["peers"] == 2)
    notebook_host = crew.lab.home("notebook", "outbound_only")
    notebook_host.rate(10, 100)
    notebook = crew.peer("notebook", notebook_host, seed=2, outbound_only=True, **options)
    joined = spot.wait("epoch", lambda line: line["peers"] == 3)["epoch"]
    spot.wait("epoch", lambda line: line["epoch"] >= joined + 10)
    began = len(spot.said("epoch"))
    crew.in_transfer(notebook, kilobytes=200)
    notebook.signal(signal.SIGKILL)
    killed = time.monotonic()
    notebook.end()
    spot.wait("epoch", lambda line: line["peers"] == 2, since=began)
    crew.check("the killed one is missed", f"{time.monotonic() - killed:.1f} s", True)
    crew.until(both, LAST)
    ends = crew.finish(both)
    pause = max(longest_pause(peer, 20) for peer in both)
    crew.check("nobody stalls for 5 s", f"{pause:.1f} s", pause < 5)
    shown, ok = [], True
    for peer in both:
        rounds = rules.rounds(peer)
        hit = [epoch for epoch, (_, lost) in rounds.items() if rules.short(notebook) in lost]
        members = [rounds[epoch][0] for at in hit for epoch in (at - 1, at + 1) if epoch in rounds]
        shown.append(f"{peer.name}: epochs {hit}, rounds beside with {members}")
        ok = ok and len(hit) == 1 and members == [3, 2]
    crew.check("a round was hit: begun with 3, ended with 2", "; ".join(shown), ok)
    rules.named_once(crew, "the kill", both, rules.gone(notebook))
    rules.all_of_them(crew, ends, both, except_for=[notebook], **TRAINING)
