"""Training together: the optimizer, and the parts it is made of."""

from potluck.optim.grad_averager import GradientAverager, GradientAveragerFactory
from potluck.optim.grad_scaler import GradScaler
from potluck.optim.optimizer import Optimizer
from potluck.optim.power_sgd_averager import PowerSGDGradientAverager
from potluck.optim.progress_tracker import (
    GlobalTrainingProgress,
    LocalTrainingProgress,
    ProgressTracker,
)
from potluck.optim.state_averager import (
    TrainingStateAverager,
    dump_optimizer_state,
    initialize_optimizer_state_,
    load_optimizer_state,
)
from potluck.optim.training_averager import TrainingAverager

__all__ = [
    "GlobalTrainingProgress",
    "GradScaler",
    "GradientAverager",
    "GradientAveragerFactory",
    "LocalTrainingProgress",
    "Optimizer",
    "PowerSGDGradientAverager",
    "ProgressTracker",
    "TrainingAverager",
    "TrainingStateAverager",
    "dump_optimizer_state",
    "initialize_optimizer_state_",
    "load_optimizer_state",
]
