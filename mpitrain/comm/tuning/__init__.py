"""Which algorithm performs which collective: a table, measured once on a machine and kept in the user's cache."""

from mpitrain.comm.tuning.cache import Found, adopt, chosen_transport, folder, install, kept, load, path_of, save
from mpitrain.comm.tuning.measuring import SIZES_BYTES, measure, tune
from mpitrain.comm.tuning.table import Key, Row, Table

__all__ = [
    "SIZES_BYTES",
    "Found",
    "Key",
    "Row",
    "Table",
    "adopt",
    "chosen_transport",
    "folder",
    "install",
    "kept",
    "load",
    "measure",
    "path_of",
    "save",
    "tune",
]
