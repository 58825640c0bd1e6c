"""Day 8: a member sends NaN and then a million times too much; somebody copies an identity; a stranger floods a node.

What an invited peer could do to frames (truncated, malformed) is not played here: a Python program cannot send them.
`crates/averaging/tests/faults.rs` does, and the decoders have fuzz targets.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import rules
from crew import ENDLESS, HERE, words

TITLE = "poisoner, stranger"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 120
FLOOD = 120


def memory(process):
    """Private resident MiB and open files of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024, len(os.listdir(f"/proc/{process.pid}/fd"))


def poison(crew, evil, honest, how, reason, who):
    """One spoilt contribution: it harms nobody and is named once by each of `who`."""
    me = evil.said("ready")[0]["peer"][-6:]
    count = len(evil.said("poisoned"))
    evil.order(f"poison {how}")
    at = evil.wait("poisoned", since=count)["epoch"]
    crew.wait("rounds after it", lambda: all(peer.epoch >= at + 3 for peer in honest))
    rules.named_once(crew, f"contribution of {how}", who, rf"peer {me}: {reason}")
    losses = [round(peer.last("epoch")["loss"], 2) for peer in honest]
    crew.check(f"after {how} the model is well", losses, all(loss < 6 for loss in losses))


def impostor(crew, honest, token, key):
    """The same identity file a second time: on this machine, then as a copy elsewhere."""
    command = [sys.executable, HERE / "peer.py", "--run", "hard", "--join", token, *words(TRAINING)]
    second = crew.start("second", honest[0].host, *command, "--identity", key)
    code = second.end()
    said = second.log().strip().splitlines()[-1]
    crew.check("one identity file, two processes: refused", said[-60:], code != 0 and "identity" in said)
    copied = crew.folder / "copied.key"
    shutil.copy(key, copied)
    before = honest[1].epoch
    thief = crew.start("impostor", crew.lab.public("impostor"), *command, "--identity", copied, "--seed", "9")
    thief.wait("ready")
    crew.wait("rounds beside the impostor", lambda: min(p.epoch for p in honest[1:]) >= before + 5)
    me = honest[0].said("ready")[0]["peer"][-6:]
    named = f"the identity of peer {me} is used by two machines at once"
    crew.wait("the copy is named", lambda: all(named in peer.log() for peer in honest[1:]), 60)
    went_on = min(peer.epoch for peer in honest[1:]) - before
    crew.check("the others go on beside the impostor", f"{went_on} epochs", went_on >= 5)
    thief.signal(signal.SIGKILL)
    thief.end()
    rules.named_once(crew, "the copied identity", honest[1:], named)
    return second, thief


def flood(crew, node, where, token):
    """A stranger's flood: bounded memory, and a newcomer still gets in."""
    stranger = crew.lab.public("stranger")
    before, files = memory(node.process)
    noise = crew.start("stranger", stranger, sys.executable, HERE / "stranger.py", where.address, 4001, FLOOD)
    noise.wait("open")
    newcomer = crew.peer(
        "newcomer", crew.lab.public("newcomer"), join=token, seed=8, batch=32, pace=0.2, **TRAINING
    )
    newcomer.wait("epoch", lambda line: line["peers"] >= 4)
    during, most = memory(node.process)
    crew.check("a newcomer gets in during the flood", f"{noise.alive()}", noise.alive())
    noise.order("stop")
    end = noise.wait("end")
    noise.end()
    crew.wait("the connections' end", lambda: memory(node.process)[1] < files + 16, 120)
    after, left = memory(node.process)
    crew.check(
        "node's memory bounded (100 MiB), files given back",
        f"{before:.0f}, {during:.0f}, {after:.0f} MiB; {files}, {most}, {left} files; {end['opened']} connections",
        during - before < 100 and after - before < 100,
    )
    return newcomer


def play(crew):
    """Three honest peers, one that is not, and who else comes by."""
    where = crew.lab.public("node")
    node, token = crew.node("node", where)
    key = crew.folder / "honest0.key"
    honest = [
        crew.peer(
            f"honest{seed}", crew.lab.public(f"honest{seed}"), join=token, seed=seed, batch=32, pace=0.2,
            identity=key if seed == 0 else None, **TRAINING,
        )
        for seed in range(3)
    ]  # fmt: skip
    evil = crew.peer("evil", crew.lab.public("evil"), join=token, seed=4, batch=32, pace=0.2, **TRAINING)
    honest[0].wait("epoch", lambda line: line["peers"] == 4)
    first = evil.wait("epoch", lambda line: line["peers"] == 4)["epoch"]
    crew.wait("calm after the last one came", lambda: min(p.epoch for p in (*honest, evil)) >= first + 5)
    # What is not finite does not even leave the machine that made it; the simulator forces it onto the wire.
    poison(crew, evil, honest, "nan", "not finite", [evil])
    poison(crew, evil, honest, "big", "implausible", honest)
    newcomer = flood(crew, node, where, token)
    second, thief = impostor(crew, honest, token, key)
    members = [*honest, newcomer, evil]
    crew.until(members, LAST)
    ends = crew.finish(members, 300)
    rules.all_of_them(crew, ends, honest[1:], except_for=(second, thief, evil), **TRAINING)
