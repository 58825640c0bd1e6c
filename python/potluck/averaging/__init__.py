"""Averaging of tensors with other peers, round by round."""

from potluck.averaging.averager import DecentralizedAverager, compute_schema_hash
from potluck.averaging.control import AveragingStage, StepControl

__all__ = ["AveragingStage", "DecentralizedAverager", "StepControl", "compute_schema_hash"]
