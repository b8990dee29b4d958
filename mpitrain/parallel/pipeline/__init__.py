"""Pipeline-parallel SGD: schedules as data, a validator, a simulator, and one executor."""

from mpitrain.parallel.pipeline.costs import counted
from mpitrain.parallel.pipeline.cuts import partition
from mpitrain.parallel.pipeline.gradient import GradientPipelineParallel, ReproducibleGradientPipelineParallel
from mpitrain.parallel.pipeline.measuring import UnitTimes, measured
from mpitrain.parallel.pipeline.method import PipelineParallel
from mpitrain.parallel.pipeline.reproducible import ReproduciblePipelineParallel
from mpitrain.parallel.pipeline.schedule import Family, Operation, Schedule, Sizes
from mpitrain.parallel.pipeline.schedules import FAMILIES
from mpitrain.parallel.pipeline.simulator import Costs, Span, Timeline, simulate
from mpitrain.parallel.pipeline.validator import peaks, validate

__all__ = [
    "FAMILIES",
    "Costs",
    "Family",
    "GradientPipelineParallel",
    "Operation",
    "PipelineParallel",
    "ReproducibleGradientPipelineParallel",
    "ReproduciblePipelineParallel",
    "Schedule",
    "Sizes",
    "Span",
    "Timeline",
    "UnitTimes",
    "counted",
    "measured",
    "partition",
    "peaks",
    "simulate",
    "validate",
]
