"""Initial values of parameters: functions of the key and the tensor's global coordinates, so that no layout matters."""

from __future__ import annotations

from math import sqrt

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Key, Segment
from mpitrain.nn.layer import Initialiser


def zeros(key: Key, segment: Segment) -> Array:
    """Return zeros; for biases, shifts and running means."""
    return np.zeros(segment.shape)


def ones(key: Key, segment: Segment) -> Array:
    """Return ones; for scales and running variances."""
    return np.ones(segment.shape)


def he_uniform(fan_in: int) -> Initialiser:
    """Return an initialiser that draws from U(−b, b), b = √(6 / fan_in): variance 2 / fan_in, kept through ReLUs.

    Notes
    -----
    He, Zhang, Ren, Sun, "Delving deep into rectifiers", ICCV 2015, equation 10; ``fan_in`` is the number of inputs
    that each output sums.
    """
    bound = sqrt(6.0 / fan_in)

    def draw(key: Key, segment: Segment) -> Array:
        return bound * (2.0 * key.tensor(segment.global_shape, segment.box, "uniform") - 1.0)

    return draw


def normal(std: float) -> Initialiser:
    """Return an initialiser that draws from N(0, std²)."""

    def draw(key: Key, segment: Segment) -> Array:
        return std * key.tensor(segment.global_shape, segment.box, "normal")

    return draw
