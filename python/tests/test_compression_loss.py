"""Compressed training learns as well as uncompressed training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compression_loss import compare
from lightning_support import QUIET

from potluck.demo._scale import FULL

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.mark.timeout(1200)
def test_lossy_ways_reach_the_uncompressed_loss_within_a_hundredth() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # The demonstration's own model; a third of its epochs is enough to see a way that learns worse.
        results = compare(dataclasses.replace(FULL, epochs=40))
    finally:
        torch.set_num_threads(threads)
    plain = results.pop("uncompressed")[0]
    assert plain < 2.8, "it learned"
    for name, (loss, ratio) in results.items():
        assert loss < 1.01 * plain, name
        assert ratio > 3, name
