"""Large tensors in 8 bits, small ones in 16. Run it, then paste the line that it prints on another machine."""

from pytorch_lightning import LightningModule, Trainer

import common
from potluck import Float16Compression, SizeAdaptiveCompression, Uniform8BitQuantization
from potluck.lightning import HivemindStrategy

arguments = common.arguments()
target_batch_size = arguments.target_batch_size

# compresses values above threshold with 8bit Quantization, lower with Float16
compression = SizeAdaptiveCompression(
    threshold=2**16 + 1, less=Float16Compression(), greater_equal=Uniform8BitQuantization()
)
trainer = Trainer(
    strategy=HivemindStrategy(
        target_batch_size=target_batch_size,
        grad_compression=compression,
        state_averaging_compression=compression,
    ),
    accelerator="auto",
    devices=1,
)
trainer.fit(common.model_class(LightningModule)(), common.spirals())
