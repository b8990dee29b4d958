"""Mixed precision: passes in 16 bits, and everything that is kept, added up or updated in float32.

float16 has too small a range for gradients: the loss is multiplied by a scale that is as large as it can be without
overflow, found by trying.  bfloat16 has the range of float32 and needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mpitrain._errors import DtypeError, InputError, NonFiniteError
from mpitrain._options import COUNT, POSITIVE, Checked, Choice, Interval, option
from mpitrain._typing import Array, DType
from mpitrain.arrays import is_cupy, namespace
from mpitrain.arrays.dtypes import half
from mpitrain.nn.model import MixedModel, Model

_LARGEST_SCALE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Precision(Checked):
    """In which 16-bit type a model computes, and how its loss is scaled.

    Parameters
    ----------
    compute : {"float16", "bfloat16"}
        Type of forward and backward passes.  Parameters, sums of gradients and optimizer state are float32.
    emulate : bool
        Allow it on CPUs, whose libraries have no 16-bit arithmetic: slower than float32, with the rounding of a GPU.
        For tests.
    initial_scale : float
        float16 only, as are the following: what the sum of a batch's losses is multiplied by at first.  The sum over a
        batch is as many times larger than its mean as there are samples (or tokens): 2¹⁶ for a mean is 2¹⁰ for a sum of
        64.
    growth_factor, growth_interval
        The scale is multiplied by the factor after that many steps in a row without overflow.
    backoff_factor : float
        What the scale is multiplied by after an overflow; that step is skipped.
    most_skips : int
        After this many skipped steps in a row training ends with an error: no scale would help.

    Notes
    -----
    The schedule is that of PyTorch's ``GradScaler``.  Micikevicius and others, "Mixed precision training", ICLR 2018,
    section 3.
    """

    name: ClassVar[str] = "precision"

    compute: str = option(Choice(("float16", "bfloat16")))
    emulate: bool = False
    initial_scale: float = option(POSITIVE, 2.0**10)
    growth_factor: float = option(Interval(1.0, np.inf, "()"), 2.0)
    backoff_factor: float = option(Interval(0.0, 1.0, "()"), 0.5)
    growth_interval: int = option(COUNT, 2000)
    most_skips: int = option(COUNT, 25)

    @cached_property
    def dtype(self) -> DType:
        """The type of the passes.

        Raises
        ------
        MissingExtraError
            It is bfloat16, and ``ml_dtypes`` is not installed.
        """
        return half(self.compute, "precision")

    def scaler(self) -> LossScaler | None:
        """Return what finds the scale; None for bfloat16."""
        return LossScaler(self) if self.compute == "float16" else None

    def check(self, model: Model, memory: Array) -> MixedModel:
        """Return ``model`` if it can be trained in this precision, with parameters in memory like ``memory``.

        Raises
        ------
        DtypeError
            The memory is a CPU's, and ``emulate`` is not set; or the GPU's library lacks the type.
        InputError
            The model computes in its own type only, or that is not float32.
        """
        if not isinstance(model, MixedModel) or model.layout.dtype != np.float32:
            raise InputError(
                "this model does not compute in 16 bits", operation=f"precision {self.compute}",
                got=f"{type(model).__name__} of {model.layout.dtype}", expected="a Network of float32",
                remedy="leave out precision",
            )  # fmt: skip
        if not (is_cupy(memory) or self.emulate):
            raise DtypeError(
                "CPUs train in float32", operation=f"precision {self.compute}", got="parameters in a CPU's memory",
                expected="a GPU's", remedy="leave out precision; or, for tests, set emulate",
            )  # fmt: skip
        _check_library(namespace(memory), self.dtype)
        return model


def _check_library(xp: Any, dtype: DType) -> None:
    """Require that a library of arrays has a type."""
    try:
        one = xp.ones(1, dtype)
        one += one
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise DtypeError(
            f"{xp.__name__} {xp.__version__} cannot compute in {dtype}", operation="precision", got=error,
            remedy="use float16, or CuPy 14 or newer",
        ) from error  # fmt: skip


class LossScaler:
    """The scale of the loss, and what it is to be after each step.

    Parameters
    ----------
    precision : Precision
        How it changes.

    Attributes
    ----------
    scale : float
        Of the next step.
    steps : int
        Steps in a row without overflow, since the scale last changed.
    skips : int
        Steps in a row that were skipped.

    Notes
    -----
    Every rank has one, and all are told the same; nothing is communicated.
    """

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.scale = float(precision.initial_scale)
        self.steps = self.skips = 0

    def judge(self, good: bool, step: int) -> None:
        """Adapt the scale to whether all ranks' gradients of ``step``, counted from 1, were finite.

        Raises
        ------
        NonFiniteError
            `Precision.most_skips` steps in a row were not.
        """
        if good:
            self._grow()
            return
        self.steps, self.skips = 0, self.skips + 1
        if self.skips >= self.precision.most_skips:
            raise NonFiniteError(
                f"{self.skips} steps in a row, up to step {step}, gave no finite gradients, however small the scale",
                operation="precision float16", got=f"loss scale {self.scale:g}",
                remedy="lower optimizer.lr, use bfloat16, or begin with a smaller initial_scale",
            )  # fmt: skip
        self.scale *= self.precision.backoff_factor

    def _grow(self) -> None:
        self.steps, self.skips = self.steps + 1, 0
        if self.steps < self.precision.growth_interval:
            return
        self.steps = 0
        larger = self.scale * self.precision.growth_factor
        if larger <= _LARGEST_SCALE:
            self.scale = larger

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"scale": self.scale, "steps": self.steps, "skips": self.skips}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.scale, self.steps, self.skips = float(state["scale"]), int(state["steps"]), int(state["skips"])
