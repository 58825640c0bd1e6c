"""Day 8: members of a closed run send what is no number, a million times too much and frames that are cut off; the uninvited
want in; somebody copies an identity; strangers flood a node with connections, and its DHT with records that are too large.

A Python program cannot put a NaN or half a frame on the wire: its own checks and encoders stand in between. That part is
played by `tests/src/bin/hostile.rs`, a member of the same run with an invite like everybody's.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import rules
from crew import ENDLESS, HERE, HardDay, words

TITLE = "poisoner, stranger"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 120
FLOOD = 120
# A node lets 64 handshakes of one address be under way, and 512 of all.
ADDRESSES = 24
OVERSIZED = 240
MIB = 1024


class Memory:
    """Resident memory of a process, and its peak since this was made; open files."""

    def __init__(self, process):
        self.folder = Path(f"/proc/{process.pid}")
        # The kernel forgets the peak so far.
        (self.folder / "clear_refs").write_text("5")
        self.before, self.files = self.field("VmRSS"), self.open()

    def field(self, name):
        """One of the kernel's figures, in MiB."""
        lines = (self.folder / "status").read_text().splitlines()
        return int(dict(line.split(":", 1) for line in lines)[name].split()[0]) / MIB

    def grown(self):
        """By how much it has grown at most, in MiB."""
        return self.field("VmHWM") - self.before

    def open(self):
        """How many files it has open."""
        return len(os.listdir(self.folder / "fd"))


