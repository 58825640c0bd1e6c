"""The short hard days as tests: `make test` plays them, `make hard-days` plays all."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import rules
import run
from crew import open_lab

import netlab

SHORT = ("spot_notice", "odd_couple")


def why_not():
    """Why networks cannot be made here, or None."""
    if reason := netlab.missing():
        return reason
    try:
        open_lab().close()
    except netlab.LabError as error:
        return f"no network namespaces here: {error}"
    return None


def test_warnings_are_errors_and_everything_has_a_time_limit(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings") == ["error"]
    assert float(pytestconfig.getini("timeout")) > 0


def test_what_the_killed_may_leave_is_one_notice(tmp_path: Path) -> None:
    notices = tmp_path / "potluck-user"
    notices.mkdir()
    (notices / "1-0.json").write_text("{}")
    killed = SimpleNamespace(private=tmp_path, killed=True)
    assert rules.litter(killed) == set()
    assert rules.litter(SimpleNamespace(private=tmp_path, killed=False)) == {notices, notices / "1-0.json"}
    for more in (notices / "1-1.json", tmp_path / "other"):
        more.write_text("")
        assert len(rules.litter(killed)) == 1, more
        more.unlink()


def a_peer(name: str, megabytes: list[float], files: list[int], story: str = "") -> SimpleNamespace:
    """Somebody with these figures, one every ten seconds."""
    lines = [
        {"at": 10.0 * n, "rss_kb": mb * 1e6 / 1024, "heap_kb": 0, "fds": fds}
        for n, (mb, fds) in enumerate(zip(megabytes, files, strict=True))
    ]
    said = {"epoch": lines, "arrived": [], "ready": [{"peer": "12D3KooWabcdef"}]}
    return SimpleNamespace(name=name, said=said.__getitem__, story=lambda: story)


def judged(
    rule: Callable[..., None], *arguments: object, minutes: float = 60.0
) -> list[tuple[str, str, bool]]:
    """What a rule adds to the table."""
    table: list[tuple[str, str, bool]] = []
    crew = SimpleNamespace(minutes=minutes, check=lambda *line: table.append(line))
    rule(crew, *arguments)
    return table


STILL = [100.0] * 360
RISING = [100.0 + n / 360 * 3 for n in range(360)]  # 3 MB/h, for certain
NOISY = [100.0 + (n // 20 % 2) * 20 + n / 360 * 5 for n in range(360)]  # 5 MB/h, or nothing
TWENTY = [20] * 360


def test_without_figures_nothing_is_flat() -> None:
    for peers in (
        [],
        [a_peer("mute", [], [])],
        [a_peer("still", STILL, TWENTY), a_peer("brief", [1.0] * 6, [1] * 6)],
    ):
        for minutes in (1.0, 60.0):
            assert not any(ok for *_, ok in judged(rules.no_leak, "haul", peers, minutes=minutes)), peers
            assert not any(ok for *_, ok in judged(rules.flat, peers, minutes=minutes)), peers


def test_each_peer_is_judged_by_itself() -> None:
    still, rising, noisy = (
        a_peer(name, figures, TWENTY)
        for name, figures in (("still", STILL), ("rising", RISING), ("noisy", NOISY))
    )
    (_, measured, ok), (_, _, files_ok) = judged(rules.no_leak, "haul", [still])
    assert ok and files_ok and "still +0.0 ± 0.0" in measured and measured.endswith("shown"), measured
    (_, measured, ok), _ = judged(rules.no_leak, "haul", [noisy])
    assert ok and measured.endswith("not refuted"), measured
    # The noisy one rises more, which must not hide the one that certainly rises.
    (_, measured, ok), (_, _, files_ok) = judged(rules.no_leak, "haul", [noisy, rising, still])
    assert not ok and files_ok and "rising +3.0" in measured, measured
    assert all(ok for *_, ok in judged(rules.no_leak, "haul", [rising], minutes=10.0)), (
        "no rule in ten minutes"
    )
    leaky = a_peer("leaky", STILL, [20 + n // 30 for n in range(360)])  # 12 an hour
    once = a_peer("once", STILL[:180], [20 + n // 120 for n in range(180)])  # one more, once in half an hour
    assert [ok for *_, ok in judged(rules.no_leak, "haul", [still, leaky])] == [True, False]
    assert [ok for *_, ok in judged(rules.no_leak, "haul", [once])] == [True, True]


def test_flat_says_when_a_scenario_is_too_short_for_a_slope() -> None:
    grown = a_peer("grown", [100.0 + n for n in range(60)], [20] * 60)
    ((rule, measured, ok),) = judged(rules.flat, [a_peer("still", STILL[:60], TWENTY[:60]), grown])
    assert not ok and "too short for a slope" in rule and "still +0.0 MiB +0" in measured, (rule, measured)
    ((rule, _, ok),) = judged(rules.flat, [a_peer("still", STILL, TWENTY)])
    assert ok and "too short" not in rule


def test_a_fault_that_is_named_never_or_twice_fails() -> None:
    line = "hard: peer abcdef is gone; 2 peers\n"
    peers = [a_peer(f"peer{n}", [], [], line) for n in range(8)]
    ((_, measured, ok),) = judged(rules.named_once, "the kill", peers, rules.gone(peers[0]))
    assert ok and measured == "8 of 8"
    for story in ("hard: peer abcdef is here; 3 peers\n", line + line):
        ((_, _, ok),) = judged(
            rules.named_once, "the kill", [*peers, a_peer("odd", [], [], story)], rules.gone(peers[0])
        )
        assert not ok
    assert not judged(rules.named_once, "the kill", [], "gone")[0][2]


def test_rounds_that_were_hit_are_read_from_the_log() -> None:
    story = (
        "hard: epoch 3: averaged gradients with 3 peers, 512 samples, 80 ms\n"
        "hard: epoch 4: averaged gradients with 3 peers, 300 samples, 1.2 s; lost on the way: "
        "peer abcdef: reset (lost in the gradients round of epoch 4, attempt 1)\n"
        "hard: epoch 4: 2 peers have the same state, nothing to average, 0 ms\n"
        "hard: epoch 5: averaged gradients with 2 peers, 300 samples, 1.2 s; lost on the way: "
        "peer abcdef: implausible (norm 9)\n"
        "hard: epoch 6: no average of gradients, went on alone: time was up\n"
    )
    peer = a_peer("peer", [], [], story)
    assert rules.rounds(peer) == {3: (3, []), 4: (3, ["abcdef"]), 5: (2, [])}
    assert rules.failed_rounds(peer) == {6}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHORT)
def test_short(name: str) -> None:
    if reason := why_not():
        pytest.skip(reason)
    lines = run.play(name, run.binary(), minutes=1.0)
    run.show(lines)
    failed = [f"{rule}: {measured}" for _, rule, measured, ok in lines if not ok]
    assert lines and not failed, failed
