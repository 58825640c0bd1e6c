"""The demonstration: what it concludes from what happened, and one short run of all of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning_support import environment

from potluck.demo._report import report
from potluck.demo._scale import FULL, QUICK
from potluck.demo._story import PeerStory, Story
from potluck.demo._view import View

EPOCHS = 20


def told(**changes: Any) -> Story:
    """A story that went well, but for the changes."""
    story = Story(EPOCHS)
    for name, born, dies in (("peer A", 0, None), ("peer B", 0, 12), ("peer C", 5, None)):
        peer = story.peers[name] = PeerStory(name)
        for epoch in range(born, dies or EPOCHS):
            peer.take(
                {
                    "kind": "step",
                    "epoch": epoch + 1,
                    "loss": changes.get("loss", lambda e: 5.0 - 0.1 * e)(epoch),
                    "samples": 8 * (epoch - born + 1),
                    "peers": 2,
                    "at": float(epoch),
                    "bytes_sent": 1000 * epoch,
                    "bytes_uncompressed": 3000 * epoch,
                }
            )
        if dies:
            peer.killed_at = dies
            continue
        peer.take({"kind": "arrived", "epoch": EPOCHS})
        digest = changes.get("digests", {}).get(name, "ab" * 32)
        peer.take(
            {"kind": "end", "epoch": EPOCHS, "held_out": 3.0, "digest": digest, "samples": peer.samples}
        )
    return story


def test_a_good_story_has_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert told().verdict() == []
    assert report(told(), QUICK, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "weights are equal to the bit" in printed and "python -m potluck.demo --host" in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text())["problems"] == []


def test_the_plot_shows_epochs_that_overshoot_whole() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    from potluck.demo._plot import _contributions

    story = told()
    story.peers["peer A"].samples_in[3] = 10 * QUICK.target_batch_size
    figure, axes = pyplot.subplots()
    _contributions(axes, story, QUICK)
    assert axes.get_ylim()[1] > 11 * QUICK.target_batch_size
    pyplot.close(figure)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"loss": lambda epoch: 5.0 + 0.01 * epoch}, "the loss did not fall"),
        ({"loss": lambda epoch: float("nan")}, "the loss did not fall"),
        ({"digests": {"peer C": "cd" * 32}}, "the survivors' weights differ"),
        ({"digests": {"peer C": None}}, "no final weights from peer C"),
    ],
)
def test_a_bad_story_fails(changes: dict[str, Any], problem: str, tmp_path: Path, capsys: Any) -> None:
    assert any(problem in found for found in told(**changes).verdict())
    assert report(told(**changes), QUICK, tmp_path) == 1
    assert f"FAILED: {problem}" in capsys.readouterr().out


def test_samples_belong_to_the_epoch_in_which_they_were_taken() -> None:
    peer = PeerStory("peer A")
    for epoch, samples in ((0, 8), (0, 16), (1, 24), (1, 32)):
        peer.take({"kind": "step", "epoch": epoch, "loss": 1.0, "samples": samples, "peers": 1, "at": 0.0})
    assert dict(peer.samples_in) == {0: 24, 1: 8}


def test_a_plain_console_gets_plain_lines() -> None:
    out = io.StringIO()
    view = View(out)
    view.happened("peer A starts")
    for _ in range(3):
        view.draw(told())
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert text.count("epoch") == 1


def test_a_terminal_gets_bars() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    View(out).draw(told())
    assert "█" in out.getvalue() and "killed" in out.getvalue() and "33%" in out.getvalue()


def test_the_scale_has_both_kinds_of_tensors() -> None:
    from potluck.demo._model import NextByte

    for scale in (FULL, QUICK):
        sizes = [parameter.numel() for parameter in NextByte(scale).parameters()]
        assert min(sizes) < scale.size_threshold <= max(sizes)


def demo(*arguments: str, timeout: float) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "potluck.demo", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.timeout(300)
def test_the_whole_demonstration_in_small(tmp_path: Path) -> None:
    done = demo("--quick", "--output", str(tmp_path), timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    peers = results["peers"]
    assert peers["peer B"]["killed_at"] is not None and peers["peer A"]["digest"] == peers["peer C"]["digest"]
    assert peers["peer C"]["joined_at"] > 0 and peers["peer C"]["samples"] > 0
    assert results["loss"][-1][1] < 0.8 * results["loss"][0][1]
    assert all(peer["bytes_sent"] < 0.6 * peer["bytes_uncompressed"] for peer in peers.values())
    assert "python -m potluck.demo --join" in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_wrong_arguments_are_refused() -> None:
    done = demo("--epochs", "1", timeout=60)
    assert done.returncode == 2 and "at least 6" in done.stderr
