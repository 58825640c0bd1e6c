"""The dashboard in a real browser, beside a live run of three peers of which one is killed, then another.

The pictures that are taken on the way stay in ``.build/browser`` for whoever wants to see them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from chromium import Chromium
from lightning_support import environment
from prometheus_client.openmetrics.parser import text_string_to_metric_families

PEER = Path(__file__).with_name("browser_peer.py")
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".build" / "browser"
COMMAND = ROOT / "target" / "release" / "potluck"
STATUS = ROOT / "crates" / "dashboard" / "tests" / "status.json"
SHOWN = "Number(document.getElementById('{}').textContent)"
FOCUSED = (
    "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
)
LEFT = "[...document.querySelectorAll('#board tr.left')].map(row => [...row.cells].map(td => td.textContent))"
TAB = 9
# What the page makes of the figures in STATUS.
TILES = {
    "epoch": "41",
    "peers": "3",
    "loss": "2.625",
    "speed": "93.8",
    "sent": "27.1 MB",
    "ratio": "1.88 : 1",
    "progress-text": "137 of 512 samples, about 4 s left",
}
ROUND = {
    "epoch": "39",
    "averaged": "nothing: all had the same state already",
    "members": "2",
    "samples": "509.5",
    "took": "1.75 s",
    "sent": "703.0 kB",
    "received": "811.0 kB",
}
TOTAL = {
    "rounds": "38 (13 had nothing to average)",
    "failed": "6",
    "faults": "8 malformed, 9 silent",
    "sent": "27.1 MB",
    "received": "31.2 MB",
    "samples": "20481",
    "memory": "64.0 kB averaging, 192.0 kB state",
}


class Peer:
    """A training process, and what it said of itself."""

    def __init__(self, *initial_peers: str) -> None:
        command = [sys.executable, str(PEER), "browser", *initial_peers]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        self._about: dict[str, Any] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """Waits until the peer is in the run."""
        if self._about is None:
            assert self.process.stdout
            line = self.process.stdout.readline()
            assert line, "the peer ended before it was in the run"
            self._about = json.loads(line)
        return self._about

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """Three peers of one run; the page of the first is looked at."""
    first = Peer()
    started = [first]
    try:
        started += [Peer(*first.about["addresses"]) for _ in range(2)]
        yield started
    finally:
        for peer in started:
            peer.kill()


def no_wider_than_the_screen(browser: Chromium) -> None:
    """Nothing needs to be scrolled sideways, but for the table, which scrolls in itself."""
    widths = browser.value("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1], widths


def background(browser: Chromium) -> int:
    """How bright the page is: the sum of its background's red, green and blue."""
    colour = browser.value("getComputedStyle(document.documentElement).backgroundColor")
    if colour == "rgba(0, 0, 0, 0)":
        colour = browser.value("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour[4:-1].split(",")[:3])


def metrics_are_read_by_prometheus(url: str, ids: list[str]) -> None:
    """Its own parser takes them, with their units, and they say what the page says."""
    with urlopen(f"{url}metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert families["potluck_peers"].samples[0].value == 3
    units = {
        name: families[f"potluck_{name}"].unit
        for name in ("sent_bytes", "samples_per_second", "round_seconds")
    }
    assert units == {
        "sent_bytes": "bytes",
        "samples_per_second": "samples_per_second",
        "round_seconds": "seconds",
    }
    shares = families["potluck_peer_contributed_samples"].samples
    assert {sample.labels["peer"] for sample in shares} == set(ids)


def test_the_dashboard_of_a_live_run(peers: list[Peer], tmp_path: Path) -> None:
    first, second, third = peers
    ids = [peer.about["peer"] for peer in peers]
    with Chromium(tmp_path) as browser:
        browser.look(1280, 900, "light")
        browser.open(first.about["url"])

        browser.until(f"{SHOWN.format('peers')} === 3")
        browser.until("document.querySelectorAll('#board tr').length === 3")
        board = browser.value("document.getElementById('board').innerText")
        assert all(peer[-6:] in board for peer in ids), board
        assert browser.value("document.getElementById('alert').hidden")

        epoch = browser.value(SHOWN.format("epoch"))
        points = "document.querySelector('#loss-chart polyline').points.numberOfItems"
        browser.until(f"{points} > 3")
        drawn = browser.value(points)
        browser.until(f"{SHOWN.format('epoch')} > {epoch} && {points} > {drawn}")
        no_wider_than_the_screen(browser)
        bright = background(browser)
        browser.screenshot(PICTURES / "three-peers.png")
        browser.look(1280, 900, "dark")
        browser.screenshot(PICTURES / "three-peers-dark.png")
        browser.look(390, 844, "light")
        no_wider_than_the_screen(browser)
        browser.screenshot(PICTURES / "three-peers-phone.png")
        browser.look(1280, 900, "light")

        metrics_are_read_by_prometheus(first.about["url"], ids)

        third.kill()
        browser.until(f"{SHOWN.format('peers')} === 2")
        browser.until(f"document.getElementById('events').innerText.includes('{ids[2][-6:]} is gone')")
        browser.until("document.querySelectorAll('#board tr:not(.left)').length === 2")
        gave = browser.value(LEFT)
        assert [row[1] for row in gave] == [ids[2][-6:]] and int(gave[0][2]) > 0, gave
        assert gave[0][7] == "left"

        browser.look(390, 844, "dark")
        no_wider_than_the_screen(browser)
        assert background(browser) < bright / 2
        browser.screenshot(PICTURES / "phone.png")

        second.kill()
        browser.until("!document.getElementById('alert').hidden")
        assert {row[1] for row in browser.value(LEFT)} == {peer[-6:] for peer in ids[1:]}
        alert = browser.value("document.getElementById('alert').textContent")
        assert "training alone" in alert, alert
        no_wider_than_the_screen(browser)
        browser.screenshot(PICTURES / "alone.png")

        reached = []
        for _ in range(12):
            browser.press("Tab", TAB)
            reached.append(browser.value(FOCUSED))
        for wanted in ("loss-chart", "speed-chart", "swarm", "scroll", "events", "/metrics", "/api/status"):
            assert wanted in reached, reached

        first.kill()
        browser.until("document.getElementById('connection').textContent !== 'live'")
        here = {"127.0.0.1"}
        hosts = {urlsplit(url).hostname for url in browser.requests if url.startswith(("http", "ws"))}
        assert hosts == here, hosts
        errors = [line for line in browser.complaints if "ERR_" not in line]
        assert not errors, errors


def facts(browser: Chromium, name: str) -> dict[str, str]:
    """What a list of the page says."""
    entries = (
        f"[...document.querySelectorAll('#{name} dt')].map(dt => [dt.innerText, dt.nextSibling.innerText])"
    )
    return dict(browser.value(entries))


@pytest.mark.parametrize("inside", [True, False], ids=["of-a-peer", "of-those-who-watch"])
def test_every_figure_of_the_page_is_that_of_the_status(tmp_path: Path, inside: bool) -> None:
    status = json.loads(STATUS.read_text())
    for peer in status["peers"]:
        peer["is_me"] = inside and peer["is_me"]
    log = tmp_path / "events.jsonl"
    log.write_text(json.dumps({"seconds": 0.0, "status": status}) + "\n")
    command = [str(COMMAND), "monitor", "--dashboard", "127.0.0.1:0", "--replay", str(log)]
    monitor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert monitor.stdout
        url = next(line for line in monitor.stdout if line.startswith("dashboard ")).split()[1]
        with Chromium(tmp_path / "profile") as browser:
            browser.look(390, 844, "light")
            browser.open(url)
            browser.until("document.querySelectorAll('#board tr').length === 4")
            assert {
                name: browser.value(f"document.getElementById('{name}').textContent") for name in TILES
            } == TILES
            assert browser.value("document.getElementById('progress').value") == pytest.approx(137 / 512)
            silent = status["peers"][2]["peer"][-6:]
            assert facts(browser, "round") == {**ROUND, "faults": f"…{silent} Silent"}
            assert facts(browser, "total") == TOTAL
            board = "[...document.querySelectorAll('#board tr')].map(row => [...row.cells].map(td => td.textContent))"
            names = [peer["peer"][-6:] for peer in status["peers"]]
            own = f"{names[0]} ({'this peer' if inside else 'asked'})"
            assert browser.value(board) == [
                ["1", own, "5203", "44 %", "40.5", "42", "2.625", "\u2013 3.1/13 MB/s"],
                ["2", names[1], "4801", "31 %", "31.3", "43", "2.875", "direct 1.6/\u2013 MB/s"],
                ["3", names[2], "1999", "25 %", "22", "40", "3.125", "hole-punched \u2013/0.44 MB/s"],
                ["\u2013", status["left"][0]["peer"][-6:], "777", "\u2013", "\u2013", "33", "\u2013", "left"],
            ]
            swarm = browser.value("document.getElementById('swarm').getAttribute('aria-label')")
            assert swarm == f"2 other peers: {names[1]} direct, {names[2]} hole-punched"
            no_wider_than_the_screen(browser)
            scroll = browser.value(
                "(box => [box.scrollWidth, box.clientWidth])(document.querySelector('.scroll'))"
            )
            assert scroll[0] <= scroll[1], "on a phone the whole table is in view"
            browser.screenshot(PICTURES / f"figures-{'peer' if inside else 'watcher'}.png")
            browser.look(1280, 900, "light")
            browser.screenshot(PICTURES / f"figures-{'peer' if inside else 'watcher'}-wide.png")
    finally:
        monitor.terminate()
        monitor.wait()
        assert monitor.stdout
        monitor.stdout.close()
