"""Synchronous methods: what is split names them (data; gradients and optimizer state; parameters to come)."""

from mpitrain.parallel.averaging import ModelAveraging
from mpitrain.parallel.data import DataParallel
from mpitrain.parallel.gradient import GradientParallel
from mpitrain.parallel.lanes import LaneSteps
from mpitrain.parallel.reproducible import ReproducibleDataParallel, ReproducibleGradientParallel
from mpitrain.parallel.synchronous import Synchronous, Tally

__all__ = [
    "DataParallel",
    "GradientParallel",
    "LaneSteps",
    "ModelAveraging",
    "ReproducibleDataParallel",
    "ReproducibleGradientParallel",
    "Synchronous",
    "Tally",
]
