"""Day 2: a spot machine gets SIGTERM with 30 s of grace, and is back with another address and the same identity."""

import signal
import time

import rules
from crew import ENDLESS

TITLE = "spot notice"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 60
GRACE = 30.0


def play(crew):
    """Two stay, one goes and comes back elsewhere."""
    _, token = crew.node("node", crew.lab.public("node"))
    stay = [
        crew.peer(
            f"stay{seed}",
            crew.lab.public(f"stay{seed}"),
            join=token,
            seed=seed,
            batch=32,
            pace=0.05,
            **TRAINING,
        )
        for seed in range(2)
    ]
    key = crew.folder / "spot.key"
    spot = crew.peer(
        "spot", crew.lab.public("spot"), join=token, seed=2, batch=32, pace=0.05, identity=key, **TRAINING
    )
    me = spot.said("ready")[0]["peer"]
    stay[0].wait("epoch", lambda line: line["epoch"] >= 5 and line["peers"] >= 3)
    crew.wait("its first samples", lambda: (stay[0].credit(me) or 0) > 0)
    before = stay[0].credit(me)
    began = time.monotonic()
    spot.signal(signal.SIGTERM)
    code = spot.end(GRACE + 10)
    took = time.monotonic() - began
    crew.check(
        "gone within the grace of 30 s",
        f"{took:.1f} s, code {code}",
        code == -signal.SIGTERM and took <= GRACE,
    )
    at = stay[0].epoch
    stay[0].wait("epoch", lambda line: line["epoch"] >= at + 5 and line["peers"] == 2)
    back = crew.peer(
        "back",
        crew.lab.public("elsewhere"),
        join=token,
        seed=3,
        batch=32,
        pace=0.05,
        identity=key,
        **TRAINING,
    )
    crew.check("the same peer", back.said("ready")[0]["peer"][-8:], back.said("ready")[0]["peer"] == me)
    joined = back.wait("epoch", lambda line: line["epoch"] > at)
    stay[0].wait("epoch", lambda line: line["epoch"] > joined["epoch"] and line["peers"] == 3)
    crew.until([*stay, back], LAST)
    crew.arrive([*stay, back])
    after = stay[0].credit(me)
    # Before everybody leaves: at the end it goes a second time, and whoever is slower sees it.
    rules.named_once(crew, "its leave", stay, rf"peer {me[-6:]} has left")
    ends = crew.finish([*stay, back])
    crew.check(
        "credit goes on", f"{before} samples before, {after} at the end", before and after and after > before
    )
    rules.all_of_them(crew, ends, [*stay, back], **TRAINING)
