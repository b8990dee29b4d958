"""Synchronous methods: what is split names them (data; gradients and optimizer state; layers)."""

from mpitrain.parallel.averaging import ModelAveraging
from mpitrain.parallel.data import DataParallel
from mpitrain.parallel.gradient import GradientParallel, GradientSteps
from mpitrain.parallel.lanes import LaneSteps
from mpitrain.parallel.owned import OwnedParameters
from mpitrain.parallel.pipeline import (
    GradientPipelineParallel,
    PipelineParallel,
    ReproducibleGradientPipelineParallel,
    ReproduciblePipelineParallel,
)
from mpitrain.parallel.reproducible import ReproducibleDataParallel, ReproducibleGradientParallel, ShardedLaneSteps
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.parallel.tally import Tally

__all__ = [
    "DataParallel",
    "GradientParallel",
    "GradientPipelineParallel",
    "GradientSteps",
    "LaneSteps",
    "ModelAveraging",
    "OwnedParameters",
    "PipelineParallel",
    "ReproducibleDataParallel",
    "ReproducibleGradientParallel",
    "ReproducibleGradientPipelineParallel",
    "ReproduciblePipelineParallel",
    "ShardedLaneSteps",
    "Synchronous",
    "Tally",
]
