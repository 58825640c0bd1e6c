"""What the three programs share: a model and data. The interesting part, the Trainer, is in each of them."""

import argparse
import warnings

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What one looks for, the line to paste and the progress bar, stands out without Lightning's hints.
warnings.filterwarnings("ignore", message=".*(does not have many workers|tensorboardX|LeafSpec|max_epochs).*")


def model_class(base: type) -> type:
    """A classifier of spirals on ``base``, the LightningModule of the Lightning package in use."""

    class SpiralClassifier(base):
        def __init__(self) -> None:
            super().__init__()
            first, hidden = nn.Linear(2, 128), nn.Linear(128, 600)
            self.net = nn.Sequential(
                first, nn.ReLU(), hidden, nn.ReLU(), nn.Linear(600, 128), nn.ReLU(), nn.Linear(128, 3)
            )

        def training_step(self, batch: tuple[Tensor, Tensor], _batch_idx: int) -> Tensor:
            points, arms = batch
            logits = self.net(points)
            loss = nn.functional.cross_entropy(logits, arms)
            self.log("loss", loss, prog_bar=True)
            self.log("accuracy", (logits.argmax(-1) == arms).float().mean(), prog_bar=True)
            return loss

        def on_train_batch_end(self, *_args: object) -> None:
            self.log("peers", float(self.trainer.strategy.num_peers), prog_bar=True)
            self.log("epoch_of_run", float(self.trainer.strategy.local_epoch), prog_bar=True)

        def on_train_epoch_end(self) -> None:
            # The Trainers are those of the seed document, which go on for Lightning's 1000 epochs.
            if self.current_epoch + 1 == arguments().epochs:
                self.trainer.should_stop = True

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    return SpiralClassifier


def spirals(samples: int = 8192) -> DataLoader:
    """Points on three noisy spiral arms, to be told apart."""
    generator = torch.Generator().manual_seed(0)
    arms = torch.randint(3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 5 * radius + arms * (2 * torch.pi / 3) + 0.15 * torch.randn(samples, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return DataLoader(TensorDataset(points, arms), batch_size=128, shuffle=True)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1000, help="passes over the data (default: 1000)")
    parser.add_argument(
        "--target-batch-size", type=int, default=2048, help="samples of all peers per optimizer step"
    )
    return parser.parse_args()
