"""Synchronous methods: what is split names them (data here; gradients and parameters to come)."""

from mpitrain.parallel.averaging import ModelAveraging
from mpitrain.parallel.data import DataParallel

__all__ = ["DataParallel", "ModelAveraging"]
