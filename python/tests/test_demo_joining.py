"""The demonstration across machines: the lines that it prints are pasted as they are, and Ctrl-C ends it politely."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_support import on_machine
from test_examples import Peer

import potluck.demo.__main__ as program
from potluck.demo import _invite
from potluck.demo._scale import FULL, QUICK, Scale

# What a person waits for after Ctrl-C, with room for a machine that runs other tests as well.
_CTRL_C_SECONDS = 20


def scales_of(line: str, monkeypatch: pytest.MonkeyPatch) -> Scale:
    """What a peer that is started with this line trains."""
    from potluck.demo import _peer

    seen: list[Scale] = []
    monkeypatch.setattr(_peer, "run", lambda scale, **_: seen.append(scale) or 0)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "potluck.demo"]
    assert program.main(words[3:]) == 0
    return seen[0]


@pytest.mark.parametrize(
    ("started", "model", "epochs", "endless"),
    [
        ([], FULL, 120, False),
        (["--quick"], QUICK, 40, False),
        (["--epochs", "77"], FULL, 77, False),
        (["--host"], FULL, 120, True),
        (["--host", "--quick"], QUICK, 40, True),
        (["--host", "--quick", "--epochs", "9"], QUICK, 9, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_who_joins_trains_the_same_model_by_the_same_schedule(
    started: list[str],
    model: Scale,
    epochs: int,
    endless: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from potluck.demo import _director, _peer

    lines: list[str] = []

    def host(scale: Scale, *, options: list[str], **_: Any) -> int:
        lines.append(_invite.joining_line("potluck1token", options))
        return 0

    def direct(self: Any, reference: bool) -> Any:
        lines.append(_invite.joining_line("potluck1token", self._options))
        raise _director.DemoFailed("enough")

    monkeypatch.setattr(_peer, "run", host)
    monkeypatch.setattr(_director.Director, "run", direct)
    program.main([*started, "--output", str(tmp_path)])
    joined = scales_of(lines[0], monkeypatch)
    assert (joined.width, joined.layers, joined.size_threshold) == (
        model.width,
        model.layers,
        model.size_threshold,
    )
    assert (joined.epochs, joined.endless) == (epochs, endless)


def test_the_rate_does_not_change_after_the_last_epoch() -> None:
    from potluck.demo._model import NextByte

    model = NextByte(QUICK)
    setup = model.configure_optimizers()
    rates = []
    for _ in range(3 * QUICK.epochs):
        rates.append(setup["optimizer"].param_groups[0]["lr"] / QUICK.learning_rate)
        setup["optimizer"].step()
        setup["lr_scheduler"]["scheduler"].step()
    assert rates[0] == pytest.approx(0.1) and rates[QUICK.warmup_epochs] == pytest.approx(1.0)
    falling = rates[QUICK.warmup_epochs : QUICK.epochs]
    assert falling == sorted(falling, reverse=True)
    assert rates[QUICK.epochs :] == pytest.approx([0.1] * (2 * QUICK.epochs))


def test_the_line_for_this_machine_names_a_python_that_has_potluck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is run by `make`: no environment is active in the user's shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    line = _invite.hosting_line()
    assert line.endswith(" -m potluck.demo --host")
    done = subprocess.run(
        f"{line} --help", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "--host" in done.stdout, done.stderr


def ctrl_c(peer: Peer) -> int:
    """Once; the exit code."""
    peer.process.send_signal(signal.SIGINT)
    code = peer.process.wait(_CTRL_C_SECONDS)
    peer._reader.join(5)
    assert "Traceback" not in peer.said, peer.said
    return code


@pytest.fixture
def starts(tmp_path: Path) -> Any:
    """Runs lines as a user would paste them."""
    peers: list[Peer] = []

    def start(line: str, machine: list[str] | None = None) -> Peer:
        peers.append(Peer(on_machine(machine or [], line, tmp_path)))
        return peers[-1]

    yield start
    for peer in peers:
        peer.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.timeout(240)
def test_a_host_trains_until_ctrl_c_and_its_line_works_on_another_machine(
    starts: Callable[..., Peer], machines: list[list[str]]
) -> None:
    host = starts("python -m potluck.demo --host --quick", machines[0])
    line = host.wait_for(r"paste this.*\n  (.*)\n").group(1)
    assert "POTLUCK_TOKEN" not in host.said, "one line to paste"
    # Longer than the schedule: who comes late finds it.
    host.wait_for(rf"epoch_of_run={QUICK.epochs + 1}\.")
    joiner = starts(line, machines[1])
    for peer in (host, joiner):
        peer.wait_for(r"peers=2\.")
    assert ctrl_c(joiner) == 0
    summary = r"trained on (\d+) samples in the epochs (\d+) to (\d+) of the run"
    samples, first, last = map(int, joiner.wait_for(summary).groups())
    assert samples > 0 and QUICK.epochs < first <= last
    host.wait_for(r"peers=1\.", since=len(host.said))
    assert ctrl_c(host) == 0
    assert int(host.wait_for(summary).group(2)) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.timeout(240)
def test_another_machine_can_join_the_running_demonstration_and_ctrl_c_ends_it(
    starts: Callable[..., Peer], tmp_path: Path
) -> None:
    whole = starts("python -m potluck.demo --quick --epochs 5000 --output shown")
    line = whole.wait_for(r"Another machine can join.*\n  (.*)\n").group(1)
    joiner = starts(line)
    joiner.wait_for(r"peers=3\.")
    assert ctrl_c(whole) == 130
    assert "stopped" in whole.said
    joiner.wait_for(r"peers=1\.", since=len(joiner.said))
    assert ctrl_c(joiner) == 0


def test_what_fails_the_demonstration_is_said_and_its_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from potluck.demo import _director

    def fails(self: Any, reference: bool) -> Any:
        raise _director.DemoFailed("peer B ended early")

    monkeypatch.setattr(_director.Director, "run", fails)
    assert program.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "the demonstration failed: peer B ended early" in capsys.readouterr().err


def test_a_peer_that_ends_early_fails_the_demonstration_and_its_log_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = subprocess.Popen

    def broken(_command: list[str], **kwargs: Any) -> subprocess.Popen:
        return start([sys.executable, "-c", "raise SystemExit('this machine has no text')"], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", broken)
    assert program.main(["--quick", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert re.search(r"the demonstration failed: peer \w ended early \(exit code 1\)", shown), shown
    assert "this machine has no text" in shown
