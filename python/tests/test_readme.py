"""What the README shows works as it stands there; what working from the repository needs is said."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import free_port
from lightning_support import environment

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    """Every code block of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def run(code: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """A program of a user, with warnings as errors unless they are the packages' own affair."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=cwd,
    )


def the_block_with(text: str) -> str:
    """The one Python block that holds this."""
    (found,) = [block for block in blocks("python") if text in block]
    return found


def test_every_python_block_is_tried_here() -> None:
    tried = (
        "from potluck.lightning import HivemindStrategy\n",
        'identity_path="owner.key"',
        'identity_path="peer.key"',
        "optimizer = potluck.Optimizer(",
    )
    assert sorted(blocks("python")) == sorted(the_block_with(text) for text in tried)


def test_training_without_lightning(tmp_path: Path) -> None:
    done = run(the_block_with("optimizer = potluck.Optimizer("), tmp_path, PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    # Whoever runs it alone has 4 epochs of 256 samples out of 32 batches of 32.
    assert re.fullmatch(r"join with: potluck1\w+\nepoch of the run: 4\n", done.stdout), done.stdout


def test_the_trainer_with_the_strategy(tmp_path: Path) -> None:
    block = the_block_with("from potluck.lightning import HivemindStrategy\n")
    for imports in ("lightning.pytorch", "pytorch_lightning"):
        assert f"from {imports} import Trainer" in block
    other = block.replace("from lightning.pytorch import Trainer ", "from pytorch_lightning import Trainer ")
    assert other != block
    for program in (block, other):
        done = run(f"{program}\nprint(trainer.strategy.dht.peer_id)", tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("12D3KooW"), done.stderr


def test_a_run_for_the_invited_only(tmp_path: Path) -> None:
    """The owner's key, the first machine and another one, as written."""
    (line,) = [line for block in blocks("console") for line in block.splitlines() if "owner.key" in line]
    code = re.fullmatch(r"\$ python -c '(.*)'", line).group(1)
    made = run(code, tmp_path)
    owner = made.stdout.strip()
    assert owner.startswith("12D3KooW") and (tmp_path / "owner.key").exists(), made.stderr
    first, other = the_block_with('identity_path="owner.key"').replace("12D3KooW…", owner).splitlines()
    program = f"""
import os, re
from potluck.lightning import HivemindStrategy
first = {first}
os.environ["POTLUCK_TOKEN"] = re.search(r"token='(potluck1\\w+)'", first.joining_text).group(1)
other = {other}
print(first.dht.peer_id, other.dht.peer_id)
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    peers = done.stdout.split()
    assert peers[0] == owner != peers[1]


def test_a_first_machine_that_comes_back_by_the_same_command(tmp_path: Path) -> None:
    """Its name and port are those of the line before; that it finds the run: test_lightning_manners."""
    port = free_port()
    block = the_block_with('identity_path="peer.key"').replace("4001", port)
    program = (
        f"from potluck.lightning import HivemindStrategy\nprint({block.strip()}.dht.get_visible_maddrs()[0])"
    )
    first, again = run(program, tmp_path), run(program, tmp_path)
    assert first.stdout == again.stdout and re.search(rf"/tcp/{port}/p2p/12D3KooW\w+\n$", first.stdout), (
        first.stderr
    )


def test_every_path_of_the_readme_exists() -> None:
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
    named = set(re.findall(r"(?:examples|docs|crates|python|tools)/[\w./-]*\w", README))
    assert "examples/float16.py" in named and "SECURITY.md" in linked
    assert not [path for path in linked | named if not (ROOT / path).exists()]


def test_the_install_without_make_names_what_the_wheel_offers() -> None:
    assert 'python -m pip install "./python[lightning]"' in README
    assert "lightning" in metadata.metadata("potluck").get_all("Provides-Extra")


def test_the_wheel_is_for_the_python_that_the_readme_names() -> None:
    """By its metadata, by the interface that it is built for, and by the language that it is written in."""
    (minor,) = re.findall(r"The wheel itself runs on Python 3\.(\d+) and newer", README)
    assert metadata.metadata("potluck")["Requires-Python"] == f">=3.{minor}"
    assert f'"abi3-py3{minor}"' in (ROOT / "Cargo.toml").read_text()
    sources = sorted((ROOT / "python" / "potluck").rglob("*.py"))
    assert len(sources) > 50
    for source in sources:
        ast.parse(source.read_text(), source.name, feature_version=(3, int(minor)))


def test_the_versions_of_lightning_are_those_that_make_test_installs() -> None:
    (oldest, newest) = re.search(
        r"`make test` trains with (\d+\.\d+\.\d+) and with (\d+\.\d+)", README
    ).groups()
    locks = {
        name: (ROOT / "python" / name).read_text() for name in ("oldest-lightning.lock", "requirements.lock")
    }
    for package in ("lightning", "pytorch-lightning"):
        assert f"\n{package}=={oldest}\n" in locks["oldest-lightning.lock"]
        assert f"\n{package}=={newest}." in locks["requirements.lock"]
    assert (
        oldest == "2.2.0"
        and 'lightning = ["torch>=2.2", "lightning>=2.2"]' in (ROOT / "python/pyproject.toml").read_text()
    )
    (recipe,) = re.findall(r"^test:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M)
    assert all(part in recipe for part in ("test-rust", "test-decoders", "test-python"))
    (recipe,) = re.findall(r"^test-python:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.M)
    assert "tools/oldest-lightning" in recipe


def make(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """A target of the Makefile."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    command = ["make", "-C", str(ROOT), *arguments]
    return subprocess.run(
        command, env=environment(**extra), capture_output=True, text=True, timeout=60, check=False
    )


def pretended(version: tuple[int, int, int], at: Path) -> Path:
    """A Python that says that it is another version."""
    say = f"import sys; sys.version_info = {version}; exec(sys.argv.pop(1))"
    at.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{say}" "$@"\n')
    at.chmod(0o755)
    return at


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_python_that_is_too_old_is_refused_in_one_sentence(tmp_path: Path) -> None:
    python = pretended((3, 10, 4), tmp_path / "python3.10")
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    said = [line for line in done.stderr.splitlines() if line.startswith("potluck: ")]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    assert f"needs Python 3.11 or newer, and {python} is 3.10.4" in said[0]
    assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "bash").symlink_to(shutil.which("bash"))
    script = str(ROOT / "tools" / "check-needs")
    done = subprocess.run(
        [script, "python3"], env={"PATH": str(tools)}, capture_output=True, text=True, check=False
    )
    said = done.stderr.splitlines()
    assert done.returncode == 1 and len(said) == 3, said
    assert "Python 3.11" in said[0] and "Rust" in said[1] and "C compiler" in said[2]
    good = subprocess.run([script, sys.executable], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")


def test_the_locked_versions_run_on_the_python_that_is_asked_for() -> None:
    """Neither more nor less: the newest that any of them needs is what the documents and the check name."""
    lock = (ROOT / "python" / "requirements.lock").read_text()
    needed = []
    for name in re.findall(r"^([\w.-]+)==", lock, flags=re.M):
        try:
            asked = metadata.metadata(name).get("Requires-Python") or ""
        except metadata.PackageNotFoundError:
            continue  # another system's
        needed += [int(minor) for minor in re.findall(r">=\s*3\.(\d+)", asked)]
    assert max(needed) == 11
    for document in ("README.md", "CONTRIBUTING.md", "tools/check-needs"):
        assert "Python 3.11 or newer" in (ROOT / document).read_text(), document
