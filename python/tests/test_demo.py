"""The demonstration: what it concludes from what happened, and one short run of all of it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pasted import Peer

import potluck.demo.__main__ as program
from potluck.demo._report import report
from potluck.demo._scale import FULL, QUICK, Scale
from potluck.demo._story import PeerStory, Story
from potluck.demo._view import View

EPOCHS = 20


def told(**changes: Any) -> Story:
    """A story that went well, but for the changes."""
    story = Story(EPOCHS, join_epoch=4)
    late, killed = changes.get("late", 5), changes.get("killed", 12)
    for name, born, dies in (("peer A", 0, None), ("peer B", 0, killed), ("peer C", late, None)):
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
    assert "weights are equal to the bit" in printed
    shares = re.findall(r"^(peer \w) +[\d-]+(?: killed)? +\d+ +(\d+%)", printed, flags=re.M)
    assert shares == [("peer A", "43%"), ("peer B", "26%"), ("peer C", "32%")]
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
        ({"killed": None}, "nobody was killed"),
        ({"late": 0}, "nobody joined the running training"),
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
    assert re.search(
        r"epoch +20/20  peer A: loss 3\.100, 2 peers, 8 samples/s, sent 0\.0 MB \(33% of raw\)\n", text
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal()
    story = told()
    story.peers["peer A"].bytes_sent, story.peers["peer A"].bytes_uncompressed = 1_500_000, 5_000_000
    View(out).draw(story)
    header, first, second, third = out.getvalue().splitlines()[-4:]
    assert header.split() == ["epoch", "peers", "loss", "samples/s", "sent", "of", "raw"]
    assert re.fullmatch(r"peer A +█+ +20/20 +2 +3\.100 +8\.\d +1\.5 MB +30%", first), first
    assert re.fullmatch(r"peer B +█+░+ +12/20 +killed", second), second
    assert re.fullmatch(r"peer C +█+ +20/20 +2 +3\.100 +8\.\d +0\.0 MB +33%", third), third


def test_the_picture_shows_both_losses_the_contributions_and_the_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from potluck.demo._plot import draw

    story, drawn = told(), []
    story.plain = PeerStory("plain", joined_at=0)
    for epoch in range(EPOCHS):
        step = {"epoch": epoch + 1, "loss": 4.0 - 0.1 * epoch, "samples": 64 * (epoch + 1), "peers": 1}
        story.plain.take({"kind": "step", "at": float(epoch), **step})
    monkeypatch.setattr(Figure, "savefig", lambda figure, _path: drawn.append(figure))
    draw(story, QUICK, tmp_path / "loss.png")
    losses, contributions, bytes_sent = drawn[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert curves["one plain process"] == pytest.approx([4.0 - 0.1 * epoch for epoch in range(EPOCHS)])
    assert curves["potluck, all peers"] == [loss for _, loss in story.curve()]
    marks = {text.get_text() for text in losses.texts}
    assert marks == {"peer C\njoins", "peer B\nis killed"}
    assert contributions.get_title(loc="left").startswith("Samples per epoch")
    assert len(contributions.collections) == len(story.peers)
    widths = [bar.get_width() for bar in bytes_sent.patches]
    peers = story.peers.values()
    assert widths == [peer.bytes_uncompressed / 1e6 for peer in peers] + [
        peer.bytes_sent / 1e6 for peer in peers
    ]
    assert all("33%" in text.get_text() for text in bytes_sent.texts) and len(bytes_sent.texts) == 3


@pytest.mark.parametrize(("columns", "bar"), [(200, 24), (80, 19), (60, 6)])
def test_the_bars_fit_the_terminal(columns: int, bar: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a terminal wraps takes two lines, and would not be erased."""
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    View(out).draw(told())
    drawn = out.getvalue().splitlines()[1:]
    assert len(drawn) == 4 and max(map(len, drawn)) < columns
    assert drawn[1].count("█") == bar
    assert drawn[1].endswith("33%") == (columns >= 80)


def bytes_per_value(scale: Scale) -> float:
    """What the rule of the demonstration comes to: large tensors in 8 bits, small ones in 16."""
    from potluck.demo._model import NextByte

    sizes = [parameter.numel() for parameter in NextByte(scale).parameters()]
    return sum(size * (1 if size >= scale.size_threshold else 2) for size in sizes) / sum(sizes)


