"""Two-dimensional convolution, as matrix products over patches of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mpitrain._typing import Array, Shape, Tree
from mpitrain.nn import checks, kernel
from mpitrain.nn.initial import he_uniform, zeros
from mpitrain.nn.layer import Call, Context, Layer, Parameter
from mpitrain.nn.reductions import column_sums
from mpitrain.nn.windows import offsets, output_size, window

_BLOCK_BYTES = 1 << 21
"""Patches are gathered for so many bytes' worth of samples at a time: they stay in cache, and memory stays bounded."""


class Conv2d(Layer):
    """Cross-correlate images with kernels: (n, H, W, in_channels) to (n, H', W', out_channels).

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output.
    kernel_size, stride, padding : int or (int, int)
        Height and width; the border is padded with zeros.  H' = ⌊(H + 2·padding − kernel_size) / stride⌋ + 1.
    bias : bool
        Whether to add ``bias``, shape (out_channels,), initially zero.  Superfluous before a BatchNorm.

    Notes
    -----
    ``weight`` has shape (KH, KW, in_channels, out_channels) and is drawn by `he_uniform`.  Patches (im2col:
    Chellapilla, Puri, Simard, IWFHR 2006) are gathered again for the weights' gradient instead of kept: they are
    KH·KW times as large as the image, and gathering costs little beside the product.
    """

    applies_activations = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
    ) -> None:
        self.in_channels = checks.positive("Conv2d: in_channels", in_channels)
        self.out_channels = checks.positive("Conv2d: out_channels", out_channels)
        self.kernel_size = checks.pair("Conv2d: kernel_size", kernel_size)
        self.stride = checks.pair("Conv2d: stride", stride)
        self.padding = checks.pair("Conv2d: padding", padding, least=0)
        self.bias = bias

    @property
    def patch_size(self) -> int:
        """Number of inputs that each output sums."""
        return self.kernel_size[0] * self.kernel_size[1] * self.in_channels

    def parameters(self) -> Sequence[Parameter]:
        """Return the weight, and the bias if there is one."""
        shape = (*self.kernel_size, self.in_channels, self.out_channels)
        weight = Parameter("weight", shape, he_uniform(self.patch_size))
        bias = Parameter("bias", (self.out_channels,), zeros, "no_decay")
        return (weight, bias) if self.bias else (weight,)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Multiply the patches under all output pixels by the kernel."""
        checks.images("Conv2d", x, self.kernel_size, self.padding)
        checks.last_axis("Conv2d", x, self.in_channels)
        context = call.context()
        context["x"] = x
        size = output_size(self._padded(x.shape), self.kernel_size, self.stride)
        context["output_shape"] = shape = (x.shape[0], *size, self.out_channels)
        y = context.take(shape, x.dtype)
        weight = params["weight"].reshape(self.patch_size, self.out_channels)
        bias = self._bias_of_rows(params, y, call)
        for patches, rows in self._patches(x, y, call):
            call.xp.matmul(patches, weight, out=rows)
            if bias is not None:
                pixels = rows.reshape(-1, bias.size)
                pixels += bias
            if call.activation is not None:
                call.activation.value(rows, rows, call)
        return y, context

    def _bias_of_rows(self, params: Tree, y: Array, call: Call) -> Array | None:
        """Return the bias once for each pixel in a row of ``y``: NumPy adds long rows in less time than short ones."""
        return call.xp.tile(params["bias"], y.shape[2]) if self.bias else None

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Bring together what the outputs send back to each pixel."""
        checks.gradient("Conv2d", dy.shape, context["output_shape"])
        rest = [size - 1 - margin for size, margin in zip(self.kernel_size, self.padding, strict=True)]
        if self.stride == (1, 1) and min(rest) >= 0 and not kernel.has_patches_of(dy):
            return self._gathered(params, context, dy, (rest[0], rest[1]), call)
        return self._added(params, context, dy, call)

    def _gathered(self, params: Tree, context: Context, dy: Array, border: tuple[int, int], call: Call) -> Array:
        """Correlate ``dy`` with the kernel turned by 180°: each pixel is written once, by a product of long rows."""
        dx = context.take(context["x"].shape, dy.dtype)
        turned = params["weight"][::-1, ::-1].swapaxes(2, 3).reshape(-1, self.in_channels)
        n, height, width, channels = dy.shape
        (top, left), block = border, self._samples(dx.shape, turned.shape[0], dx.dtype.itemsize)
        padded = call.take((block, height + 2 * top, width + 2 * left, channels), dy.dtype)
        padded[...] = 0
        gathered = call.take((block, *dx.shape[1:3], *self.kernel_size, channels), dy.dtype)
        patches = _view_patches(padded, gathered.shape, self.stride, call.xp)
        for start in range(0, n, block):
            count = min(block, n - start)
            padded[:count, top : top + height, left : left + width] = dy[start : start + count]
            part = gathered[:count]
            part[...] = patches[:count]
            rows = dx[start : start + count].reshape(-1, self.in_channels)
            call.xp.matmul(part.reshape(rows.shape[0], turned.shape[0]), turned, out=rows)
        call.give(padded, gathered)
        return dx

    def _added(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Add up what each output sends back to the pixels of its patch."""
        dx, weight = context.take(context["x"].shape, dy.dtype), params["weight"].reshape(-1, self.out_channels)
        n, height, width, channels = dy.shape
        block = self._samples(dy.shape, self.patch_size, dy.itemsize)
        patches = call.take((block, height, width, *self.kernel_size, self.in_channels), dy.dtype)
        for start in range(0, n, block):
            part, images = patches[: min(block, n - start)], dx[start : start + block]
            rows = dy[start : start + block].reshape(-1, channels)
            call.xp.matmul(rows, weight.T, out=part.reshape(rows.shape[0], self.patch_size))
            images[...] = 0
            if not kernel.add_patches(part, images, self.stride, self.padding):
                self._add_windows(part, images, call)
        call.give(patches)
        return dx

    def _add_windows(self, patches: Array, images: Array, call: Call) -> None:
        """Add patches to images of zeros, one place of the kernel after another."""
        padded, (top, left) = call.take(self._padded(images.shape), images.dtype), self.padding
        padded[...] = 0
        for row, column in offsets(self.kernel_size):
            target = window(padded, row, column, patches.shape, self.stride)
            target += patches[:, :, :, row, column]
        images[...] = padded[:, top : top + images.shape[1], left : left + images.shape[2]]
        call.give(padded)

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the products of patches and ``dy``, and the sums of ``dy`` for the bias."""
        checks.gradient("Conv2d", dy.shape, context["output_shape"])
        product = call.take((self.patch_size, self.out_channels), dy.dtype)
        total = grads["weight"].reshape(product.shape)
        for patches, rows in self._patches(context["x"], dy, call):
            call.xp.matmul(patches.T, rows, out=product)
            total += product
        call.give(product)
        if self.bias:
            grads["bias"][...] += column_sums(dy, call)

    def _padded(self, shape: Shape) -> Shape:
        """Return the shape of images with their border."""
        n, height, width, channels = shape
        top, left = self.padding
        return n, height + 2 * top, width + 2 * left, channels

    def _patches(self, images: Array, y: Array, call: Call) -> Iterator[tuple[Array, Array]]:
        """Yield, for some samples at a time, the patch under each output pixel, and the rows of ``y`` for them."""
        n, height, width, channels = y.shape
        block = self._samples(y.shape, self.patch_size, images.dtype.itemsize)
        gathered = call.take((block, height, width, *self.kernel_size, self.in_channels), images.dtype)
        for start in range(0, n, block):
            part, sources = gathered[: min(block, n - start)], images[start : start + block]
            if not kernel.take_patches(sources, part, self.stride, self.padding):
                self._take_windows(sources, part, call)
            pixels = part.shape[0] * height * width
            yield part.reshape(pixels, self.patch_size), y[start : start + block].reshape(pixels, channels)
        call.give(gathered)

    def _take_windows(self, images: Array, patches: Array, call: Call) -> None:
        """Write the patch under each output pixel."""
        padded, (top, left) = call.take(self._padded(images.shape), images.dtype), self.padding
        padded[...] = 0
        padded[:, top : top + images.shape[1], left : left + images.shape[2]] = images
        patches[...] = _view_patches(padded, patches.shape, self.stride, call.xp)
        call.give(padded)

    def _samples(self, images: Shape, patch_size: int, itemsize: int) -> int:
        """Return for how many samples patches are gathered at a time, one patch for each pixel of ``images``."""
        sample_bytes = images[1] * images[2] * patch_size * itemsize
        return max(1, min(images[0], _BLOCK_BYTES // sample_bytes))


def _view_patches(padded: Array, shape: Shape, stride: tuple[int, int], xp: Any) -> Array:
    """Return all patches as a view, shape (n, H', W', KH, KW, channels).

    What ``sliding_window_view`` and a transposition give, for a tenth of their overhead.
    """
    sample, row, column, channel = padded.strides
    strides = (sample, row * stride[0], column * stride[1], row, column, channel)
    patches: Array = xp.lib.stride_tricks.as_strided(padded, shape, strides)
    return patches
