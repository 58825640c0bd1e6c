"""The demonstration across machines: the lines that it prints are pasted as they are, and Ctrl-C ends it politely."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pasted import Peer

import potluck.demo.__main__ as program
from potluck.demo import _invite
from potluck.demo._scale import FULL, QUICK, STAY_SECONDS, Scale


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


@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
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
    assert joiner.ctrl_c() == 0
    summary = r"trained on (\d+) samples in the epochs (\d+) to (\d+) of the run"
    samples, first, last = map(int, joiner.wait_for(summary).groups())
    assert samples > 0 and QUICK.epochs < first <= last
    host.wait_for(r"peers=1\.", since=len(host.said))
    assert host.ctrl_c() == 0
    assert int(host.wait_for(summary).group(2)) == 0


@pytest.mark.timeout(1200)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_another_machine_can_join_the_running_demonstration_and_ctrl_c_ends_it(
    starts: Callable[..., Peer], tmp_path: Path
) -> None:
    whole = starts("python -m potluck.demo --quick --epochs 5000 --output shown")
    line = whole.wait_for(r"Another machine can join.*\n  (.*)\n").group(1)
    joiner = starts(line)
    joiner.wait_for(r"peers=3\.")
    assert whole.ctrl_c() == 130
    assert "stopped" in whole.said
    joiner.wait_for(r"peers=1\.", since=len(joiner.said))
    assert joiner.ctrl_c() == 0


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


class Company:
    """Stands for a Trainer whose strategy sees so many peers."""

    def __init__(self) -> None:
        self.should_stop, self.peers = False, 1
        self.lightning_module = self.strategy = self
        self.local_epoch, self.logged = 7, {}

    def log_dict(self, values: dict[str, float], prog_bar: bool) -> None:
        self.logged = values


def test_who_stays_for_others_leaves_when_it_has_been_alone_for_so_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from potluck.demo import _peer

    now, trainer = [0.0], Company()
    monkeypatch.setattr(_peer, "_network", lambda _strategy: {"peers": trainer.peers})
    monkeypatch.setattr(_peer, "_epoch", lambda _trainer: trainer.local_epoch)
    monkeypatch.setattr(_peer.signal, "signal", lambda *_: None)

    def steps(callback: _peer.ByHand, *at: tuple[float, int]) -> list[bool]:
        trainer.should_stop = False
        stops = []
        for now[0], trainer.peers in at:
            callback.tell_of_step(trainer, 2.5)
            stops.append(trainer.should_stop)
        return stops

    def begun(at: float, **how: Any) -> _peer.ByHand:
        callback = _peer.ByHand(QUICK, clock=lambda: now[0], **how)
        now[0] = at  # loading takes long, and does not count
        callback.on_train_start(trainer, None)
        return callback

    lonely, company = begun(50.0, stay=10.0, bar=False), begun(50.0, stay=10.0, bar=False)
    assert steps(lonely, (55.0, 1), (59.9, 1), (60.0, 1)) == [False, False, True]
    assert capsys.readouterr().out == ""
    assert steps(company, (55.0, 2), (90.0, 3), (99.9, 1), (100.0, 1)) == [False, False, False, True]
    said = re.sub(r"\d\d:\d\d:\d\d", "12:34:56", capsys.readouterr().out)
    assert said == "".join(
        f"12:34:56  {who} in epoch 7, loss 2.500\n" for who in ("2 peers", "3 peers", "alone")
    )
    assert trainer.logged == {"peers": 1.0, "epoch_of_run": 7.0}
    assert steps(begun(0.0), (1e6, 1)) == [False], "until Ctrl-C"


@pytest.mark.parametrize(
    ("arguments", "terminal", "stay"),
    [
        ([], True, None),
        ([], False, STAY_SECONDS),
        (["--stay", "7"], True, 7.0),
        (["--stay", "0"], True, "not at all"),
        (["--stay", "0"], False, "not at all"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("verdict", [0, 1])
def test_after_a_good_demonstration_a_peer_stays_for_others(
    arguments: list[str],
    terminal: bool,
    stay: Any,
    verdict: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    from potluck.demo import _director, _peer, _report

    stayed: list[Any] = []

    def host(scale: Scale, *, options: list[str], stay: float | None, join: str | None, **_: Any) -> int:
        assert scale == dataclasses.replace(QUICK, endless=True) and options == ["--quick"] and join is None
        stayed.append(stay)
        return 0

    monkeypatch.setattr(_peer, "run", host)
    monkeypatch.setattr(_director.Director, "run", lambda *_, **__: None)
    monkeypatch.setattr(_report, "report", lambda *_: verdict)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    command = ["--quick", "--epochs", "9", "--output", str(tmp_path), *arguments]
    assert program.main(command) == verdict
    assert stayed == ([] if verdict or stay == "not at all" else [stay])
    assert (f"\n  {_invite.hosting_line()}\n" in capsys.readouterr().out) == (verdict == 0)
