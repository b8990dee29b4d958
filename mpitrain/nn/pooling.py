"""Pooling: each window of an image becomes its maximum or its mean."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpitrain._typing import Array, DType, Shape, Tree
from mpitrain.nn import checks, kernel
from mpitrain.nn.layer import Call, Context, Layer
from mpitrain.nn.windows import offsets, output_size, window

_BOOL: DType = np.dtype(bool)


class _Pool2d(Layer):
    """What the two have in common: the geometry, the walk over windows, and how shares of the gradient come together.

    All pixels at one place of their windows are one strided view, so that the work is a few array operations for
    each place, whether windows overlap or not.
    """

    def __init__(self, kernel_size: int | tuple[int, int], stride: int | tuple[int, int] | None = None) -> None:
        name = type(self).__name__
        self.kernel_size = checks.pair(f"{name}: kernel_size", kernel_size)
        self.stride = self.kernel_size if stride is None else checks.pair(f"{name}: stride", stride)

    def _output(self, x: Array, context: Context) -> Array:
        """Return memory for one pixel of each window."""
        checks.images(type(self).__name__, x, self.kernel_size)
        size = output_size(x.shape, self.kernel_size, self.stride)
        return context.take((x.shape[0], *size, x.shape[3]), x.dtype)

    def _fold(self, x: Array, fold: Callable[..., Any], y: Array) -> None:
        """Fold the pixels of each window into one by a binary ufunc."""
        first, *others = self._places(x, y.shape)
        y[...] = first
        for place in others:
            fold(y, place, out=y)

    def _places(self, x: Array, output_shape: Shape) -> list[Array]:
        return [window(x, row, column, output_shape, self.stride) for row, column in offsets(self.kernel_size)]

    def _tiles(self, shape: Shape) -> bool:
        """Tell whether every pixel lies in exactly one window: its gradient is then written once, not added up."""
        return self.stride == self.kernel_size and shape[1] % self.stride[0] == 0 and shape[2] % self.stride[1] == 0

    @abstractmethod
    def _shares(self, context: Context, dy: Array, call: Call) -> Iterator[Array]:
        """Yield the share of ``dy`` that goes to each place; an array is read before the next is asked for."""

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Bring the shares of all windows together."""
        dx = context.take(context["x"].shape, dy.dtype)
        self._spread(context, dy, dx, call)
        return dx

    def _spread(self, context: Context, dy: Array, dx: Array, call: Call) -> None:
        """Write the sum of all shares into ``dx``."""
        tiles = self._tiles(dx.shape)
        if not tiles:
            dx[...] = 0
        for target, share in zip(self._places(dx, dy.shape), self._shares(context, dy, call), strict=True):
            if tiles:
                target[...] = share
            else:
                target += share


class MaxPool2d(_Pool2d):
    """Take the maximum of each window: (n, H, W, channels) to (n, H', W', channels).

    Parameters
    ----------
    kernel_size : int or (int, int)
        Height and width of the window.
    stride : int or (int, int), optional
        Distance of the windows; ``kernel_size`` if None.  Rows and columns that fill no window are left out.

    Notes
    -----
    Of equal maxima the first one (in rows) gets the gradient.
    """

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return the maxima."""
        context = call.context()
        y = self._output(x, context)
        if not (self._tiles(x.shape) and kernel.max_pool(x, y, self.kernel_size)):
            self._fold(x, call.xp.maximum, y)
        context["x"], context["y"] = x, y
        return y, context

    def _spread(self, context: Context, dy: Array, dx: Array, call: Call) -> None:
        """Send each gradient to the pixel that was the maximum."""
        x, y = context["x"], context["y"]
        if not (self._tiles(x.shape) and kernel.max_pool_gradient(x, y, dy, dx, self.kernel_size)):
            super()._spread(context, dy, dx, call)

    def _shares(self, context: Context, dy: Array, call: Call) -> Iterator[Array]:
        """Send each gradient to the pixel that was the maximum."""
        x, y = context["x"], context["y"]
        hit, free = call.take(y.shape, _BOOL), call.take(y.shape, _BOOL)
        share = call.take(y.shape, dy.dtype)
        free[...] = True
        for place in self._places(x, y.shape):
            call.xp.equal(place, y, out=hit)
            hit &= free
            free ^= hit
            call.xp.multiply(dy, hit, out=share)
            yield share
        call.give(hit, free, share)


class AvgPool2d(_Pool2d):
    """Take the mean of each window: (n, H, W, channels) to (n, H', W', channels).

    Parameters
    ----------
    kernel_size : int or (int, int)
        Height and width of the window.
    stride : int or (int, int), optional
        Distance of the windows; ``kernel_size`` if None.  Rows and columns that fill no window are left out.
    """

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Return the means."""
        context = call.context()
        y = self._output(x, context)
        self._fold(x, call.xp.add, y)
        y /= self.kernel_size[0] * self.kernel_size[1]
        context["x"] = x
        return y, context

    def _shares(self, context: Context, dy: Array, call: Call) -> Iterator[Array]:
        """Share each gradient out evenly."""
        area = self.kernel_size[0] * self.kernel_size[1]
        share = call.take(dy.shape, dy.dtype)
        call.xp.divide(dy, area, out=share)
        for _ in range(area):
            yield share
        call.give(share)
