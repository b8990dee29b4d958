"""Arrays: which library they belong to, how tensors lie in memory, and random values that no layout changes."""

from mpitrain.arrays.batch import Batch
from mpitrain.arrays.box import Box
from mpitrain.arrays.fixed_point import FixedPoint, exponents
from mpitrain.arrays.flatbuffer import Allocator, FlatBuffer, device, nest, plain
from mpitrain.arrays.gradients import GradientBuffer, GradientTree, unwritten
from mpitrain.arrays.layout import Group, Layout, Segment, Shard
from mpitrain.arrays.loans import Loans
from mpitrain.arrays.namespace import by_device, is_cupy, namespace, to_host
from mpitrain.arrays.random import Key, philox4x32
from mpitrain.arrays.tensors import Gradients, LazyTree, ParameterSource, ParameterTree, Tensors

__all__ = [
    "Allocator",
    "Batch",
    "Box",
    "FixedPoint",
    "FlatBuffer",
    "GradientBuffer",
    "GradientTree",
    "Gradients",
    "Group",
    "Key",
    "Layout",
    "LazyTree",
    "Loans",
    "ParameterSource",
    "ParameterTree",
    "Segment",
    "Shard",
    "Tensors",
    "by_device",
    "device",
    "exponents",
    "is_cupy",
    "namespace",
    "nest",
    "philox4x32",
    "plain",
    "to_host",
    "unwritten",
]
