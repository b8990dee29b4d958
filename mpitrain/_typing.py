"""Type aliases that more than one room needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""A NumPy array, or a CuPy one (whose stubs say no more than NumPy's)."""

Tree: TypeAlias = Mapping[str, Any]
"""Arrays in nested dictionaries: ``{"0": {"weight": array, "bias": array}}``."""

Shape: TypeAlias = tuple[int, ...]

DType: TypeAlias = "np.dtype[Any]"
