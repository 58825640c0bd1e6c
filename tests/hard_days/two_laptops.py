"""Day 3: two laptops, and the README's quickstart executed word by word on each of them, in a fresh clone and a fresh
environment.

The commands and what they print are read from README.md. What pip would download was downloaded before: the libraries of the
lock file are linked into each fresh environment, and cargo keeps its target folder.
"""

import os
import re
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
    """A folder with nothing in it, a home directory with nothing in it, and a terminal on a host."""

    def __init__(self, crew, name):
        self.crew, self.name, self.host = crew, name, crew.lab.public(name)
        self.folder = crew.folder / name
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
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
        self.process = subprocess.Popen(
            self.host.command("bash", "-c", f"{self.activate}\n{line}"),
            cwd=self.folder / "potluck",
            env=self.environment,
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

    def close(self):
        """Whatever still runs in the terminal."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


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
    ended = second.ctrl_c()
    crew.check("Ctrl-C once ends it within 5 s", f"{ended:.1f} s", ended < 5)
    alone = first.wait(r"peers=1\.0\S*, epoch_of_run=(\d+)", since=len(first.said))
    first.wait(rf"peers=1\.0\S*, epoch_of_run={int(alone.group(1)) + 1}\b")
    crew.check("the other goes on", f"beyond epoch {alone.group(1)}", True)
    ended = first.ctrl_c()
    crew.check("so does it", f"{ended:.1f} s", ended < 5)


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
