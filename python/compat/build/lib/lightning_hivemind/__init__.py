"""The import name ``lightning_hivemind``, provided by potluck."""

from potluck.lightning import HivemindStrategy

__all__ = ["HivemindStrategy"]
