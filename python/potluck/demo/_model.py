"""The model: a small transformer that predicts the next byte."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from potluck.demo._corpus import VOCABULARY
from potluck.demo._scale import Scale
from potluck.lightning._packages import packages_in_use

LightningModule = packages_in_use()[0].LightningModule


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix_in, self.mix_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.mix_in(self.norm_in(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.think(self.norm_out(x))


class NextByte(LightningModule):
    """Trained alike by a peer and by the plain reference."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.scale = scale
        self.bytes = nn.Embedding(VOCABULARY, scale.width)
        self.places = nn.Embedding(scale.context, scale.width)
        self.blocks = nn.Sequential(*(_Block(scale.width, scale.heads) for _ in range(scale.layers)))
        self.norm = nn.LayerNorm(scale.width)
        self.head = nn.Linear(scale.width, VOCABULARY, bias=False)
        for table in (self.bytes, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.bytes(x) + places)))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy in nats per byte."""
        return functional.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], _batch_idx: int) -> Tensor:
        """One local batch."""
        loss = self.loss(*batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW, with a rate that depends on the epoch of the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.scale.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._share_of_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_rate(self, epoch: int) -> float:
        """A warm-up from a tenth, a cosine down to a tenth at the last epoch, and no change after it."""
        warmup = self.scale.warmup_epochs
        if epoch < warmup:
            return 0.1 + 0.9 * epoch / warmup
        way = min(1.0, (epoch - warmup) / max(1, self.scale.epochs - warmup))
        return 0.55 + 0.45 * math.cos(math.pi * way)