def tool(crew, *command):
    """What a `potluck` command that prints JSON says."""
    done = subprocess.run([crew.potluck, *command], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def hostile(crew, name, role, token, *numbers):
    """The program for what Python cannot do."""
    binary = Path(crew.potluck).with_name("hostile")
    if not binary.is_file():
        raise HardDay(f"{binary} is not built: make hard-days builds it")
    return crew.start(name, crew.lab.public(name), binary, role, token, *numbers)


def own_check(crew, evil, honest):
    """What is not finite does not leave the machine that made it: it is named there, and nobody else hears of it."""
    me = evil.said("ready")[0]["peer"][-6:]
    evil.order("poison nan")
    at = evil.wait("poisoned")["epoch"]
    crew.wait("rounds after it", lambda: all(peer.epoch >= at + 3 for peer in honest))
    rules.named_once(crew, "a NaN of its own", [evil], rf"peer {me}: not finite")
    heard = [peer.name for peer in honest if f"peer {me}: not finite" in peer.log()]
    crew.check("it stays there", f"heard of by {', '.join(heard) or 'nobody else'}", not heard)


def too_much(crew, evil, honest):
    """One contribution that is a million times too large."""
    me, count = evil.said("ready")[0]["peer"][-6:], len(evil.said("poisoned"))
    evil.order("poison big")
    at = evil.wait("poisoned", since=count)["epoch"]
    crew.wait("rounds after it", lambda: all(peer.epoch >= at + 3 for peer in honest))
    rules.named_once(crew, "a million times too much", honest, rf"peer {me}: implausible")


def on_the_wire(crew, mangler, honest, how, reason):
    """One round with what no honest program sends: the others' round is whole, and each of them names the sender."""
    me, count = mangler.said("ready")[0]["peer"][-6:], len(mangler.said("done"))
    mangler.order(how)
    done = mangler.wait("done", since=count)
    crew.wait("rounds after it", lambda: all(peer.epoch >= done["epoch"] + 3 for peer in honest))
    # One line of the log, whatever else it says: its contribution is refused, and so are the averages that it made.
    rules.named_once(crew, f"{how} on the wire, epoch {done['epoch']}", honest, rf"peer {me}: {reason}.*")
    return done


def uninvited(crew, honest, token, owner):
    """Two liars without the owner's invite: neither weights nor membership, and one line that says why."""
    other = tool(crew, "keygen", "--identity", str(crew.folder / "other.key"), "--json")["peer"]
    forged = tool(crew, "invite", token, "--identity", str(crew.folder / "other.key"), "--json")["token"]
    before = honest[0].status()["peers"]
    liars = []
    for name, claimed, said in (("open", token, None), ("forged", forged, other)):
        liar = crew.peer(
            f"liar-{name}",
            crew.lab.public(f"liar-{name}"),
            join=claimed,
            owner=said,
            seed=11,
            wait=False,
            **TRAINING,
        )
        code = liar.end(120)
        lines = [line for line in liar.log().splitlines() if "this run is closed and the invite" in line]
        got = [line["kind"] for line in liar.lines]
        crew.check(
            f"the uninvited ({name}) is refused with one line",
            f"code {code}: {(lines or [liar.log()[-60:]])[-1][-70:]}",
            code == 1 and len(lines) == 1 and not got,
        )
        liars.append(liar)
    folder = crew.folder / "stolen"
    thief = crew.start("thief", crew.lab.public("thief"), crew.potluck, "keeper", token, "--dir", folder)
    code = thief.end(60)
    line = thief.log().strip().splitlines()[0]
    crew.check(
        "a keeper without an invite gets no state",
        f"code {code}: {line[-70:]}",
        code not in (0, None) and "closed" in line and not list(folder.glob("epoch-*")),
    )
    after = honest[0].status()["peers"]
    strangers = {entry["peer"] for entry in after} - {entry["peer"] for entry in before}
    crew.check(
        "none of them was a member", f"{len(after)} members, {len(strangers)} of them new", not strangers
    )
    return [*liars, thief]


def impostor(crew, honest, token, owner, key):
    """The same identity file a second time: on this machine, then as a copy elsewhere."""
    command = [
        sys.executable,
        HERE / "peer.py",
        "--run",
        "hard",
        "--join",
        token,
        *words({"owner": owner, **TRAINING}),
    ]
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


def standing(where, port, sources):
    """How many connections from these addresses stand at a port of a host, as its kernel sees it."""
    shown = subprocess.run(
        where.command("ss", "-Htn", "state", "established", f"( sport = :{port} )"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peers = [re.sub(r"^\[?(?:::ffff:)?|\]?:\d+$", "", line.split()[-1]) for line in shown.stdout.splitlines()]
    return sum(peer in sources for peer in peers)


def flood(crew, node, where, token, owner):
    """Strangers' connections: many really stand, memory is bounded at its peak, and a newcomer still gets in."""
    stranger, port = crew.lab.public("stranger"), 4001
    sources = [f"{stranger.address.rpartition('.')[0]}.{150 + number}" for number in range(ADDRESSES)]
    for source in sources:
        subprocess.run(
            stranger.command("ip", "address", "add", f"{source}/24", "dev", stranger.device), check=True
        )
    memory, counts = Memory(node.process), []
    noise = crew.start(
        "stranger", stranger, sys.executable, HERE / "stranger.py", where.address, port, FLOOD, *sources
    )
    noise.wait("open")
    began = time.monotonic()
    newcomer = crew.peer(
        "newcomer", crew.lab.public("newcomer"), join=token, owner=owner, seed=8, batch=32, pace=0.2, wait=False,
        **TRAINING,
    )  # fmt: skip

    def entered():
        counts.append(standing(where, port, sources))
        return any(line["peers"] >= 5 for line in newcomer.said("epoch"))

    crew.wait("the newcomer is in", entered)
    crew.check(
        "a newcomer gets in during the flood",
        f"{time.monotonic() - began:.0f} s, torch's import included",
        noise.alive(),
    )
    most_open = memory.open()
    noise.order("stop")
    end = noise.wait("end")
    noise.end()
    crew.check(
        f"connections of {ADDRESSES} addresses that stand at the node",
        f"{max(counts)} at most, {min(counts)} at least; {end['stood']} in all, closed: {end['closed']}",
        max(counts) >= 400 and end["stood"] >= 1000 and all(end["closed"].values()),
    )
    crew.wait("the connections' end", lambda: memory.open() < memory.files + 16, 120)
    crew.check(
        "node's memory bounded at its peak (100 MiB), files given back",
        f"{memory.grown():+.0f} MiB; {memory.files}, {most_open}, {memory.open()} files",
        memory.grown() < 100,
    )
    return newcomer


def records(crew, node, token):
    """Values and messages that are too large for the DHT: refused one by one, and nothing of them is kept."""
    memory, grown = Memory(node.process), []
    for turn in ("records", "records-again"):
        sender = hostile(crew, turn, "records", token, OVERSIZED)
        end = sender.wait("end")
        code = sender.end()
        crew.check(
            f"{OVERSIZED} records that are too large: refused",
            f"{end['answers']}, {end['sent'] >> 20} MiB sent, code {code}",
            end["answers"] == {"malformed": OVERSIZED} and code == 0,
        )
        grown.append(memory.grown())
    # What has come once is memory for what comes next; kept, it would be all of it again.
    crew.check(
        "node's memory at its peak (under 60 MiB, then 24 more)",
        f"{grown[0]:+.0f} MiB, as many again: {grown[1] - grown[0]:+.0f} MiB",
        grown[0] < 60 and grown[1] - grown[0] < 24,
    )


def play(crew):
    """Three honest peers, two that are not, and who else comes by."""
    where = crew.lab.public("node")
    node, outside = crew.node("node", where)
    owners, key = crew.folder / "owner.key", crew.folder / "honest0.key"
    owner = tool(crew, "keygen", "--identity", str(owners), "--json")["peer"]
    token = tool(crew, "invite", outside, "--identity", str(owners), "--json")["token"]
    options = {"join": token, "owner": owner, "batch": 32, "pace": 0.2, **TRAINING}
    honest = [
        crew.peer(f"honest{seed}", crew.lab.public(f"honest{seed}"), seed=seed, identity=identity, **options)
        for seed, identity in enumerate((key, owners, None))
    ]
    evil = crew.peer("evil", crew.lab.public("evil"), seed=4, **options)
    ready = honest[1].said("ready")[0]
    mangler = hostile(crew, "mangler", "member", ready["token"], *ready["gradients"])
    mangler.wait("ready")
    honest[0].wait("epoch", lambda line: line["peers"] == 5)
    first = evil.wait("epoch", lambda line: line["peers"] == 5)["epoch"]
    crew.wait("calm after the last one came", lambda: min(p.epoch for p in (*honest, evil)) >= first + 5)
    own_check(crew, evil, honest)
    too_much(crew, evil, honest)
    # Whoever has reduced a part has seen it; the others hear from those that it is in none.
    on_the_wire(crew, mangler, honest, "nan", r"(?:not finite|missing \(not in all parts)")
    me = mangler.said("ready")[0]["peer"][-6:]
    seen = [peer.name for peer in honest if f"peer {me}: not finite" in peer.log()]
    crew.check("the NaN was on the wire", f"seen by {', '.join(seen) or 'nobody'}", seen)
    cut = on_the_wire(crew, mangler, honest, "truncate", "malformed")
    crew.check("frames that were cut off", f"{cut['frames']}", cut["frames"] > 0)
    mangler.process.stdin.close()
    code = mangler.end()
    crew.check("the mangler leaves", f"code {code}", code == 0)
    liars = uninvited(crew, honest, outside, owner)
    newcomer = flood(crew, node, where, token, owner)
    records(crew, node, outside)
    second, thief = impostor(crew, honest, token, owner, key)
    members = [*honest, newcomer, evil]
    crew.until(members, LAST)
    ends = crew.finish(members, 300)
    rules.all_of_them(crew, ends, honest[1:], except_for=(second, thief, evil, *liars), **TRAINING)
