"""Day 3: two laptops, and the README's quickstart executed word by word on each of them, in a fresh clone and a fresh
environment.

The commands and what they print are read from README.md. What pip would download was downloaded before: the libraries of the
lock file are linked into each fresh environment, and cargo keeps its target folder.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time

import rules
from crew import PATIENCE, ROOT, HardDay

TITLE = "two laptops"
PLACEHOLDER = "<this repository>"


def blocks(section):
    """The console blocks of a section of the README: (commands, what they print) for each."""
    text = (ROOT / "README.md").read_text()
    body = re.search(rf"^## {section}\n(.*?)^##", text, re.M | re.S).group(1)
    for block in re.findall(r"^```console\n(.*?)^```", body, re.M | re.S):
        lines = block.splitlines()
        yield (
            [line[2:] for line in lines if line.startswith("$ ")],
            [line for line in lines if not line.startswith("$ ")],
        )


class Laptop:
    """A folder with nothing in it, a home directory with nothing in it, and a terminal on a host.

    It has temporary files and shared memory of its own, and is one of the crew's processes: what it leaves is counted.
    """

    killed = False

    def __init__(self, crew, name):
        self.crew, self.name, self.host = crew, name, crew.lab.public(name)
        self.folder = crew.folder / name
        self.home, self.private = self.folder / "home", self.folder / "tmp"
        self.shared = self.folder / "shm"
        for folder in (self.home, self.private, self.shared):
            folder.mkdir(parents=True)
        self.said, self.process = "", None
        kept = {
            key: os.environ[key] for key in ("PATH", "LANG", "CARGO_HOME", "RUSTUP_HOME") if key in os.environ
        }
        user = os.path.expanduser("~")
        # The toolchain is installed for the machine; everything else of this home is new.
        self.environment = {
            "CARGO_HOME": f"{user}/.cargo",
            "RUSTUP_HOME": f"{user}/.rustup",
            **kept,
            "HOME": str(self.home),
            "CARGO_TARGET_DIR": str(ROOT / "target"),
            "OMP_NUM_THREADS": "1",
        }

    def install(self, commands):
        """The first block: clone, build, activate."""
        clone, *others = commands
        if clone.count(PLACEHOLDER) != 1:
            raise HardDay(f"README: {clone} does not name {PLACEHOLDER}")
        self.shell(clone.replace(PLACEHOLDER, str(ROOT)), self.folder)
        self.libraries(self.folder / "potluck")
        for command in others:
            self.shell(command, self.folder / "potluck")
        self.activate = others[-1]

    def shell(self, command, where):
        """One command of the user's."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=where,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        if done.returncode:
            raise HardDay(f"{self.name}: `{command}` failed: {done.stderr.strip()[-300:]}")

    @staticmethod
    def libraries(clone):
        """A new virtual environment with the libraries of the lock file, as `make setup` would leave it."""
        subprocess.run(["python3", "-m", "venv", clone / ".venv"], check=True)
        (ours,) = (ROOT / ".venv/lib").glob("python3*/site-packages")
        (theirs,) = (clone / ".venv/lib").glob("python3*/site-packages")
        shutil.rmtree(theirs)
        shutil.copytree(ours, theirs, copy_function=os.link, ignore=shutil.ignore_patterns("potluck*"))
        shutil.copy2(ROOT / ".venv/bin/maturin", clone / ".venv/bin")
        (clone / ".venv/.installed").touch()

    def type(self, line):
        """A line in the terminal, in the clone, with the environment activated."""
        # What `ip netns exec` runs has mounts of its own.
        mount = f"mount --bind {shlex.quote(str(self.shared))} /dev/shm || exit"
        # torch and matplotlib fill these folders when they are imported; what is looked for are files of potluck.
        others = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.crew.folder / "torch"),
            "MPLCONFIGDIR": str(self.crew.folder / "plots"),
        }
        self.before = self.files()
        self.crew.everybody.append(self)
        self.process = subprocess.Popen(
            self.host.command("bash", "-c", f"{mount}\n{self.activate}\n{line}"),
            cwd=self.folder / "potluck",
            env={**self.environment, "TMPDIR": str(self.private), **others},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while piece := self.process.stdout.read1(1 << 16):
            self.said += piece.decode(errors="replace")
            (self.crew.folder / f"{self.name}.log").write_text(self.said)

    def wait(self, pattern, since=0, seconds=PATIENCE):
        """Until this is on the screen."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.said[since:])):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise HardDay(f"{self.name}: {pattern} is not on the screen: {self.said[-200:]!r}")
            time.sleep(0.05)
        return found

    def ctrl_c(self):
        """Once, to everything in the terminal, as a terminal does; how long the end takes."""
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.close()
            raise HardDay(f"{self.name} does not end at Ctrl-C") from None
        return time.monotonic() - began

    def files(self):
        """Everything in its home, its folder for temporary files and its shared memory."""
        return {path for folder in (self.home, self.private, self.shared) for path in folder.rglob("*")}

    def left(self):
        """A rule: nothing of the program is there any more, in the terminal or on the disk."""
        left = sorted(str(path.relative_to(self.folder)) for path in self.files() - self.before)
        listed = subprocess.run(
            ["ip", "netns", "pids", self.host.namespace], capture_output=True, text=True, check=True
        )
        processes = listed.stdout.split()
        self.crew.check(
            f"left on {self.name} after Ctrl-C (home, TMPDIR, /dev/shm)",
            f"{len(left)} files {left[:3] or ''}, {len(processes)} processes",
            not left and not processes,
        )

    def log(self):
        """All that was on the screen."""
        return self.said

    story = log

    def alive(self):
        """Whether something runs in the terminal."""
        return self.process is not None and self.process.poll() is None

    @property
    def epoch(self):
        """What the progress bar said last."""
        shown = re.findall(r"epoch_of_run=(\d+)", self.said)
        return int(shown[-1]) if shown else -1

    def signal(self, number):
        """To everything in the terminal."""
        os.killpg(self.process.pid, number)

    def close(self):
        """Whatever still runs in the terminal."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def status(crew, laptop, token):
    """The run as the `potluck` command on this laptop shows it."""
    done = subprocess.run(
        laptop.host.command(crew.potluck, "status", token, "--json"),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def equal_weights(crew, laptop, token):
    """The program prints no weights; but when they are to be averaged and every bit is equal, that round says so."""
    first, last = {}, {}

    def equal():
        now = status(crew, laptop, token)
        if len(now["peers"]) == 2:
            before = first.setdefault(now["peer"], now)
            last.update(now, more=now["rounds_unchanged"] - before["rounds_unchanged"])
        return last.get("more", 0) >= 2

    crew.wait("rounds of two equal states", equal)
    crew.check(
        "weights of both equal bit for bit",
        f"in {last['more']} rounds, the last before epoch {last['epoch']}",
        last["more"] >= 2,
    )


def gone(crew, laptop, now, met):
    """A rule: who has left is named once, as having left and not as lost."""
    left = [entry["peer"] for entry in now["left"]]
    screen = re.findall(r"peer (\w+) has left", laptop.said)
    faults = {kind: count for kind, count in now["faults"].items() if count}
    crew.check(
        "the one that has left is named once",
        f"{len(left)} in the status, {len(screen)} on the screen, faults {faults or 'none'}",
        len(left) == 1 and set(left) < met and len(screen) <= 1 and not faults,
    )


def train(crew, first, second, commands, printed):
    """The second block: run, paste, Ctrl-C."""
    (command,) = commands
    first.type(command)
    announced, template = printed
    pattern = r"\n( *" + re.escape(template.strip()).replace("…", r"\S+") + r")\r?\n"
    pasted = first.wait(re.escape(announced) + r"\r?" + pattern).group(1)
    crew.check("prints what the README says", template.strip(), True)
    second.type(pasted)
    began = time.monotonic()
    second.wait("peers=")
    for laptop in (first, second):
        laptop.wait(r"peers=2")
    took = time.monotonic() - began
    crew.check(
        "both progress bars show peers=2", f"{took:.0f} s after pasting, torch's import included", True
    )
    for laptop in (first, second):
        laptop.wait(r"peers=2\S*, epoch_of_run=[1-9]")
    token = re.search(r"POTLUCK_TOKEN=(\S+)", pasted).group(1)
    equal_weights(crew, first, token)
    met = {entry["peer"] for entry in status(crew, first, token)["peers"]}
    ended = second.ctrl_c()
    crew.check("Ctrl-C once ends it within 5 s", f"{ended:.1f} s", ended < 5)
    second.left()
    alone = first.wait(r"peers=1\.0\S*, epoch_of_run=(\d+)", since=len(first.said))
    first.wait(rf"peers=1\.0\S*, epoch_of_run={int(alone.group(1)) + 1}\b")
    crew.check("the other goes on", f"beyond epoch {alone.group(1)}", True)
    gone(crew, first, status(crew, first, token), met)
    ended = first.ctrl_c()
    crew.check("so does it", f"{ended:.1f} s", ended < 5)
    first.left()


def play(crew):
    """Both laptops, side by side."""
    install, run = list(blocks("Two machines"))[:2]
    laptops = [Laptop(crew, name) for name in ("laptop0", "laptop1")]
    try:
        for laptop in laptops:
            laptop.install(install[0])
        train(crew, *laptops, *run)
    finally:
        for laptop in laptops:
            laptop.close()
            found = rules.TROUBLE.search(laptop.said)
            crew.check(f"no traceback on {laptop.name}", found.group() if found else "none", not found)
            shutil.rmtree(laptop.folder / "potluck/.venv", ignore_errors=True)
