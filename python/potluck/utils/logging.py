"""potluck logs through the standard :mod:`logging`, under the logger ``potluck``, and adds no handler of its own."""

from __future__ import annotations

import logging

ROOT_NAME = "potluck"
_handler: logging.Handler | None = None
_handler_owner: logging.Logger | None = None


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of this name; ``None`` is potluck's own."""
    return logging.getLogger(ROOT_NAME if name is None else name)


def use_hivemind_log_handler(where: str) -> None:
    """Print log lines to stderr: of potluck (``in_hivemind``), of everything (``in_root_logger``), or ``nowhere``."""
    global _handler, _handler_owner
    places = {
        "in_hivemind": logging.getLogger(ROOT_NAME),
        "in_root_logger": logging.getLogger(),
        "nowhere": None,
    }
    if where not in places:
        raise ValueError(f"where={where!r}: expected one of {', '.join(places)}")
    if _handler is not None and _handler_owner is not None:
        _handler_owner.removeHandler(_handler)
    _handler = None
    _handler_owner = places[where]
    if _handler_owner is not None:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s", "%b %d %H:%M:%S"))
        _handler_owner.addHandler(_handler)
        if _handler_owner.level == logging.NOTSET:
            _handler_owner.setLevel(logging.INFO)
