"""PowerSGD: low-rank gradients. Run it, then paste the line that it prints on another machine."""

from functools import partial

from pytorch_lightning import LightningModule, Trainer

import common
from potluck.lightning import HivemindStrategy
from potluck.optim.power_sgd_averager import PowerSGDGradientAverager

common.arguments()

trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=8192,
        grad_averager_factory=partial(PowerSGDGradientAverager, averager_rank=32, min_compression_ratio=0.5),
    ),
    accelerator="auto",
    devices=1,
)
trainer.fit(common.model_class(LightningModule)(), common.spirals())
