"""Day 10: six peers on thin pipes, somebody goes or comes every few seconds, three rounds in ten are cut off in mid-transfer,
clocks are 20 minutes apart; PowerSGD for the first half, then 8 bits. As long as `--minutes` says."""

import random
import re
import signal
import subprocess
import time
from collections import Counter

import rules
from crew import ENDLESS, HERE

TITLE = "long haul"
# A round takes each peer most of a second of its line: some 80 kB each way.
PEERS, TARGET, HIDDEN, UP, DOWN = 6, 1024, 256, 1.0, 4.0
# How much of that has moved when a blow falls.
MOVED = 30


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
            host.rate(UP, DOWN)
        self.peers, self.everybody = {}, []
        # Who was killed, who left, and how often whose cable was pulled.
        self.killed, self.left, self.cut = [], [], Counter()
        # Whose cable is out, and until when.
        self.out = {}

    def come(self, place, token):
        """A peer on this host, with this host's clock."""
        self.number += 1
        environment = self.crew.environment
        off = (-600, 600, 0, 120, -60, 3)[place]
        self.crew.environment = {"LD_PRELOAD": str(self.library), "CLOCK_OFF": str(off)}
        self.peers[place] = self.crew.peer(
            f"{self.compression}-{self.number}", self.hosts[place], wait=False, run=self.run, join=token,
            seed=self.number, batch=16, pace=0.15, target=TARGET, epochs=ENDLESS, hidden=HIDDEN,
            compression=self.compression,
        )  # fmt: skip
        self.crew.environment = environment
        self.everybody.append(self.peers[place])
        return self.peers[place]

    def trouble(self, token):
        """One event in the middle of a transfer: a kill, a polite leave, or a cable that is pulled for some seconds."""
        # Places 0 and 1 stay: their memory is what is measured.
        here = [p for p in range(2, PEERS) if p not in self.out and self.peers[p].said("epoch")]
        if not here:
            return
        place, dice = self.noise.choice(here), self.noise.random()
        peer = self.peers[place]
        self.crew.in_transfer(peer, kilobytes=MOVED, meanwhile=self.plug)
        if dice < 0.3:
            peer.signal(signal.SIGKILL)
            peer.end()
            self.killed.append(peer)
            self.come(place, token)
        elif dice < 0.4:
            peer.order("leave")
            peer.end()
            self.left.append(peer)
            self.come(place, token)
        else:
            self.hosts[place].link(False)
            self.out[place] = time.monotonic() + self.noise.uniform(3.0, 7.0)
            self.cut[peer.name] += 1

    def plug(self):
        """Put the cables back that were out for long enough; whether all are in."""
        for place in [place for place, until in self.out.items() if time.monotonic() > until]:
            self.hosts[place].link(True)
            del self.out[place]
        return not self.out

    def round_ended(self, stay, last):
        """Whether a round has ended since; cables are put back meanwhile."""
        self.plug()
        return stay.epoch > last

    def go(self, seconds, token):
        """Churn for so long, then a calm end."""
        stay = [self.come(place, token) for place in range(PEERS)][:2]
        began = stay[0].wait("epoch", lambda line: line["peers"] >= PEERS)["epoch"]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            # In rounds, not in seconds: how many of them are hit must not follow from how busy this machine is.
            last = stay[0].epoch
            self.crew.wait("the next round", lambda last=last: self.round_ended(stay[0], last))
            self.trouble(token)
        self.crew.wait("all cables are in", self.plug)
        churn = range(began, stay[0].epoch)
        peers = list(self.peers.values())
        self.crew.wait("everybody is here", lambda: all(p.said("epoch") or p.said("arrived") for p in peers))
        last = self.crew.until(peers, 0)
        ends = self.crew.finish(peers, 400)
        self.report(stay, ends, last, churn)

    def report(self, stay, ends, last, churn):
        """The rules for this half; `churn` are the epochs in which blows fell."""
        crew, what = self.crew, self.compression
        cuts = sum(self.cut.values())
        injected = f"{len(self.killed)} kills, {len(self.left)} leaves, {cuts} cuts"
        lost, rounds = rules.failed_rounds(stay[0]), rules.rounds(stay[0])
        done = len(rounds)
        # A kill or a cut costs at most the round that it hit, and most rounds that are hit end without whom they lost.
        allowed = min(len(self.killed) + cuts + 0.02 * done, 2 + 0.1 * (done + len(lost)))
        crew.check(
            f"{what}: lost rounds, at most {allowed:.0f}",
            f"{len(lost)} of {done + len(lost)}; {injected}",
            done > 0 and len(lost) <= allowed,
        )
        # By what either of those who stayed says: who had all of the average already names nobody.
        hit = lost.union(*({epoch for epoch, (_, who) in rules.rounds(p).items() if who} for p in stay))
        hit &= set(churn)
        share = len(hit) / max(1, len(churn))
        crew.check(
            f"{what}: 30 % of rounds cut off in mid-transfer",
            f"{len(hit)} of {len(churn)}: {share:.0%}",
            share >= 0.3,
        )
        self.names(stay)
        rules.same_weights(crew, ends)
        rules.loss_as_alone(crew, ends, epochs=max(last, ends[0]["epoch"]), target=TARGET, hidden=HIDDEN)
        rules.flat(crew, stay, rss_mb=max(8.0, crew.minutes / 60), fds=12)
        rules.no_leak(crew, what, stay)

    def names(self, stay):
        """Each kill is one line of each who stayed; a cable that was out for long may be one more, and nothing else is."""
        shown, ok = [], True
        for peer in stay:
            story = peer.story()
            gone = Counter(re.findall(r"peer (\w+) is gone", story))
            here = Counter(re.findall(r"peer (\w+) is here", story))
            left = Counter(re.findall(r"peer (\w+) has left", story))
            killed = [(rules.short(p), self.cut[p.name]) for p in self.killed]
            missed = [name for name, cuts in killed if not 1 <= gone[name] == here[name] <= 1 + cuts]
            others = {rules.short(p): self.cut[p.name] for p in self.everybody if p not in self.killed}
            blamed = [name for name, cuts in others.items() if gone[name] > cuts]
            impolite = [rules.short(p) for p in self.left if left[rules.short(p)] != 1]
            shown.append(
                f"{peer.name}: {len(killed) - len(missed)} of {len(killed)} killed, {sum(gone.values())} lines"
                + (f", wrong: {missed} {blamed} {impolite}" if missed or blamed or impolite else "")
            )
            ok = ok and not (missed or blamed or impolite)
        self.crew.check(f"{self.compression}: each kill named once, 'is gone'", "; ".join(shown), ok)


def play(crew):
    """Both halves."""
    library = clocks(crew)
    _, token = crew.node("node", crew.lab.public("node"))
    for compression in ("powersgd", "8bit"):
        Haul(crew, compression, library).go(crew.minutes * 30, token)
    rules.no_trouble(crew, [running for running in crew.everybody if running.killed])
