"""Which algorithm performs which collective: a table, measured once on a machine and kept in the user's cache."""

from mpitrain.comm.tuning.cache import Found, install, load, path_of, save
from mpitrain.comm.tuning.measuring import SIZES_BYTES, measure
from mpitrain.comm.tuning.table import Key, Row, Table

__all__ = ["SIZES_BYTES", "Found", "Key", "Row", "Table", "install", "load", "measure", "path_of", "save"]
