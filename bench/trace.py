"""What the steps of training peers add up to. A step is a report of workers/trainer.py; the clock is the machine's."""

import statistics
from dataclasses import dataclass


@dataclass
class Epoch:
    """One shared step of the optimizer, over all peers."""

    number: int
    # When the call that brought the samples to the target was made, and when the last peer had the new weights.
    reached: float
    applied: float
    samples: int
    loss: float


def epochs(peers: list[list[dict]], target: int) -> list[Epoch]:
    """Those epochs that every peer has both counted samples for and left behind, in order."""
    last = min(max((step["epoch"] for step in steps), default=0) for steps in peers)
    found = []
    for number in range(last):
        of_it = sorted(
            (s for steps in peers for s in steps if s["step"] == number), key=lambda s: s["called"]
        )
        total, reached = 0, None
        for step in of_it:
            total += step["samples"]
            if total >= target and reached is None:
                reached = step["called"]
        left = [next((s["done"] for s in steps if s["epoch"] > number), None) for steps in peers]
        if reached is None or None in left:
            continue
        loss = statistics.fmean(step["loss"] for step in of_it)
        found.append(Epoch(number, reached, max(left), total, loss))
    return found


def overheads(found: list[Epoch]) -> list[float]:
    """Seconds from target reached to applied; the first epoch, in which peers find one another, is left out."""
    return [epoch.applied - epoch.reached for epoch in found if epoch.number > 0]


def reaches(found: list[Epoch], loss: float, smooth: int = 3) -> Epoch | None:
    """The first epoch at which the mean training loss over `smooth` epochs is at most `loss`."""
    for end in range(smooth, len(found) + 1):
        if statistics.fmean(epoch.loss for epoch in found[end - smooth : end]) <= loss:
            return found[end - 1]
    return None


def progress(peers: list[list[dict]], target: int, begin: float, end: float) -> float:
    """Useful samples a second: shared steps that the swarm made between the two times, at `target` samples each.

    The swarm is at an epoch once any peer is, so that a peer which has been killed takes nothing with it. Part of an
    epoch is counted by the steps before and after, so that where the window ends makes no difference of a whole epoch.
    """
    firsts: dict[int, float] = {}
    for steps in peers:
        for step in steps:
            firsts[step["epoch"]] = min(firsts.get(step["epoch"], step["done"]), step["done"])
    marks = sorted((at, epoch) for epoch, at in firsts.items())
    return (_epoch_at(marks, end) - _epoch_at(marks, begin)) * target / (end - begin)


def _epoch_at(marks: list[tuple[float, int]], when: float) -> float:
    before = [mark for mark in marks if mark[0] <= when]
    after = [mark for mark in marks if mark[0] > when]
    if not before:
        return float(marks[0][1]) if marks else 0.0
    at, epoch = max(before, key=lambda mark: mark[1])
    later = [mark for mark in after if mark[1] > epoch]
    if not later:
        return float(epoch)
    then, following = later[0]
    return epoch + (following - epoch) * (when - at) / (then - at)
