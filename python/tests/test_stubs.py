"""The type stubs say what the compiled module holds."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
def test_stubs_match_the_compiled_module() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "potluck._core"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
