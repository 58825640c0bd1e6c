"""The data side of a peer: how many samples a batch has, and an own shuffling order for peers that join others."""

from __future__ import annotations

import hashlib

import torch
from torch.utils.data import DataLoader, RandomSampler


def shuffle_differently(dataloader: object, peer_id: str) -> None:
    """Give a shuffling loader an order of its own.

    Peers that call ``seed_everything`` with the same number would otherwise all train on the same samples in the same
    order, and N peers would learn little more than one. A sampler with a generator of its own is left alone.
    """
    if not isinstance(dataloader, DataLoader):
        return
    sampler = dataloader.sampler
    if isinstance(sampler, RandomSampler) and sampler.generator is None:
        digest = hashlib.sha256(f"{peer_id}/{torch.initial_seed()}".encode()).digest()
        sampler.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
