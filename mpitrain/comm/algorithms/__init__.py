"""Collectives of our own over point-to-point messages: one idea a file, all in one table.

An algorithm is a function of the rank's `Links` and a `Call`.  It knows no backend: whatever performs ``send`` and
``recv`` calls will do.
"""

from mpitrain.comm.algorithms.hierarchical import Hierarchy
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.registry import ALGORITHMS, DEFAULT, Algorithm, assign, names, perform, tabled

__all__ = ["ALGORITHMS", "DEFAULT", "Algorithm", "Hierarchy", "Links", "assign", "names", "perform", "tabled"]
