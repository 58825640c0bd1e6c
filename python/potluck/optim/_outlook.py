"""What to expect of ``target_batch_size``: said once before the first shared step, and once more if it is too small."""

from __future__ import annotations

import math
from typing import Any

# A round may take this part of the time before a larger target is suggested; shorter ones do not matter to anybody.
_SHARE = 0.25
_SHARE_AIM = 0.1
_SECONDS = 0.5


class Outlook:
    """Two sentences at most for a whole run."""

    def __init__(self, target_batch_size: int):
        self._target = target_batch_size
        self._foretold = self._advised = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to say."""
        return self._foretold and self._advised

    def look(self, status: dict[str, Any]) -> str | None:
        """A sentence that is due now."""
        rate, peers = status["samples_per_second"], len(status["peers"])
        if not rate:
            return None
        seconds = self._target / rate
        if not self._foretold and not status["rounds"]:
            self._foretold = True
            who = "alone" if peers < 2 else f"{peers} peers together"
            return f"{who} {rate:.4g} samples/s: an epoch of target_batch_size={self._target} takes about {_text(seconds)}"
        # After a round the length of the next one is known.
        last = status["last_round"]
        if self._advised or peers < 2 or last is None or last["seconds"] is None:
            return None
        self._foretold = self._advised = True
        took = last["seconds"]
        if took < _SECONDS or took < _SHARE * (seconds + took):
            return None
        better = _rounded(took * (1 / _SHARE_AIM - 1) * rate)
        return (
            f"a round took {_text(took)} beside {_text(seconds)} of training: target_batch_size={better} would keep the "
            f"exchange at a tenth of the time (all peers must change it together)"
        )


def _rounded(value: float) -> int:
    """The next power of two: a suggestion, not a measurement."""
    return int(2 ** math.ceil(math.log2(max(value, 1.0))))


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
