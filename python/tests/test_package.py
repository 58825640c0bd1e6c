"""Importing the package, and its manners."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import potluck


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_import_loads_neither_torch_nor_lightning() -> None:
    code = "import sys, potluck; print(sorted({'torch', 'lightning', 'numpy', 'asyncio'} & set(sys.modules)))"
    assert run(code).stdout.strip() == "[]"


def test_compressions_are_importable_without_torch() -> None:
    code = "import sys; from potluck import Float16Compression; Float16Compression(); print('torch' in sys.modules)"
    assert run(code).stdout.strip() == "False"


def test_every_public_name_exists() -> None:
    for name in potluck.__all__:
        assert getattr(potluck, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sever'"):
        potluck.Sever  # noqa: B018


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_refused_with_a_reason() -> None:
    code = """
import os, sys
from potluck import _core
node = _core.Node.local(_core.Hub())
child = os.fork()
if child == 0:
    try:
        _core.Node.local(_core.Hub())
    except RuntimeError as error:
        os._exit(7 if "after the fork" in str(error) else 8)
    os._exit(9)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run("import warnings; warnings.simplefilter('ignore')\n" + code).stdout.strip() == "7"
