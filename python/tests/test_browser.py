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
PICTURES = Path(__file__).parents[2] / ".build" / "browser"
SHOWN = "Number(document.getElementById('{}').textContent)"
FOCUSED = (
    "document.activeElement.id || document.activeElement.className || document.activeElement.textContent"
)
TAB = 9


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


@pytest.mark.timeout(300)
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

        metrics_are_read_by_prometheus(first.about["url"], ids)

        third.kill()
        browser.until(f"{SHOWN.format('peers')} === 2")
        browser.until(f"document.getElementById('events').innerText.includes('{ids[2][-6:]} is gone')")
        browser.until("document.querySelectorAll('#board tr').length === 2")

        browser.look(390, 844, "dark")
        no_wider_than_the_screen(browser)
        assert background(browser) < bright / 2
        browser.screenshot(PICTURES / "phone.png")

        second.kill()
        browser.until("!document.getElementById('alert').hidden")
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