def test_both_kinds_of_averages_are_compressed_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from potluck import deserialize_torch_tensor
    from potluck.compression import CompressionInfo
    from potluck.demo import _peer
    from potluck.demo._model import NextByte

    class Strategy:
        dht, joining_text = None, ""

        def __init__(self, **arguments: Any) -> None:
            self.arguments = arguments

    monkeypatch.setattr(_peer, "HivemindStrategy", Strategy)
    for scale in (FULL, QUICK):
        arguments = _peer._strategy(scale, None).arguments
        kinds = set()
        for name in ("grad_compression", "state_averaging_compression"):
            for parameter in NextByte(scale).parameters():
                values = parameter.detach()
                message = arguments[name].compress(values, CompressionInfo.from_tensor(values))
                large = values.numel() >= scale.size_threshold
                kinds.add((large, message.compression))
                # A code book of 256 values comes with the 8 bits.
                extra = len(message.buffer) - values.numel() * (1 if large else 2)
                assert 0 <= extra < 1100, (name, values.shape)
                assert torch.allclose(deserialize_torch_tensor(message), values, atol=0.1)
        assert len(kinds) == 2, "large and small tensors each have their own scheme"


def operations(scale: Scale) -> float:
    """Of one training: six for each parameter and byte of text, and those of attention."""
    from potluck.demo._model import NextByte

    parameters = sum(parameter.numel() for parameter in NextByte(scale).parameters())
    text = scale.epochs * scale.target_batch_size * scale.context
    return text * (6 * parameters + 12 * scale.layers * scale.width * scale.context)


def test_two_cores_do_what_is_planned_in_less_than_five_minutes() -> None:
    """Counted, as no test asks a clock: the peers share the cores, then the plain process has one for itself."""
    each_second = 20e9  # of a core; one with AVX-512 was measured at 72 to 83, with this model and batch
    start = 30.0  # Python, torch and Lightning, four times
    assert start + (1 / 2 + 1) * operations(FULL) / each_second < 300
    assert operations(QUICK) < operations(FULL) / 20, "it is for tests"


def test_the_text_is_pythons_language_reference() -> None:
    from potluck.demo import _corpus

    train, held_out = _corpus.load(FULL.context)
    text = bytes(train._text.tolist() + held_out._text.tolist()).decode()
    assert len(text) > 200_000 and 'The "with" statement' in text


@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_whole_demonstration_in_small_and_its_last_line_on_another_machine(
    starts: Callable[..., Peer], machines: list[list[str]], tmp_path: Path
) -> None:
    whole = starts("python -m potluck.demo --quick --stay 240 --output .", machines[0])
    line = whole.wait_for(r"same model again.*\n.*paste this.*\n  (.*)\n").group(1)
    joiner = starts(line, machines[1])
    joiner.wait_for(r"peers=2\.")
    whole.wait_for(r"\d\d:\d\d:\d\d  2 peers in epoch \d+, loss")
    assert joiner.ctrl_c() == 0
    whole.wait_for(r"  alone in epoch \d+, loss")
    assert whole.ctrl_c() == 0, "it stayed for others, and that is no failure"
    said = whole.said
    # Longer than a joiner needs to start on a busy machine.
    assert "until it has been alone for 240 s. To train together" in said, said
    assert "batch/s" not in said and "it/s" not in said, "no bars in a file"
    assert re.search(r"at any time:\n  python -m potluck.demo --host\n$", said)
    results = json.loads((tmp_path / "results.json").read_text())
    peers = results["peers"]
    assert peers["peer B"]["killed_at"] is not None and peers["peer A"]["digest"] == peers["peer C"]["digest"]
    assert peers["peer C"]["joined_at"] > 0 and peers["peer C"]["samples"] > 0
    assert results["loss"][-1][1] < 0.8 * results["loss"][0][1]
    # Neither all in 8 bits nor all in 16; code books and headers are on top.
    expected = bytes_per_value(QUICK) / 4
    assert 0.25 + 0.03 < expected < 0.5 - 0.03
    for peer in peers.values():
        assert expected <= peer["bytes_sent"] / peer["bytes_uncompressed"] < expected + 0.03
    plain = results["plain"]
    assert plain["digest"] and plain["epoch"] == results["epochs"] == len(results["plain_loss"])
    assert results["plain_loss"][-1][1] < 0.8 * results["plain_loss"][0][1]
    assert re.search(r"in one plain process \([+-]\d+\.\d%\)", said)
    assert re.search(
        r"epoch +\d+/40  peer A: loss .* \d+ peers, \d+ samples/s, sent .* \(\d+% of raw\)", said
    )
    assert re.search(r"python -m potluck.demo --join potluck1\w+ --quick --epochs 40\n", said)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [("--epochs=1", "at least 6"), ("--stay=-1", "0 or more"), ("--stay=nan", "0 or more")],
)
def test_wrong_arguments_are_refused(wrong: str, reason: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as refused:
        program.main([wrong])
    assert refused.value.code == 2 and reason in capsys.readouterr().err
