"""Methods: how gradients become parameters; the contract, and the steps that all methods share."""

from mpitrain.method.method import Feed, Method, Plan, Progress, Schedule, Share
from mpitrain.method.precision import LossScaler, Precision
from mpitrain.method.state import Piece, State

__all__ = ["Feed", "LossScaler", "Method", "Piece", "Plan", "Precision", "Progress", "Schedule", "Share", "State"]
