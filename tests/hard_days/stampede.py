"""Day 6: twenty joiners inside 10 s at one seed with a thin uplink, which dies half-way; and 400 MB from a donor that dies."""

import signal
import time

import rules

TITLE = "stampede"
TRAINING = {"epochs": 30, "target": 1024}
JOINERS, BALLAST, UPLINK = 20, 12, 50.0
LARGE = 400


def download(crew):
    """One joiner loads 400 MB from two donors; one of them is killed half-way."""
    common = {"run": "large", "ballast": LARGE, "epochs": 1000, "target": 4096, "batch": 8, "pace": 1.0}
    first = crew.peer("donor0", crew.lab.public("donor0"), seed=0, **common)
    token = first.said("ready")[0]["token"]
    first.wait("epoch")
    second = crew.peer("donor1", crew.lab.public("donor1"), join=token, seed=1, **common)
    second.wait("epoch", lambda line: line["peers"] == 2)
    host = crew.lab.public("joiner")
    host.rate(down_mbit=400)
    sent = {donor: donor.host.bytes()[1] for donor in (first, second)}
    joiner = crew.peer("joiner", host, join=token, seed=2, wait=False, **common)
    crew.wait("half of it", lambda: host.bytes()[0] > LARGE << 19)
    killed = max((first, second), key=lambda donor: donor.host.bytes()[1] - sent[donor])
    killed.signal(signal.SIGKILL)
    at = time.monotonic()
    joiner.wait("epoch", seconds=300)
    seconds, received = time.monotonic() - at, host.bytes()[0] / (LARGE << 20)
    left = first if killed is second else second
    for peer in (left, joiner):
        peer.order("leave")
        peer.end()
    same = joiner.last("end")["ballast"] == left.last("end")["ballast"]
    crew.check("400 MB with its donor killed at 50 %", f"{seconds:.1f} s more, equal: {same}", same)
    crew.check("what had come was kept", f"{received:.2f} times the state received", received < 1.5)


def play(crew):
    """The stampede, then the large download."""
    _, token = crew.node("node", crew.lab.public("node"))
    host = crew.lab.public("seed")
    options = {**TRAINING, "ballast": BALLAST, "batch": 8, "pace": 0.5}
    seed = crew.peer("seed", host, join=token, seed=0, **options)
    host.rate(up_mbit=UPLINK)
    seed.wait("arrived" if seed.epoch >= TRAINING["epochs"] else "epoch")
    before = host.bytes()[1]
    # Twenty times importing torch takes two cores a minute; only then do all of them knock at once.
    joiners = [
        crew.peer(
            f"joiner{n}", crew.lab.public(f"joiner{n}"), join=token, seed=n, wait=False, hold=True, **options
        )
        for n in range(1, JOINERS + 1)
    ]
    for joiner in joiners:
        joiner.wait("held", seconds=400)
    began = time.monotonic()
    for joiner in joiners:
        joiner.order("go")
    started = time.monotonic() - began
    crew.check(f"{JOINERS} joiners sent off within 10 s", f"{started:.1f} s", started < 10)
    # Half of the three copies that a seed may have to send.
    crew.wait("the seed's half", lambda: host.bytes()[1] - before > BALLAST * 1.5 * (1 << 20), 300)
    seed.signal(signal.SIGKILL)
    copies = (host.bytes()[1] - before) / (BALLAST << 20)
    crew.check("the seed dies half-way", f"{copies:.1f} copies sent, {time.monotonic() - began:.0f} s", True)
    for joiner in joiners:
        joiner.wait("epoch", lambda line: line["peers"] >= JOINERS, seconds=400)
    crew.check("all train together", f"{time.monotonic() - began:.0f} s after the first came", True)
    ends = crew.finish(joiners, 400)
    loaded = {end["ballast"] for end in ends}
    crew.check("one state, never a mixed one", f"{len(loaded)}", len(loaded) == 1)
    me = seed.said("ready")[0]["peer"][-6:]
    named = sum(f"peer {me}" in joiner.log() for joiner in joiners)
    crew.check("the dead seed is named", f"by {named} of {JOINERS}", named > 0)
    rules.same_weights(crew, ends)
    rules.loss_as_alone(crew, ends, **TRAINING)
    rules.no_trouble(crew)
    download(crew)
