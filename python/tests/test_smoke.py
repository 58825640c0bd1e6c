"""The workflow file: what it names exists, and the program that it runs on every platform works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import smoke_two_peers
import yaml
from lightning_support import environment

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
_WORD = re.compile(r"[\w./*@-]+")


def strings_in(value: Any) -> Iterator[tuple[str, str]]:
    """Every string of a parsed workflow, with the key that it stands under."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if isinstance(inner, str):
            yield str(key), inner
        else:
            yield from strings_in(inner)
    for inner in value if isinstance(value, list) else ():
        yield from strings_in(inner)


def paths_in(workflow: str) -> set[str]:
    """Paths of the repository that a workflow names in its settings and its commands."""
    tops = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - {"target"}
    named = set()
    for key, text in strings_in(yaml.safe_load(workflow)):
        if key in ("working-directory", "path"):
            named.add(text)
        elif key != "uses":
            words = _WORD.findall(text)
            named.update(w for w in words if w.split("/")[0] in tops and "/" in w)
            named.update(w for w in words if re.fullmatch(r"[\w-]+\.(py|toml|lock|md|sh)", w))
    # What the build makes is there only after it.
    return {path for path in named if "/dist/" not in path}


def test_every_path_of_the_workflows_exists() -> None:
    assert WORKFLOWS
    for workflow in WORKFLOWS:
        missing = [path for path in paths_in(workflow.read_text()) if not (ROOT / path).exists()]
        assert not missing, f"{workflow.name}: {missing}"


def test_the_smoke_test_and_the_command_are_built_and_run_on_every_platform() -> None:
    jobs = {name: job for w in WORKFLOWS for name, job in yaml.safe_load(w.read_text())["jobs"].items()}
    for job, what in (
        ("wheel", "python/tests/smoke_two_peers.py"),
        ("command", "target/release/potluck sim"),
    ):
        matrix = jobs[job]["strategy"]["matrix"]
        systems = matrix.get("os") or [case["os"] for case in matrix["include"]]
        kinds = {(system.split("-")[0], system.endswith("-arm")) for system in systems}
        assert kinds == {("ubuntu", False), ("ubuntu", True), ("macos", False), ("windows", False)}
        assert any(what in text for key, text in strings_in(jobs[job]) if key == "run")


def test_wheels_are_built_in_release_mode_for_the_machines_they_are_built_on_and_stay_small() -> None:
    (job,) = (yaml.safe_load(w.read_text())["jobs"]["wheel"] for w in WORKFLOWS if w.stem == "wheels")
    targets = {
        case["os"].rstrip("0123456789.-"): case["target"] for case in job["strategy"]["matrix"]["include"]
    }
    arm = targets.pop("ubuntu-24.04-arm")
    assert arm == "aarch64-unknown-linux-gnu" and targets == {
        "ubuntu": "x86_64-unknown-linux-gnu",
        "macos": "aarch64-apple-darwin",
        "windows": "x86_64-pc-windows-msvc",
    }
    (build,) = (step["with"] for step in job["steps"] if "maturin-action" in step.get("uses", ""))
    assert build["target"] == "${{ matrix.target }}" and "--release" in build["args"].split()
    assert any(text.startswith("test ") and "-lt 20000000" in text for _, text in strings_in(job))


def test_a_warning_fails_a_test_and_none_runs_for_ever(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings") == ["error"]
    assert 0 < float(pytestconfig.getini("timeout")) <= 300


def test_the_finder_of_paths_finds_them() -> None:
    text = """
    steps:
      - { uses: actions/checkout@v5, with: { working-directory: python } }
      - run: python python/tests/gone.py && cargo build -p potluck-cli > /dev/null
      - run: |
          pip install python/dist/*.whl -r gone.toml
          target/release/potluck
    """
    assert paths_in(text) == {"python", "python/tests/gone.py", "gone.toml"}


def test_two_peers_from_the_wheel_end_with_equal_weights() -> None:
    command = [sys.executable, smoke_two_peers.__file__]
    # In the peers, too.
    strict = environment(PYTHONWARNINGS="error")
    done = subprocess.run(command, env=strict, capture_output=True, text=True, timeout=290, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "equal weights" in done.stdout


def test_the_smoke_test_can_fail() -> None:
    good = {"began": 5, "epoch": 25, "digest": "ab" * 32, "sent": 9, "losses": [9.0] * 10 + [1.0] * 10}
    assert smoke_two_peers.problems(good, good) == []
    for changes, problem in (
        ({"digest": "cd" * 32}, "weights differ"),
        ({"epoch": 24}, "instead of 25"),
        ({"began": 0}, "not with the state of the first"),
        ({"sent": 0}, "sent nothing"),
        ({"losses": []}, "trained nothing"),
    ):
        found = smoke_two_peers.problems(good, {**good, **changes})
        assert len(found) == 1 and problem in found[0], json.dumps(found)
    flat = {**good, "losses": [9.0] * 20}
    assert any("did not fall" in problem for problem in smoke_two_peers.problems(flat, good))
