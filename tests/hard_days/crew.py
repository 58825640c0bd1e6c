"""Processes of a hard day: training peers and `potluck` commands on the hosts of a lab, what they say, and waiting for it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import netlab

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# A process that says nothing for this long will not say it any more: two slow cores may be shared by many.
PATIENCE = 180.0
# Fewer bytes than this on an interface in 20 ms are no transfer.
QUIET = 500
# So many quiet looks in a row are a quiet moment: a third of a second.
CALM = 15
# For peers that train until `Crew.until` names their last epoch.
ENDLESS = 1 << 30


class HardDay(Exception):
    """Something that had to happen did not; the message says what."""


class Running:
    """One process on one host, with what it said."""

    def __init__(self, crew, name, host, command):
        self.name, self.host, self.crew = name, host, crew
        self.log_path = crew.folder / f"{name}.log"
        self.private = crew.folder / f"tmp-{name}"
        self.private.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.private),
            "XDG_DATA_HOME": str(crew.folder / f"data-{name}"),
            # torch makes this folder when it is imported; what is looked for are files of potluck.
            "TORCHINDUCTOR_CACHE_DIR": str(crew.folder / "torch"),
            **crew.environment,
        }
        self.lines = []
        self.news = threading.Condition()
        self.killed = False
        self.told = None
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(
                host.command(*command),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            # Beside the log, for whoever asks afterwards why a rule did not hold.
            with open(self.log_path.with_suffix(".said"), "a") as file:
                file.write(line)
            try:
                said = json.loads(line)
            except ValueError:
                said = {"kind": "text", "text": line.rstrip()}
            if not isinstance(said, dict):
                said = {"kind": "text", "text": line.rstrip()}
            with self.news:
                self.lines.append(said)
                self.news.notify_all()
        with self.news:
            self.news.notify_all()

    def said(self, kind):
        """Every line of this kind so far."""
        with self.news:
            return [line for line in self.lines if line.get("kind", "text") == kind]

    def last(self, kind):
        """The newest line of this kind, or None."""
        found = self.said(kind)
        return found[-1] if found else None

    def wait(self, kind, condition=lambda line: True, seconds=PATIENCE, since=0):
        """The first line of this kind, after the first `since` of them, for which the condition holds."""
        deadline = time.monotonic() + seconds
        while True:
            for line in self.said(kind)[since:]:
                if condition(line):
                    return line
            if self.process.poll() is not None and not self.reader.is_alive():
                raise HardDay(
                    f"{self.name} ended with {self.process.returncode} before {kind}; see {self.log_path}"
                )
            if time.monotonic() > deadline:
                raise HardDay(
                    f"{self.name}: no {kind} in {seconds:.0f} s; last: {self.lines[-1:]}; see {self.log_path}"
                )
            with self.news:
                self.news.wait(0.2)

    def order(self, words):
        """Say a line to the process."""
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def status(self):
        """What the peer's own `Optimizer.status()` says now."""
        before = len(self.said("status"))
        self.order("status")
        return self.wait("status", since=before)["status"]

    def credit(self, peer):
        """Samples of a peer in finished rounds, as this one sees them; None if it does not see the peer."""
        entries = (entry for entry in self.status()["peers"] if entry["peer"] == peer)
        return next((entry["contributed"] for entry in entries), None)

    def signal(self, number):
        """Send a signal."""
        self.killed = self.killed or number == signal.SIGKILL
        self.process.send_signal(number)

    def end(self, seconds=PATIENCE):
        """Wait for the end; the exit code. A program with torch needs a second of processor time to exit."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise HardDay(f"{self.name} did not end in {seconds:.0f} s; see {self.log_path}") from None
        self.reader.join(10)
        return code

    def close(self):
        """After its end: nothing of it stays open here."""
        self.reader.join(10)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def traffic(self):
        """Bytes that its host's interface received and sent so far; asked of the kernel, without another process.

        Not before it has said something: until `ip netns exec` has done its work it is on no host yet.
        """
        try:
            table = Path(f"/proc/{self.process.pid}/net/dev").read_text()
        except OSError as error:
            raise HardDay(f"{self.name} has ended; see {self.log_path}") from error
        for line in table.splitlines():
            device, _, figures = line.partition(":")
            if device.strip() == self.host.device:
                fields = figures.split()
                return int(fields[0]), int(fields[8])
        raise HardDay(f"{self.name}: no {self.host.device} on its host")

    def alive(self):
        """Whether it runs."""
        return self.process.poll() is None

    def log(self):
        """What it wrote to stderr so far."""
        return self.log_path.read_text(errors="replace")

    def story(self):
        """What it wrote until the peers were told to leave: who leaves first is gone for those who follow."""
        return self.log() if self.told is None else self.told

    @property
    def epoch(self):
        """The newest epoch that it reported."""
        line = self.last("arrived") or self.last("epoch")
        return -1 if line is None else line["epoch"]


class Crew:
    """Everybody who takes part in one scenario."""

    def __init__(self, lab, folder, potluck, minutes):
        self.lab, self.folder, self.potluck, self.minutes = lab, folder, potluck, minutes
        self.environment = {}
        self.everybody = []
        self.checks = []

    def start(self, name, host, *command):
        """Any command on a host."""
        running = Running(self, name, host, [str(word) for word in command])
        self.everybody.append(running)
        return running

    def peer(self, name, host, **options):
        """A training peer; options are those of peer.py, and `wait=False` does not wait until it is in the run."""
        wait = options.pop("wait", True)
        peer = self.start(name, host, sys.executable, HERE / "peer.py", *words({"run": "hard", **options}))
        if wait:
            peer.wait("ready")
        return peer

    def node(self, name, host, port=4001, relay=False, identity=None):
        """A bootstrap node at a fixed address; it and its token. `identity` is the name of the one whose key it has."""
        listen = [f"/ip4/0.0.0.0/tcp/{port}", f"/ip4/0.0.0.0/udp/{port}/quic-v1"]
        announce = [f"/ip4/{host.address}/tcp/{port}", f"/ip4/{host.address}/udp/{port}/quic-v1"]
        running = self.start(
            name, host, self.potluck, "node", "--run", "hard", "--json", "--no-port-mapping",
            "--identity", self.folder / f"{identity or name}.key", *(["--relay"] if relay else []),
            *(word for address in listen for word in ("--listen", address)),
            *(word for address in announce for word in ("--announce", address)),
        )  # fmt: skip
        return running, running.wait("text")["token"]

    def reference(self, **options):
        """The held-out loss of plain torch in one process: the mean over three orders of the data."""
        losses = []
        for seed in range(3):
            done = subprocess.run(
                [sys.executable, HERE / "peer.py", *words({**options, "seed": seed})],
                capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            losses.append(json.loads(done.stdout.splitlines()[-1])["held_out"])
        return sum(losses) / len(losses)

    def check(self, rule, measured, ok):
        """One line of the table."""
        self.checks.append((rule, str(measured), bool(ok)))

    def wait(self, what, condition, seconds=PATIENCE):
        """Wait until a condition over several processes holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                epochs = {peer.name: peer.epoch for peer in self.everybody if peer.alive()}
                raise HardDay(f"{what}: not in {seconds:.0f} s; epochs {epochs}; see {self.folder}")
            time.sleep(0.05)

    def arrive(self, peers, seconds=PATIENCE):
        """Wait until these peers hold still at the last epoch; nobody has left yet."""
        self.wait("the last epoch", lambda: all(peer.last("arrived") for peer in peers), seconds)

    def in_transfer(self, peer, kilobytes, seconds=PATIENCE, meanwhile=lambda: None):
        """Wait until this peer's host is in the middle of a transfer that began after a quiet moment: so much has moved.
        `meanwhile` is called all the time.

        Between rounds a peer sends and receives heartbeats only, some hundred bytes at a time. A transfer that is under
        way already may be the end of a round which others have finished.
        """
        before, calm, moved, deadline = sum(peer.traffic()), 0, 0, time.monotonic() + seconds
        while moved < kilobytes * 1000:
            if time.monotonic() > deadline:
                raise HardDay(f"{peer.name}: no transfer in {seconds:.0f} s; see {peer.log_path}")
            time.sleep(0.02)
            meanwhile()
            now = sum(peer.traffic())
            quiet = now - before < QUIET
            if quiet and calm < CALM:
                calm, moved = calm + 1, 0
            elif calm < CALM:
                calm = 0
            else:
                moved = 0 if quiet else moved + now - before
            before = now

    def until(self, peers, at_least, ahead=15):
        """Let these peers, who were started with ENDLESS epochs, train to one epoch, a little ahead; which it is.

        A last epoch that was fixed at the start may come before a busy machine has started the last peer.
        """
        last = max(at_least, *(peer.epoch + ahead for peer in peers))
        for peer in peers:
            peer.order(f"until {last}")
        return last

    def finish(self, peers, seconds=PATIENCE):
        """Wait until these peers hold still at the last epoch with equal weights, let them leave; what they ended with."""
        self.arrive(peers, seconds)
        try:
            self.wait("equal weights", lambda: len({peer.last("arrived")["hash"] for peer in peers}) == 1, 30)
        except HardDay:
            pass  # The rule says it, with the figures.
        for peer in peers:
            peer.told = peer.log()
        for peer in peers:
            peer.order("leave")
        ends = []
        for peer in peers:
            code = peer.end()
            if code:
                raise HardDay(f"{peer.name} ended with {code}; see {peer.log_path}")
            ends.append(peer.last("end"))
        return ends

    def close(self):
        """Stop whatever still runs, politely."""
        for running in self.everybody:
            if running.alive():
                running.signal(signal.SIGCONT)
                running.signal(signal.SIGTERM)
        for running in self.everybody:
            try:
                running.process.wait(20)
            except subprocess.TimeoutExpired:
                self.check("ends at SIGTERM", f"{running.name} had to be killed", False)
                running.signal(signal.SIGKILL)
                running.process.wait()
            running.close()


def words(options):
    """Options as a command line."""
    line = []
    for name, value in options.items():
        if value is True:
            line.append("--" + name.replace("_", "-"))
        elif value is not None and value is not False:
            line += ["--" + name.replace("_", "-"), str(value)]
    return line


def open_lab():
    """A network of its own."""
    return netlab.Lab()
