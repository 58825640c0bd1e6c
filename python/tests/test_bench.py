"""The benchmark's own arithmetic, and its workers: it is run rarely, and must run when it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).resolve().parents[2] / "bench"


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


table, trace = _module("table"), _module("trace")


def _step(number: int, called: float, done: float, epoch: int | None = None, loss: float = 1.0) -> dict:
    return {
        "step": number,
        "epoch": number if epoch is None else epoch,
        "called": called,
        "done": done,
        "samples": 8,
        "loss": loss,
    }


def test_an_epoch_lasts_from_the_call_that_fills_it_to_the_last_peer_with_the_new_weights() -> None:
    first = [_step(0, 1, 1), _step(0, 2, 5, epoch=1, loss=3.0), _step(1, 6, 7, epoch=2), _step(2, 8, 8)]
    second = [_step(0, 1.5, 1.6), _step(0, 3, 5.5, epoch=1), _step(1, 6.5, 9, epoch=2), _step(2, 9.5, 9.5)]
    found = trace.epochs([first, second], target=24)
    # The third step of 8 samples was called at 2; the second epoch had 16 of 24 samples and is left out.
    assert [(e.number, e.reached, e.applied, e.samples, e.loss) for e in found] == [(0, 2, 5.5, 32, 1.5)]
    found = trace.epochs([first, second], target=16)
    assert trace.overheads(found) == [2.5]


def test_a_loss_is_reached_when_it_is_the_mean_of_three_epochs() -> None:
    found = [trace.Epoch(i, i, i + 0.5, 64, loss) for i, loss in enumerate((4.0, 1.0, 4.0, 3.0, 2.0, 1.0))]
    assert trace.reaches(found, 3.0).number == 2
    assert trace.reaches(found, 2.9).number == 3
    assert trace.reaches(found, 1.0) is None


def test_progress_counts_shared_steps_whoever_makes_them() -> None:
    # An epoch each 2 s; the first peer is gone after the second epoch.
    dead = [_step(0, 0, 0), _step(0, 2, 2, epoch=1), _step(1, 4, 4, epoch=2)]
    alive = [_step(n, 2 * n + 1.9, 2 * n + 2.1, epoch=n + 1) for n in range(6)]
    assert abs(trace.progress([dead, alive], 100, 3.0, 11.0) - 50) < 1
    # A peer that stands still for the second half makes half of it.
    assert abs(trace.progress([dead, alive[:3], [_step(2, 20, 20.1, epoch=3)]], 100, 2.0, 10.0) - 25) < 2


def test_a_figure_that_is_missing_is_missed_and_one_of_the_other_system_gives_no_verdict() -> None:
    assert table.faster("a", "b", 1.0, 4.0, "hivemind", 4).holds is True
    assert table.faster("a", "b", 1.0, 3.9, "hivemind", 4).holds is False
    assert table.faster("a", "b", None, 4.0, "hivemind", 4).holds is False
    assert table.faster("a", "b", 1.0, None, "hivemind", 4).holds is None
    assert table.share("a", "b", 0.89, 0.9).holds is False
    assert table.share("a", "b", 1.01, at_most=1.02).holds is True
    assert table.share("a", "b", None, 0.9).holds is False
    assert table.share("a", "b", 0.89, 0.9, note="measured").because("slow").note == "missed: slow; measured"
    assert table.share("a", "b", 0.91, 0.9, note="measured").because("slow").note == "measured"
    lines = table.text([table.faster("a", "what", 2.0, 4.0, "hivemind", 4)]).splitlines()
    assert lines[2].split() == ["a", "what", "2", "s", "4", "(hivemind)", "2", ">=", "4x", "NO"]


def test_every_worker_still_runs(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    names = ["codecs", "allreduce", "idle", "dht"]
    done = subprocess.run(
        [sys.executable, BENCH / "run.py", "--quick", "--alone", "--output", output, "--only", *names],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    suites = json.loads(output.read_text())["suites"]
    assert list(suites) == names
    for name in names:
        assert suites[name]["rows"]
        for row in suites[name]["rows"]:
            assert row["potluck"] is not None and row["potluck"] > 0, (name, row["note"])
