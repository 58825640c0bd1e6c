"""Train a Lightning module together with other machines.

>>> from lightning.pytorch import Trainer                       # or: from pytorch_lightning import Trainer
>>> from potluck.lightning import HivemindStrategy
>>> trainer = Trainer(strategy=HivemindStrategy(target_batch_size=8192), accelerator="auto", devices=1)

One peer starts without addresses and prints a line for the others; see ``HivemindStrategy``.
"""

from potluck.lightning._strategy import HivemindStrategy

__all__ = ["HivemindStrategy"]
