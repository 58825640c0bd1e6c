"""Day 1: a laptop behind a symmetric NAT, a spot machine on 1 Gbit/s, and an outbound-only notebook that joins late and is
killed in the middle of a round."""

import signal
import time

import rules
from crew import ENDLESS

TITLE = "home, spot, notebook"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 70


def longest_pause(peer, since):
    """The most seconds between two epochs."""
    times = [line["at"] for line in peer.said("epoch")][since:]
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
    notebook = crew.peer(
        "notebook", crew.lab.home("notebook", "outbound_only"), seed=2, outbound_only=True, **options
    )
    joined = spot.wait("epoch", lambda line: line["peers"] == 3)["epoch"]
    spot.wait("epoch", lambda line: line["epoch"] >= joined + 10)
    began = len(spot.said("epoch"))
    notebook.signal(signal.SIGKILL)
    killed = time.monotonic()
    notebook.end()
    spot.wait("epoch", lambda line: line["peers"] == 2, since=began)
    crew.check("the killed one is missed", f"{time.monotonic() - killed:.1f} s", True)
    crew.until(both, LAST)
    ends = crew.finish(both)
    pause = max(longest_pause(peer, 20) for peer in both)
    crew.check("nobody stalls for 5 s", f"{pause:.1f} s", pause < 5)
    rules.named_once(crew, "the kill", both, rf"peer {notebook.said('ready')[0]['peer'][-6:]} is gone")
    rules.all_of_them(crew, ends, both, except_for=[notebook], **TRAINING)
