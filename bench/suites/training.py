"""c, e, f, h: training peers. Round overhead, time to a loss, faults, and what an idle peer holds."""

import statistics
import time
from collections.abc import Iterator

from harness import PeerDied, Swarm, Worker, systems
from network import Links, missing
from table import Row, failed, faster, share
from trace import epochs, overheads, progress, reaches

MIB = 1 << 20


def _follow(workers: list[Worker], seconds: float, until=None) -> list[list[dict]]:
    """Let these peers train; their steps, by peer. Ends after `seconds`, or once `until(steps)` holds."""
    steps: list[list[dict]] = [[] for _ in workers]
    for worker in workers:
        worker.tell("train")
    _watch(workers, steps, time.monotonic() + seconds, until)
    return steps


def _watch(workers: list[Worker], steps: list[list[dict]], deadline: float, until=None):
    """Take down what these peers report, until then or once `until(steps)` holds."""
    while time.monotonic() < deadline and not (until and until(steps)):
        # Reports carry their own times and wait in a queue: how often it is looked at changes no figure.
        time.sleep(0.05)
        for mine, worker in zip(steps, workers):
            mine.extend(line for line in worker.take() if "step" in line)


# c. Round overhead.


def overhead(quick: bool) -> Iterator[Row]:
    """68k parameters, two peers whose batches take a fixed time: from the call that reaches the target to applied."""
    for length, count in ((1, 4),) if quick else ((1, 5), (6, 2)):
        found = {}
        try:
            for system in systems("potluck", "hivemind"):
                found[system] = _overhead(system, length, count)
        except PeerDied as died:
            yield failed("overhead", f"epochs of {length} s", ">= 20x", died)
            continue
        ours, theirs = (
            statistics.median(found[name]) if found.get(name) else None for name in ("potluck", "hivemind")
        )
        note = "Optimizer.step() that reaches the target to the last peer's new weights; hivemind with its quickstart's times"
        if found.get("hivemind") == []:
            note += "; of hivemind no epoch after the first was seen in which both peers had the target and went on"
        yield faster(
            "overhead", f"68k parameters, 2 peers, epochs of {length} s", ours, theirs, "hivemind", 20, note=note,
            details=found,
        ).because("the other peer's batch of 50 ms is in both figures; hivemind gathers its group ahead if it has the time")  # fmt: skip


def _overhead(system: str, length: float, count: int) -> list[float]:
    batch, pace = 8, 0.05
    target = int(2 * batch * length / pace)
    with Swarm("trainer", system, 2, target=target, batch=batch, pace=pace) as swarm:
        enough = lambda steps: min(max((s["epoch"] for s in mine), default=0) for mine in steps) >= count
        steps = _follow(swarm.workers, 30 + count * (length + 6), enough)
    return overheads(epochs(steps, target))


# e. End to end.

LOSS, RATE = 3.3, 100


def end_to_end(quick: bool) -> Iterator[Row]:
    """The demonstration's model, four peers at 100 Mbit/s each, to a fixed training loss: wall time and bytes."""
    what = f"demo model to a loss of {LOSS}, 4 peers at {RATE} Mbit/s"
    if why := missing():
        yield failed("end to end", what, ">= 2x", why)
        return
    found = {}
    for system in systems("potluck", "hivemind"):
        try:
            found[system] = _to_loss(system, 3.4 if quick else LOSS)
        except PeerDied as died:
            found[system] = {"why": str(died)}
    ours, theirs = (found.get(name, {}) for name in ("potluck", "hivemind"))
    if "seconds" not in ours:
        yield failed("end to end", what, ">= 2x", ours["why"])
        return
    note = f"epochs {ours['epochs']} / {theirs.get('epochs', '-')} of {ours['samples']:.0f} / {theirs.get('samples', 0):.0f} samples"
    note += f"; {theirs['why']}" if "why" in theirs else ""
    yield faster(
        "end to end", what, ours["seconds"], theirs.get("seconds"), "hivemind", 2, note=note, details=found
    )
    yield faster(
        "end to end", "bytes of all peers until then", ours["bytes"] / 1e6,
        theirs["bytes"] / 1e6 if "bytes" in theirs else None, "hivemind", unit="MB", note="on the links, all headers included",
    )  # fmt: skip


