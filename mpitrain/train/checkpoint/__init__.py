"""Checkpoints: a method's state on disk, written by n ranks, read by m.

A checkpoint is a directory, ``step-00000120``, with ``manifest.json`` and one file of raw values per rank that wrote
any.  It is made under a hidden name and renamed when all of it is on the disk, so that a crash at any moment leaves
the earlier checkpoints as they were, and the new one whole or hidden; `clean_up` resolves what is left under hidden
names.  What stands here knows state and files; what the state means, only the methods know.
"""

from mpitrain.train.checkpoint.manifest import Score
from mpitrain.train.checkpoint.opening import Checkpoint, load, verify
from mpitrain.train.checkpoint.retention import best, checkpoints, clean_up, discard_after, latest
from mpitrain.train.checkpoint.saving import OnPhase, save

__all__ = [
    "Checkpoint",
    "OnPhase",
    "Score",
    "best",
    "checkpoints",
    "clean_up",
    "discard_after",
    "latest",
    "load",
    "save",
    "verify",
]
