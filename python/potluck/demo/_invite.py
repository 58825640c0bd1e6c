"""The lines to paste: on another machine, to join a run, and on this one, to begin one."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def options_of(quick: bool, epochs: int | None) -> list[str]:
    """What every peer of a run must be told alike: the model's size, and where the schedule and the run end."""
    return [*(["--quick"] if quick else []), *([] if epochs is None else ["--epochs", str(epochs)])]


def joining_line(join: str, options: list[str]) -> str:
    """For another machine. Its Python is somewhere else, so only the name is portable."""
    return _quoted(["python", "-m", "potluck.demo", "--join", join, *options])


def hosting_line() -> str:
    """For this machine, with this Python, whether or not its environment is active in the shell."""
    return _quoted([_this_python(), "-m", "potluck.demo", "--host"])


def _this_python() -> str:
    # Without following links: a virtual environment's interpreter is often a link to the system's.
    here, found = Path(sys.executable), shutil.which("python")
    if found is not None and os.path.abspath(found) == str(here):
        return "python"
    try:
        return str(here.relative_to(Path.cwd()))
    except ValueError:
        return str(here)


def _quoted(words: list[str]) -> str:
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