def _to_loss(system: str, loss: float) -> dict:
    target = 64
    with (
        Links(4, RATE) as net,
        Swarm("trainer", system, 4, net.hosts, model="demo", lossy=1, target=target) as swarm,
    ):
        before, begin = sum(net.sent()), time.monotonic()
        there = lambda steps: reaches(epochs(steps, target), loss) is not None
        steps = _follow(swarm.workers, 240, there)
        sent = sum(net.sent()) - before
        found = epochs(steps, target)
        reached = reaches(found, loss)
        if reached is None:
            return {
                "why": f"{system} was at epoch {len(found)} and loss {found[-1].loss if found else 9:.2f} after 240 s"
            }
        return {
            "seconds": reached.applied - begin,
            "bytes": sent,
            "epochs": reached.number + 1,
            "samples": statistics.fmean(epoch.samples for epoch in found),
            "overhead": statistics.median(overheads(found)),
        }


# f. Faults.

KILL_EVERY = 20.0


def faults(quick: bool) -> Iterator[Row]:
    """Four peers; every 20 s one is killed and a loaded stand-by takes its place. Useful samples a second."""
    shares, rates, dead = {}, {}, {}
    for system in systems("potluck", "hivemind"):
        try:
            calm, stormy = _useful(system, 15.0, kills=1 if quick else 2)
            rates[system] = (calm, stormy)
            shares[system] = stormy / calm
        except (PeerDied, ZeroDivisionError) as died:
            dead[system] = str(died)[-200:]
    note = "SIGKILL of all but the first in turn; an epoch is 5 s of four peers' work; batches take a fixed time, so that a dead peer's core helps nobody"
    if "hivemind" in dead:
        note += f"; hivemind: {dead['hivemind']}"
    if "potluck" in dead:
        yield failed("faults", "one of 4 killed every 20 s", ">= 0.85", dead["potluck"])
        return
    yield share(
        "faults", "one of 4 killed every 20 s: share of fault-free", shares["potluck"], 0.85,
        peer=shares.get("hivemind"), peer_name="hivemind", note=note, details={"samples_per_second": rates},
    )  # fmt: skip
    yield Row(
        "faults", "useful samples a second, no faults", "1/s", rates["potluck"][0],
        rates["hivemind"][0] if "hivemind" in rates else None, "hivemind",
        rates["potluck"][0] / rates["hivemind"][0] if "hivemind" in rates else None,
        note="640 a second are computed",
    )  # fmt: skip


def _useful(system: str, seconds: float, kills: int) -> tuple[float, float]:
    """Without faults for `seconds`, and then with a kill every 20 s."""
    batch, pace = 8, 0.05
    target = int(5 * 4 * batch / pace)
    with Swarm("trainer", system, 4, target=target, batch=batch, pace=pace) as swarm:
        spares = [swarm.start(4 + number) for number in range(kills)]
        for spare in spares:
            spare.loaded()
        # Everybody is in step before the clock starts.
        steps = _follow(swarm.workers[:4], 60, lambda found: all(s and s[-1]["epoch"] >= 2 for s in found))
        steps += [[] for _ in spares]
        begin = time.monotonic()
        storm = begin + seconds
        for number, spare in enumerate(spares):
            _watch(swarm.workers, steps, storm + KILL_EVERY * number)
            # Not the first peer, whose address the stand-ins were given.
            swarm.workers[1 + number].end()
            swarm.open(spare)
            spare.tell("train")
        end = storm + KILL_EVERY * kills
        # One more epoch, so that the last one in the window is not cut off.
        _watch(swarm.workers, steps, end + 6.0)
        return progress(steps, target, begin, storm), progress(steps, target, storm, end)


# h. An idle peer.


def idle(quick: bool) -> Iterator[Row]:
    """Two peers that are in a run and wait: memory beyond the same process with torch alone, and processes."""
    found = {}
    for system in systems("potluck", "hivemind"):
        with Swarm("trainer", system, 2) as swarm:
            # Not for anything to happen, but for nothing to: what is measured is a peer that has waited for a while.
            time.sleep(3)
            reports = [worker.ask("memory", "memory") for worker in swarm.workers]
            beyond = [r["memory"] - ready["torch"] for r, ready in zip(reports, swarm.ready)]
            found[system] = {"memory": statistics.fmean(beyond) / MIB, "processes": reports[0]["processes"]}
    ours, theirs = found["potluck"], found.get("hivemind", {})
    yield faster(
        "memory", "idle peer, beyond torch", ours["memory"], theirs.get("memory"), "hivemind", 5, unit="MiB",
        note="proportional set size of all processes of a peer with DHT and optimizer of 68k parameters",
    )  # fmt: skip
    yield faster(
        "memory", "processes of a peer", ours["processes"], theirs.get("processes"), "hivemind", unit=""
    )
