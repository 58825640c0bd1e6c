"""The next patch version of potluck, made out of the one that is installed.

A release that only raises the patch number differs in nothing but the places where the compiler has put that number. Here
they are overwritten in copies of the command and of the wheel, which takes a second where compiling both takes minutes.
Whether that was all of them is for the caller to see: what the programs say of themselves, and what they tell others.
"""

import shutil
import sys
from pathlib import Path

from crew import HERE, HardDay, words

import potluck

INSTALLED = Path(potluck.__file__).parent


def after(version):
    """The next patch version; of the same length, so that nothing moves."""
    front, patch = version.rsplit(".", 1)
    found = f"{front}.{int(patch) + 1}"
    if len(found) != len(version):
        raise HardDay(f"a version after {version} is longer and does not fit in its place")
    return found


class Newer:
    """Copies of everything that a machine has of potluck."""

    def __init__(self, crew):
        self.was, self.folder = potluck.__version__, crew.folder / "newer"
        self.version, self.crew = after(self.was), crew
        shutil.copytree(INSTALLED, self.folder / "potluck", ignore=shutil.ignore_patterns("__pycache__"))
        self.command = self.folder / "bin" / "potluck"
        self.command.parent.mkdir()
        shutil.copy(crew.potluck, self.command)
        for binary in (self.command, *(self.folder / "potluck").glob("_core*.so")):
            code = binary.read_bytes()
            binary.write_bytes(code.replace(self.was.encode(), self.version.encode()))

    def peer(self, name, host, **options):
        """A training peer of this version, as `Crew.peer` starts one of the installed version."""
        peer = self.crew.start(
            name, host, "env", f"PYTHONPATH={self.folder}", sys.executable, HERE / "peer.py",
            *words({"run": "hard", **options}),
        )  # fmt: skip
        peer.wait("ready")
        return peer
