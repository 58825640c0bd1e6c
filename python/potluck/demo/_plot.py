"""The picture: loss against the plain reference, who contributed what, and bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from potluck.demo._scale import Scale
from potluck.demo._story import Story, mean_curve

# Distinguishable with every kind of colour blindness (Okabe and Ito).
_COLOURS = {"peer A": "#0072B2", "peer B": "#D55E00", "peer C": "#009E73"}
_OTHER = "#CC79A7"
_INK, _PALE = "#222222", "#999999"


def draw(story: Story, scale: Scale, path: Path) -> None:
    """Write the plot to ``path``."""
    figure = Figure(figsize=(11, 5.6), dpi=130, layout="constrained")
    figure.suptitle(f"One model, {len(story.peers)} peers that come and go", fontsize=13, color=_INK)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.1, 1))
    _loss(figure.add_subplot(grid[:, 0]), story)
    _contributions(figure.add_subplot(grid[0, 1]), story, scale)
    _bytes(figure.add_subplot(grid[1, 1]), story)
    figure.savefig(path)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)


def _loss(axes: Axes, story: Story) -> None:
    together = story.curve()
    if story.plain is not None:
        axes.plot(
            *zip(*mean_curve([story.plain]), strict=True),
            color=_PALE,
            linewidth=1.6,
            label="one plain process",
        )
    axes.plot(*zip(*together, strict=True), color=_INK, linewidth=1.8, label="potluck, all peers")
    top = max(loss for _, loss in together)
    for peer in story.peers.values():
        colour = _COLOURS.get(peer.name, _OTHER)
        if peer.joined_at is not None and story.joined_late(peer):
            _mark(axes, peer.joined_at, top, f"{peer.name}\njoins", colour)
        if peer.killed_at is not None:
            _mark(axes, peer.killed_at, top, f"{peer.name}\nis killed", colour)
    _style(axes, "Training loss (nats per byte)")
    axes.set_xlabel("epoch of the run (one shared optimizer step)")
    axes.set_xlim(0, story.epochs)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _mark(axes: Axes, epoch: int, top: float, text: str, colour: str) -> None:
    axes.axvline(epoch, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        text, (epoch, top), xytext=(5, 0), textcoords="offset points", va="top", fontsize=9, color=colour
    )


def _contributions(axes: Axes, story: Story, scale: Scale) -> None:
    epochs = list(range(story.epochs))
    series = [[peer.samples_in.get(epoch, 0) for epoch in epochs] for peer in story.peers.values()]
    colours = [_COLOURS.get(name, _OTHER) for name in story.peers]
    axes.stackplot(epochs, series, labels=list(story.peers), colors=colours, step="mid", alpha=0.85)
    axes.axhline(scale.target_batch_size, color=_INK, linewidth=1, linestyle=":")
    _style(axes, "Samples per epoch (dotted: the target)")
    axes.set_xlim(0, story.epochs)
    # Peers that compute at once overshoot the target; above the highest epoch is room for the legend.
    highest = max((sum(samples) for samples in zip(*series, strict=True)), default=0)
    axes.set_ylim(0, 1.3 * max(highest, scale.target_batch_size))
    axes.set_xlabel("epoch")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def _bytes(axes: Axes, story: Story) -> None:
    names = list(story.peers)
    rows = range(len(names))
    raw = [peer.bytes_uncompressed / 1e6 for peer in story.peers.values()]
    sent = [peer.bytes_sent / 1e6 for peer in story.peers.values()]
    axes.barh(rows, raw, color="#dddddd", height=0.7, label="uncompressed")
    axes.barh(rows, sent, color=[_COLOURS.get(name, _OTHER) for name in names], height=0.7)
    for row, (s, r) in enumerate(zip(sent, raw, strict=True)):
        if r:
            axes.annotate(
                f"{s:.0f} of {r:.0f} MB ({s / r:.0%})",
                (s, row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_INK,
            )
    axes.set_yticks(list(rows), names)
    axes.invert_yaxis()
    _style(axes, "Bytes sent (grey: without compression)")
    axes.set_xlabel("MB")
