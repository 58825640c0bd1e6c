"""How big the demonstration is: one place for every number that a peer and the plain reference must share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Model, data and run sizes."""

    epochs: int
    # Whether peers stop at the last epoch, or go on with the last learning rate until somebody stops them.
    endless: bool = False
    target_batch_size: int = 64
    batch_size: int = 8
    context: int = 96
    width: int = 144
    layers: int = 2
    heads: int = 4
    learning_rate: float = 3e-3
    warmup_epochs: int = 8
    # Tensors from here on are sent in 8 bits, smaller ones in 16; the value of the seed document's example.
    size_threshold: int = 2**16 + 1

    @property
    def join_epoch(self) -> int:
        """When the late peer starts."""
        return max(1, self.epochs // 5)

    @property
    def kill_epoch(self) -> int:
        """When a peer is killed."""
        return max(2, (self.epochs * 3) // 5)


FULL = Scale(epochs=120)
QUICK = Scale(epochs=40, target_batch_size=64, context=64, width=64, layers=1, size_threshold=2**14)

# How long the demonstration's last peer waits for company where no terminal can tell it to end.
STAY_SECONDS = 60.0
