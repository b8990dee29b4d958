"""Layers made of layers: one after another, and around a shortcut."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.layer import Call, Context, Layer, Parameter


class Sequential(Layer):
    """One layer after another; the children are named ``"0"``, ``"1"`` and so on.

    Parameters
    ----------
    *layers : Layer
        The layers; with none, the output is the input.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers
        self.children = tuple((str(number), layer) for number, layer in enumerate(layers))
        self.takes_indices = bool(layers) and layers[0].takes_indices

    def parameters(self) -> Sequence[Parameter]:
        """Return the children's parameters."""
        return [p.under(name) for name, layer in self.children for p in layer.parameters()]

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Run the layers in order."""
        context = call.context()
        for name, layer in self.children:
            x, child = layer.forward(params.get(name, {}), x, call.child(name))
            context.children.append(child)
        return x, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Run the layers' input gradients in reverse, and keep each layer's ``dy`` for `backward_weight`."""
        gradients = []
        for (name, layer), child in zip(reversed(self.children), reversed(context.children), strict=True):
            gradients.append(dy)
            dy = layer.backward_input(params.get(name, {}), child, dy, call)
        context["gradients"] = gradients[::-1]
        return dy

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the layers' gradients, from what `backward_input` kept."""
        for (name, layer), child, gradient in zip(self.children, context.children, context["gradients"], strict=True):
            layer.backward_weight(grads.get(name, {}), child, gradient, call)

    def backward(
        self, params: Tree, grads: Tree, context: Context, dy: Array, call: Call, want_dx: bool = True
    ) -> Array | None:
        """Run both passes layer by layer, giving memory back behind them."""
        dx: Array | None = dy
        above: list[Context] = []  # the contexts that dx may lie in
        for number in reversed(range(len(self.children))):
            (name, layer), child = self.children[number], context.children[number]
            wanted = want_dx or number > 0
            dx = layer.backward(params.get(name, {}), grads.get(name, {}), child, dy, call, wanted)
            if dx is None or not call.xp.may_share_memory(dx, dy):
                for finished in above:
                    finished.release()
                above.clear()
            above.append(child)
            dy = dx if dx is not None else dy
        return dx


class Residual(Layer):
    """The sum of two branches: ``y = inner(x) + shortcut(x)``; the children are named ``inner`` and ``shortcut``.

    Parameters
    ----------
    inner : Layer
        The branch that learns the difference.
    shortcut : Layer, optional
        What brings ``x`` to the shape of the other branch; None: ``x`` as it is.

    Notes
    -----
    He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, equations 1 and 2.
    """

    def __init__(self, inner: Layer, shortcut: Layer | None = None) -> None:
        self.inner = inner
        self.shortcut = shortcut if shortcut is not None else Sequential()
        self.takes_indices = inner.takes_indices

    def parameters(self) -> Sequence[Parameter]:
        """Return the parameters of both branches."""
        return [p.under("inner") for p in self.inner.parameters()] + [
            p.under("shortcut") for p in self.shortcut.parameters()
        ]

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Run both branches and add."""
        context = call.context()
        inner, inner_context = self.inner.forward(params.get("inner", {}), x, call.child("inner"))
        shortcut, shortcut_context = self.shortcut.forward(params.get("shortcut", {}), x, call.child("shortcut"))
        checks.same_shape("Residual", inner.shape, shortcut.shape)
        context.children += [inner_context, shortcut_context]
        y = context.take(inner.shape, inner.dtype)
        call.xp.add(inner, shortcut, out=y)
        return y, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the sum of the branches' input gradients."""
        inner, shortcut = context.children
        d_inner = self.inner.backward_input(params.get("inner", {}), inner, dy, call)
        d_shortcut = self.shortcut.backward_input(params.get("shortcut", {}), shortcut, dy, call)
        dx = context.take(d_inner.shape, dy.dtype)
        call.xp.add(d_inner, d_shortcut, out=dx)
        return dx

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the gradients of both branches."""
        inner, shortcut = context.children
        self.inner.backward_weight(grads.get("inner", {}), inner, dy, call)
        self.shortcut.backward_weight(grads.get("shortcut", {}), shortcut, dy, call)
