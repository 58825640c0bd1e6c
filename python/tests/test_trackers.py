"""What the trackers tell of a run, and the arguments that they refuse."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from test_optimizer import backward, batches, make_model

import potluck
from potluck.dht import DHT
from potluck.optim.progress_tracker import ProgressTracker


def test_the_speed_of_an_optimizer_is_what_its_session_measures(local_dht: Callable[[], DHT]) -> None:
    """hivemind's examples print ``opt.tracker.performance_ema.samples_per_second``."""
    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = potluck.Optimizer(
        dht=local_dht(), run_id="r", target_batch_size=64, batch_size_per_step=8, optimizer=inner
    )
    for inputs, labels in batches(9, 8):
        opt.zero_grad()
        backward(model, inputs, labels)
        opt.step()
    with opt.tracker.pause_updates():
        speed = opt.tracker.performance_ema.samples_per_second
    assert speed == pytest.approx(opt.tracker.local_progress.samples_per_second, rel=0.3) and speed > 1
    assert opt.tracker.fetched_global_progress_this_epoch
    assert opt.tracker.estimated_next_update_time <= opt.tracker.global_progress.eta_next_epoch + 60
    opt.shutdown()


def test_a_tracker_measures_what_is_reported_but_not_its_pauses(
    local_dht: Callable[[], DHT], caplog: pytest.LogCaptureFixture
) -> None:
    tracker = ProgressTracker(local_dht(), "p", 100, start=True, status_loglevel=logging.WARNING)
    logging.getLogger("potluck").addHandler(caplog.handler)
    try:
        tracker.report_local_progress(0, 5)
    finally:
        logging.getLogger("potluck").removeHandler(caplog.handler)
    assert "p: 5 of 100 samples of epoch 0, from 1 peers" in caplog.text
    assert tracker.performance_ema.num_updates == 1 and tracker.performance_ema.samples_per_second > 1e-6
    with tracker.pause_updates(), pytest.raises(RuntimeError, match="paused"):
        tracker.performance_ema.update(1)
    tracker.shutdown()


def test_a_tracker_has_no_process_to_outlive_the_program(local_dht: Callable[[], DHT]) -> None:
    with pytest.raises(ValueError, match="daemon=False cannot have an effect"):
        ProgressTracker(local_dht(), "p", 100, start=False, daemon=False)
