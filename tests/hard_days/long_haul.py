"""Day 10: six peers on thin pipes, somebody goes or comes every few seconds, rounds are cut off in mid-transfer, clocks are
20 minutes apart; PowerSGD for the first half, then 8 bits. As long as `--minutes` says."""

import random
import re
import signal
import subprocess
import time

import rules
from crew import ENDLESS, HERE

TITLE = "long haul"
PEERS, TARGET, UP = 6, 512, 20.0
FAILED = re.compile(r"no average of gradients, went on alone|missed the average of gradients")
ROUNDS = re.compile(r"averaged gradients with (\d+) peers")


def clocks(crew):
    """The library that makes a clock wrong."""
    library = crew.folder / "clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "clock.c", "-ldl"], check=True)
    return library


class Haul:
    """One half: one run with one compression."""

    def __init__(self, crew, compression, library):
        self.crew, self.compression, self.library = crew, compression, library
        self.noise = random.Random(compression)
        self.run = f"hard-{compression}"
        self.number = 0
        self.hosts = [crew.lab.public(f"{compression}{n}") for n in range(PEERS)]
        for host in self.hosts:
            host.rate(up_mbit=UP)
        self.peers = {}
        self.killed = self.cut = self.politely = 0

    def come(self, place, token):
        """A peer on this host, with this host's clock."""
        self.number += 1
        environment = self.crew.environment
        off = (-600, 600, 0, 120, -60, 3)[place]
        self.crew.environment = {"LD_PRELOAD": str(self.library), "CLOCK_OFF": str(off)}
        self.peers[place] = self.crew.peer(
            f"{self.compression}-{self.number}", self.hosts[place], wait=False, run=self.run, join=token,
            seed=self.number, batch=16, pace=0.15, target=TARGET, epochs=ENDLESS, compression=self.compression,
        )  # fmt: skip
        self.crew.environment = environment
        return self.peers[place]

    def trouble(self, token):
        """One event: a kill, a polite leave, or a cable that is pulled for a moment."""
        # Places 0 and 1 stay: their memory is what is measured.
        place = self.noise.randrange(2, PEERS)
        peer, dice = self.peers[place], self.noise.random()
        if not peer.alive() or not peer.said("epoch"):
            return
        if dice < 0.4:
            peer.signal(signal.SIGKILL)
            peer.end()
            self.killed += 1
            self.come(place, token)
        elif dice < 0.6:
            peer.order("leave")
            peer.end()
            self.politely += 1
            self.come(place, token)
        else:
            self.hosts[place].link(False)
            until = time.monotonic() + self.noise.uniform(0.5, 3.0)
            self.crew.wait("the cable", lambda: time.monotonic() > until)
            self.hosts[place].link(True)
            self.cut += 1

    def go(self, seconds, token):
        """Churn for so long, then a calm end."""
        stay = [self.come(place, token) for place in range(PEERS)][:2]
        stay[0].wait("epoch", lambda line: line["peers"] >= PEERS)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pause = time.monotonic() + self.noise.uniform(2.0, 6.0)
            self.crew.wait("the next event", lambda pause=pause: time.monotonic() > pause)
            self.trouble(token)
        peers = list(self.peers.values())
        self.crew.wait("everybody is here", lambda: all(p.said("epoch") or p.said("arrived") for p in peers))
        last = self.crew.until(peers, 0)
        ends = self.crew.finish(peers, 400)
        self.report(stay, ends, last)
        return ends

    def report(self, stay, ends, last):
        """The rules for this half."""
        crew, what = self.crew, self.compression
        injected = f"{self.killed} kills, {self.politely} leaves, {self.cut} cuts"
        lost, done = len(FAILED.findall(stay[0].log())), len(ROUNDS.findall(stay[0].log()))
        # A kill or a cut costs at most the round that it hit.
        allowed = self.killed + self.cut + 0.02 * done
        crew.check(
            f"{what}: lost rounds", f"{lost} of {done + lost}; {injected}", done > 0 and lost <= allowed
        )
        rules.same_weights(crew, ends)
        rules.loss_as_alone(crew, ends, epochs=max(last, ends[0]["epoch"]), target=TARGET)
        rules.flat(crew, stay, rss_mb=max(8.0, crew.minutes / 60), fds=12)
        rules.no_leak(crew, what, stay)


def play(crew):
    """Both halves."""
    library = clocks(crew)
    _, token = crew.node("node", crew.lab.public("node"))
    for compression in ("powersgd", "8bit"):
        Haul(crew, compression, library).go(crew.minutes * 30, token)
    rules.no_trouble(crew, [running for running in crew.everybody if running.killed])
