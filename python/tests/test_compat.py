"""The opt-in distribution: hivemind's import names give potluck's own classes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from lightning_support import environment

COMPAT = Path(__file__).resolve().parents[1] / "compat"


def run(program: str) -> str:
    """Run with the compat distribution importable; stdout."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environment(PYTHONPATH=str(COMPAT / "src")),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_and_modules_are_potlucks_own() -> None:
    run(
        """
import hivemind, potluck
from hivemind import DHT, Optimizer, Float16Compression, Uniform8BitQuantization
from hivemind.optim.power_sgd_averager import PowerSGDGradientAverager
import hivemind.compression
from hivemind.utils import get_dht_time
import potluck.optim.power_sgd_averager as own
assert DHT is potluck.DHT and Optimizer is potluck.Optimizer
assert PowerSGDGradientAverager is own.PowerSGDGradientAverager
assert hivemind.compression is potluck.compression
assert hivemind.compression.Float16Compression is Float16Compression
assert potluck.compression.__spec__.name == "potluck.compression"
"""
    )


def test_importing_it_does_not_import_torch() -> None:
    run("import sys, hivemind; assert 'torch' not in sys.modules and 'lightning' not in sys.modules")


def test_lightning_hivemind() -> None:
    run(
        """
import warnings
warnings.simplefilter("ignore")
from lightning_hivemind.strategy import HivemindStrategy
from potluck.lightning import HivemindStrategy as own
assert HivemindStrategy is own
"""
    )


def test_what_is_missing_is_said() -> None:
    run(
        """
import hivemind
for statement, words in (
    ("import hivemind.moe", "potluck.moe"),
    ("hivemind.RemoteExpert", "provided by potluck"),
):
    try:
        exec(statement)
    except (ImportError, AttributeError) as error:
        assert words in str(error), error
    else:
        raise SystemExit(f"{statement} succeeded")
"""
    )


def test_it_builds_as_a_distribution(tmp_path: Path) -> None:
    source = tmp_path / "compat"
    for path in [COMPAT / "pyproject.toml", COMPAT / "README.md", *(COMPAT / "src").rglob("*.py")]:
        target = source / path.relative_to(COMPAT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(source),
        ],
        env=environment(PIP_DISABLE_PIP_VERSION_CHECK="1"),
        check=True,
        timeout=100,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"hivemind/__init__.py", "lightning_hivemind/strategy.py"} <= set(names)
