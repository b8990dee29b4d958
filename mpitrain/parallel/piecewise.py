"""Tensors that are never there all at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from mpitrain._errors import InputError
from mpitrain._typing import Array


class Piecewise(ABC):
    """Parameters or gradients of which only some are there: those that `tree` was asked for."""

    @property
    def flat(self) -> Array:
        """Never there all at once."""
        raise self._refusal()

    @property
    def views(self) -> Mapping[str, Array]:
        """Never there all at once."""
        raise self._refusal()

    @abstractmethod
    def _refusal(self) -> InputError:
        """Return what to tell those who ask for everything."""
