"""The type stubs say what the compiled module holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_stubs_match_the_compiled_module(tmp_path: Path) -> None:
    # The module needs nothing of torch, whose sources would take mypy most of a minute.
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy.stubtest", "potluck._core", "--mypy-config-file", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
