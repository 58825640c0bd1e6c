"""The end of the demonstration: the table, the verdict, the plot."""

from __future__ import annotations

import json
from pathlib import Path

from potluck.demo._scale import Scale
from potluck.demo._story import PeerStory, Story, mean_curve
from potluck.demo._view import megabytes


def report(story: Story, scale: Scale, output: Path) -> int:
    """Print and save the results; the exit code."""
    print()
    print(_table(story))
    print()
    for line in _findings(story):
        print(line)
    (output / "results.json").write_text(json.dumps(_results(story), indent=1) + "\n")
    try:
        from potluck.demo._plot import draw
    except ImportError:
        print("(no plot: matplotlib is not installed)")
    else:
        draw(story, scale, output / "loss.png")
        print(f"Loss, contributions and bytes: {output / 'loss.png'}")
    problems = story.verdict()
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


def _table(story: Story) -> str:
    total = sum(peer.samples for peer in story.peers.values()) or 1
    header = ("", "epochs", "samples", "share", "samples/s", "sent", "uncompressed", "ratio")
    rows = [header]
    for peer in story.peers.values():
        rows.append(
            (
                peer.name,
                f"{peer.joined_at}-{peer.epoch}" + (" killed" if peer.killed_at is not None else ""),
                str(peer.samples),
                f"{peer.samples / total:.0%}",
                f"{peer.samples_per_second:.1f}",
                megabytes(peer.bytes_sent),
                megabytes(peer.bytes_uncompressed),
                "" if peer.ratio is None else f"{peer.ratio:.0%}",
            )
        )
    if story.plain is not None:
        plain = story.plain
        rows.append(
            (
                "plain",
                f"0-{plain.epoch}",
                str(plain.samples),
                "",
                f"{plain.samples_per_second:.1f}",
                "",
                "",
                "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _findings(story: Story) -> list[str]:
    curve = story.curve()
    lines = []
    if curve:
        lines.append(f"Loss of the run: {curve[0][1]:.3f} in the first epoch, {curve[-1][1]:.3f} in the last")
    together = next((peer.held_out for peer in story.survivors if peer.held_out is not None), None)
    if together is not None and story.plain is not None and story.plain.held_out is not None:
        difference = together / story.plain.held_out - 1
        lines.append(
            f"Loss on text never trained on: {together:.3f} together, {story.plain.held_out:.3f} in one plain process "
            f"({difference:+.1%})"
        )
    sent = sum(peer.bytes_sent for peer in story.peers.values())
    raw = sum(peer.bytes_uncompressed for peer in story.peers.values())
    if raw:
        lines.append(f"Sent {megabytes(sent)} instead of {megabytes(raw)} uncompressed: {sent / raw:.0%}")
    digests = {peer.digest for peer in story.survivors}
    if len(digests) == 1 and None not in digests:
        lines.append(f"The survivors' weights are equal to the bit (sha256 {digests.pop()[:16]}…)")
    return lines


def _results(story: Story) -> dict:
    def of(peer: PeerStory) -> dict:
        return {
            "joined_at": peer.joined_at,
            "killed_at": peer.killed_at,
            "epoch": peer.epoch,
            "samples": peer.samples,
            "samples_per_second": round(peer.samples_per_second, 2),
            "bytes_sent": peer.bytes_sent,
            "bytes_uncompressed": peer.bytes_uncompressed,
            "held_out_loss": peer.held_out,
            "digest": peer.digest,
        }

    return {
        "epochs": story.epochs,
        "peers": {peer.name: of(peer) for peer in story.peers.values()},
        "plain": None if story.plain is None else of(story.plain),
        "loss": story.curve(),
        "plain_loss": [] if story.plain is None else mean_curve([story.plain]),
        "problems": story.verdict(),
    }
