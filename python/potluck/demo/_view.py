"""The live view: progress bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from potluck.demo._story import PeerStory, Story

_BAR_CELLS = 24
_FEWEST_BAR_CELLS = 6
# What stands beside a bar.
_OTHER_CELLS = 60
_REDRAW_SECONDS = 0.2
_PLAIN_LINES = 12


class View:
    """Draws the story as it unfolds."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._live = out.isatty()
        self._drawn_lines = 0
        self._drawn_at = 0.0
        self._last_line_epoch = -1
        self._last_line_of = ""
        if self._live and sys.platform == "win32":
            import os

            os.system("")  # switches the Windows console to escape sequences

    def invite(self, line: str) -> None:
        """How another machine can take part right now."""
        self._print(f"Another machine can join while this runs; paste there:\n  {line}\n")

    def happened(self, what: str) -> None:
        """An event of the story."""
        self._print(f"{time.strftime('%H:%M:%S')}  {what}")

    def draw(self, story: Story) -> None:
        """Show the state of things, if it is time to."""
        if self._live:
            now = time.monotonic()
            if now - self._drawn_at >= _REDRAW_SECONDS:
                self._drawn_at = now
                self._redraw(story)
        else:
            self._say_sometimes(story)

    def _print(self, text: str) -> None:
        self._erase()
        print(text, file=self._out, flush=True)

    def _erase(self) -> None:
        if self._drawn_lines:
            self._out.write(f"\x1b[{self._drawn_lines}F\x1b[J")
            self._drawn_lines = 0

    def _redraw(self, story: Story) -> None:
        # A line that the terminal wrapped would be two to erase.
        columns = shutil.get_terminal_size().columns - 1
        cells = max(_FEWEST_BAR_CELLS, min(_BAR_CELLS, columns - _OTHER_CELLS))
        lines = [_bar_line(peer, story.epochs, cells) for peer in story.peers.values()]
        if story.plain is not None:
            lines.append(_bar_line(story.plain, story.epochs, cells))
        header = f"{'':8} {'epoch':>{cells + 10}} {'peers':>5} {'loss':>7} {'samples/s':>9} {'sent':>9} {'of raw':>6}"
        self._erase()
        self._out.write("\n".join(["", *(line[:columns] for line in (header, *lines))]) + "\n")
        self._out.flush()
        self._drawn_lines = len(lines) + 2

    def _say_sometimes(self, story: Story) -> None:
        teller = story.plain
        if teller is None:
            teller = max(story.survivors, key=lambda peer: peer.epoch)
        every = max(1, story.epochs // _PLAIN_LINES)
        if teller.name != self._last_line_of and "plain" in (teller.name, self._last_line_of):
            self._last_line_epoch = -1
        if teller.loss is None or teller.epoch // every == self._last_line_epoch // every:
            return
        self._last_line_epoch, self._last_line_of = teller.epoch, teller.name
        sent = "" if teller.name == "plain" else f", sent {megabytes(teller.bytes_sent)}"
        sent += "" if teller.ratio is None else f" ({teller.ratio:.0%} of raw)"
        print(
            f"epoch {teller.epoch:4d}/{story.epochs}  {teller.name}: loss {teller.loss or float('nan'):.3f}, "
            f"{teller.peers_seen} peers, {teller.samples_per_second:.0f} samples/s{sent}",
            file=self._out,
            flush=True,
        )


def _bar_line(peer: PeerStory, epochs: int, cells: int) -> str:
    filled = round(cells * min(1.0, peer.epoch / epochs))
    bar = "█" * filled + "░" * (cells - filled)
    if peer.killed_at is not None:
        return f"{peer.name:8} {bar} {peer.epoch:4d}/{epochs:<4d}  killed"
    if peer.joined_at is None:
        return f"{peer.name:8} {bar}           starting"
    return f"{peer.name:8} {bar} {peer.epoch:4d}/{epochs:<4d} {figures(peer)}"


def figures(peer: PeerStory) -> str:
    """A peer's figures in columns."""
    loss = f"{peer.loss:7.3f}" if peer.loss is not None else f"{'':7}"
    ratio = f"{peer.ratio:6.0%}" if peer.ratio is not None else f"{'':6}"
    sent = f"{megabytes(peer.bytes_sent):>9}" if peer.name != "plain" else f"{'':9}"
    return f"{peer.peers_seen:5d} {loss} {peer.samples_per_second:9.1f} {sent} {ratio}"


def megabytes(count: int) -> str:
    """A byte count for people."""
    return f"{count / 1e6:.1f} MB"
