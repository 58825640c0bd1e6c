"""Day 7: one peer 20 times slower; batches of 64 and 3; fp16 with an overflow on one, fp32 and accumulation 4 on the other."""

import re

import rules

TITLE = "odd couple"
TRAINING = {"epochs": 40, "target": 2048}
ROUND = re.compile(r"averaged gradients with (\d+) peers, (\d+) samples")


def play(crew):
    """Two peers that have little in common, from the first epoch to the last."""
    _, token = crew.node("node", crew.lab.public("node"))
    slow = crew.peer(
        "slow", crew.lab.public("slow"), join=token, seed=1, batch=3, accumulate=4, pace=0.4, **TRAINING
    )
    fast = crew.peer(
        "fast", crew.lab.public("fast"), join=token, seed=0, batch=64, pace=0.02, half=True, **TRAINING
    )
    at = fast.wait("epoch", lambda line: line["peers"] == 2 and line["epoch"] >= 5)["epoch"]
    fast.order("overflow")
    fast.wait("epoch", lambda line: line["epoch"] >= at + 5)
    crew.arrive([slow, fast])
    # Asked before anybody leaves: who has left is not in the status of the others.
    credit = fast.credit(slow.said("ready")[0]["peer"])
    gave = slow.credit(fast.said("ready")[0]["peer"])
    ends = crew.finish([slow, fast])
    overflows = [(line["before"], line["after"], line["samples"]) for line in fast.said("overflow")]
    crew.check(
        "one overflow, and it halved the scale",
        ", ".join(f"{before:.0f} to {after:.0f}" for before, after, _ in overflows) or "none",
        len(overflows) == 1 and overflows[0][1] == overflows[0][0] / 2,
    )
    left_out = sum(samples for *_, samples in overflows)
    crew.check(
        "its batch is in nobody's credit",
        f"{gave} counted, {ends[1]['samples']} computed, {left_out} overflowed",
        gave is not None and gave == ends[1]["samples"] - left_out,
    )
    failed = [end["status"]["rounds_failed"] for end in ends]
    crew.check("no round failed by it", f"{failed}", failed == [0, 0])
    rounds = [tuple(map(int, found)) for found in ROUND.findall(fast.log())]
    both = sum(members == 2 for members, _ in rounds)
    crew.check(
        "the slow one is in 95 % of the rounds", f"{both} of {len(rounds)}", both >= 0.95 * len(rounds) > 0
    )
    crew.check(
        "its samples count, none twice",
        f"{credit} counted, {ends[0]['samples']} computed",
        0.9 * ends[0]["samples"] <= (credit or 0) <= ends[0]["samples"],
    )
    rules.all_of_them(crew, ends, [slow, fast], **TRAINING)
