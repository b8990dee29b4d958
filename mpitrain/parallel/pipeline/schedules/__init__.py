"""The families of schedules, by the names that job files use."""

from mpitrain.parallel.pipeline.schedule import Family
from mpitrain.parallel.pipeline.schedules.gpipe import GPipe
from mpitrain.parallel.pipeline.schedules.interleaved import Interleaved
from mpitrain.parallel.pipeline.schedules.one_f_one_b import OneFOneB
from mpitrain.parallel.pipeline.schedules.zero_bubble import ZeroBubbleH1

FAMILIES: dict[str, Family] = {family.name: family for family in (GPipe(), OneFOneB(), Interleaved(), ZeroBubbleH1())}

__all__ = ["FAMILIES"]
