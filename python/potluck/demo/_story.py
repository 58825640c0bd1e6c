"""What happened: every event that the peers reported, and the figures read off it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PeerStory:
    """One peer, as it reported itself."""

    name: str
    joined_at: int | None = None
    killed_at: int | None = None
    samples: int = 0
    epoch: int = 0
    peers_seen: int = 0
    loss: float | None = None
    bytes_sent: int = 0
    bytes_uncompressed: int = 0
    started: float | None = None
    seconds: float = 0.0
    arrived: bool = False
    held_out: float | None = None
    digest: str | None = None
    losses: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    samples_in: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def take(self, event: dict[str, Any]) -> None:
        """Enter one reported line."""
        kind = event["kind"]
        self.bytes_sent = event.get("bytes_sent", self.bytes_sent)
        self.bytes_uncompressed = event.get("bytes_uncompressed", self.bytes_uncompressed)
        if kind == "step":
            self._step(event)
        elif kind == "arrived":
            self.arrived = True
        elif kind == "end":
            self.held_out, self.digest, self.epoch = event["held_out"], event["digest"], event["epoch"]

    def _step(self, event: dict[str, Any]) -> None:
        if self.joined_at is None:
            self.joined_at = self.epoch = event["epoch"]
        # A step that completes an epoch is reported with the next epoch's number, but belongs to the completed one.
        belongs_to = max(self.epoch, 0)
        self.losses[belongs_to].append(event["loss"])
        self.samples_in[belongs_to] += event["samples"] - self.samples
        self.samples, self.loss, self.peers_seen = event["samples"], event["loss"], event["peers"]
        self.epoch = max(self.epoch, event["epoch"])
        self.started = event["at"] if self.started is None else self.started
        self.seconds = event["at"] - self.started

    @property
    def samples_per_second(self) -> float:
        """Over the peer's whole life."""
        return self.samples / self.seconds if self.seconds > 0 else 0.0

    @property
    def ratio(self) -> float | None:
        """Bytes sent as a fraction of what they would be uncompressed; None before the first round."""
        return self.bytes_sent / self.bytes_uncompressed if self.bytes_uncompressed else None


@dataclass
class Story:
    """All peers of the run, and the plain reference."""

    epochs: int
    # Who began here or later has joined a running training.
    join_epoch: int
    peers: dict[str, PeerStory] = field(default_factory=dict)
    plain: PeerStory | None = None

    @property
    def epoch(self) -> int:
        """How far the run is."""
        return max((peer.epoch for peer in self.peers.values()), default=0)

    @property
    def survivors(self) -> list[PeerStory]:
        """Peers that nobody killed."""
        return [peer for peer in self.peers.values() if peer.killed_at is None]

    def joined_late(self, peer: PeerStory) -> bool:
        """Whether the training was running when this peer's first batch was done."""
        return peer.joined_at is not None and peer.joined_at >= self.join_epoch

    def curve(self) -> list[tuple[int, float]]:
        """(epoch, mean loss over all batches that any peer processed in it)."""
        return mean_curve(list(self.peers.values()))

    def verdict(self) -> list[str]:
        """What went wrong, in sentences; empty if nothing did."""
        problems = []
        curve = self.curve()
        first, last = _ends(curve)
        # Not-a-number is no fall either, so the comparison is the positive one.
        if not (curve and last <= 0.9 * first):
            problems.append(f"the loss did not fall: {first:.3f} at the start, {last:.3f} at the end")
        digests = {peer.name: peer.digest for peer in self.survivors}
        if None in digests.values():
            missing = ", ".join(name for name, value in digests.items() if value is None)
            problems.append(f"no final weights from {missing}")
        elif len(set(digests.values())) > 1:
            described = ", ".join(f"{name} {value[:12]}" for name, value in digests.items() if value)
            problems.append(f"the survivors' weights differ: {described}")
        short = [peer.name for peer in self.survivors if peer.epoch < self.epochs]
        if short:
            problems.append(f"{', '.join(short)} did not reach epoch {self.epochs}")
        if not any(peer.killed_at is not None for peer in self.peers.values()):
            problems.append("nobody was killed: the run was over before")
        if not any(self.joined_late(peer) for peer in self.survivors):
            problems.append(f"nobody joined the running training, at epoch {self.join_epoch} or later")
        idle = [peer.name for peer in self.survivors if not peer.samples]
        if idle:
            problems.append(f"{', '.join(idle)} contributed nothing")
        return problems


def mean_curve(peers: list[PeerStory]) -> list[tuple[int, float]]:
    """(epoch, mean loss) over these peers."""
    epochs = sorted({epoch for peer in peers for epoch in peer.losses})
    curve = []
    for epoch in epochs:
        losses = [loss for peer in peers for loss in peer.losses.get(epoch, [])]
        curve.append((epoch, sum(losses) / len(losses)))
    return curve


def _ends(curve: list[tuple[int, float]]) -> tuple[float, float]:
    if not curve:
        return float("nan"), float("nan")
    tenth = max(1, len(curve) // 10)
    first, last = curve[:tenth], curve[-tenth:]
    return sum(loss for _, loss in first) / len(first), sum(loss for _, loss in last) / len(last)
