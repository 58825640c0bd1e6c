"""Gradients and state in 16 bits. Run it, then paste the line that it prints on another machine."""

from pytorch_lightning import LightningModule, Trainer

import common
from potluck import Float16Compression
from potluck.lightning import HivemindStrategy

arguments = common.arguments()
target_batch_size = arguments.target_batch_size

trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=target_batch_size,
        grad_compression=Float16Compression(),
        state_averaging_compression=Float16Compression(),
    ),
    accelerator="auto",
    devices=1,
)
trainer.fit(common.model_class(LightningModule)(), common.spirals())
