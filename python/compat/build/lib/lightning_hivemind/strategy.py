"""``from lightning_hivemind.strategy import HivemindStrategy``."""

from potluck.lightning import HivemindStrategy

__all__ = ["HivemindStrategy"]
