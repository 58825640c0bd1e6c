"""Day 6: twenty joiners inside 10 s at one seed with a thin uplink, which dies when they have half of its state; and 400 MB
from a donor that dies half-way."""

import signal
import time

import rules

TITLE = "stampede"
TRAINING = {"epochs": 30, "target": 1024}
# A joiner's line is so thin that none can have the whole state when the seed dies, whatever the others give it.
JOINERS, BALLAST, UPLINK, DOWNLINK = 20, 12, 50.0, 8.0
LARGE = 400


def done(joiners):
    """How many of them have the state."""
    return sum("loaded the state of epoch" in joiner.log() for joiner in joiners)


def share(received, size):
    """How much of a state of so many MiB has come."""
    return received / (size << 20)


def download(crew):
    """One joiner loads 400 MB from two donors; one of them is killed half-way."""
    common = {"run": "large", "ballast": LARGE, "epochs": 1 << 30, "target": 4096, "batch": 64, "pace": 0.5}
    first = crew.peer("donor0", crew.lab.public("donor0"), seed=0, **common)
    token, state = (first.said("ready")[0][field] for field in ("token", "ballast"))
    first.wait("epoch")
    second = crew.peer("donor1", crew.lab.public("donor1"), join=token, seed=1, **common)
    # Weights of an epoch that nobody begins with.
    second.wait("epoch", lambda line: line["peers"] == 2 and line["epoch"] >= 1)
    host = crew.lab.public("joiner")
    host.rate(down_mbit=400)
    sent = {donor: donor.traffic()[1] for donor in (first, second)}
    joiner = crew.peer("joiner", host, join=token, seed=2, wait=False, **common)
    crew.wait("half of it", lambda: share(host.bytes()[0], LARGE) > 0.5)
    killed = max((first, second), key=lambda donor: donor.traffic()[1] - sent[donor])
    had = share(host.bytes()[0], LARGE)
    killed.signal(signal.SIGKILL)
    at, early = time.monotonic(), done([joiner])
    killed.end()
    crew.check(
        "400 MB: its donor dies half-way", f"{had:.0%} received, {early} done", not early and had < 0.9
    )
    joiner.wait("epoch", seconds=300)
    seconds, received = time.monotonic() - at, share(host.bytes()[0], LARGE)
    left = first if killed is second else second
    crew.check("what had come was kept", f"{received:.2f} times the state received", received < 1.5)
    both = [left, joiner]
    crew.until(both, 0, ahead=2)
    ends = crew.finish(both, 300)
    found = [end["ballast"] for end in ends]
    crew.check(
        "400 MB are the first donor's", f"{seconds:.1f} s more, {found}, its {state}", found == [state] * 2
    )
    rules.named_once(crew, "the killed donor", both, rules.gone(killed))
    rules.same_weights(crew, ends)


def play(crew):
    """The stampede, then the large download."""
    _, token = crew.node("node", crew.lab.public("node"))
    host = crew.lab.public("seed")
    options = {**TRAINING, "ballast": BALLAST, "batch": 8, "pace": 0.5}
    seed = crew.peer("seed", host, join=token, seed=0, **options)
    state = seed.said("ready")[0]["ballast"]
    host.rate(up_mbit=UPLINK)
    seed.wait("epoch")
    before = seed.traffic()[1]
    # Twenty times importing torch takes two cores a minute; only then do all of them knock at once.
    joiners = []
    for n in range(1, JOINERS + 1):
        home = crew.lab.public(f"joiner{n}")
        home.rate(down_mbit=DOWNLINK)
        joiners.append(crew.peer(f"joiner{n}", home, join=token, seed=n, wait=False, hold=True, **options))
    for joiner in joiners:
        joiner.wait("held", seconds=400)
    # At epoch 0 the state of a newcomer is as good as the seed's.
    seed.wait("epoch", lambda line: line["epoch"] >= 1, seconds=400)
    began = time.monotonic()
    for joiner in joiners:
        joiner.order("go")
    crew.wait(
        "half of the state",
        lambda: sorted(share(j.traffic()[0], BALLAST) for j in joiners)[JOINERS // 2] > 0.5,
        300,
    )
    copies, most = (
        (seed.traffic()[1] - before) / (BALLAST << 20),
        max(share(j.traffic()[0], BALLAST) for j in joiners),
    )
    seed.signal(signal.SIGKILL)
    early = done(joiners)
    seed.end()
    crew.check(
        "the seed dies half-way",
        f"{copies:.1f} copies sent in {time.monotonic() - began:.0f} s, {early} joiners done, most has {most:.0%}",
        not early and most < 1,
    )
    for joiner in joiners:
        joiner.wait("epoch", lambda line: line["peers"] >= JOINERS, seconds=400)
    # All clocks are this machine's.
    came = [joiner.said("ready")[0]["at"] for joiner in joiners]
    span = max(came) - min(came)
    crew.check(f"{JOINERS} joiners come within 10 s", f"the last {span:.1f} s after the first", span < 10)
    crew.check("all train together", f"{time.monotonic() - began:.0f} s after the first came", True)
    ends = crew.finish(joiners, 400)
    found = {end["ballast"] for end in ends}
    crew.check("one state, the seed's", f"{sorted(found)}, its {state}", found == {state})
    rules.named_once(crew, "the dead seed", joiners, rules.gone(seed))
    rules.same_weights(crew, ends)
    rules.loss_as_alone(crew, ends, **TRAINING)
    rules.flat(crew, joiners)
    download(crew)
    rules.no_trouble(crew)
