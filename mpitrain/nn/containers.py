"""Layers made of layers: one after another, and around a shortcut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeGuard

from mpitrain._errors import InputError
from mpitrain._options import check_kind
from mpitrain._typing import Array, Tree
from mpitrain.nn import checks
from mpitrain.nn.activations import Activation
from mpitrain.nn.layer import Call, Context, Layer, Parameter


class _Container(Layer):
    """Named children; each is handed its own part of parameters and gradients, and has a context of its own."""

    def __init__(self, *children: tuple[str, Layer]) -> None:
        for name, layer in children:
            if "." in name:
                raise InputError(f"{type(self).__name__}: a layer's name has a dot in it", got=repr(name))
            check_kind(
                type(self).__name__, f"layer {name}", layer, Layer, "a layer of mpitrain.nn, e.g. Linear(64, 10)"
            )
        self.children = children
        self.takes_indices = bool(children) and children[0][1].takes_indices

    def parameters(self) -> Sequence[Parameter]:
        """Return the children's parameters."""
        return [p.under(name) for name, layer in self.children for p in layer.parameters()]

    def ties(self) -> Mapping[str, str]:
        """Return the children's ties."""
        return {
            f"{name}.{alias}": f"{name}.{tensor}"
            for name, layer in self.children
            for alias, tensor in layer.ties().items()
        }

    def _passes(self, context: Context) -> Iterator[tuple[str, Layer, Context]]:
        """Yield name, layer and context of each child, the last one first."""
        for (name, layer), child in zip(reversed(self.children), reversed(context.children), strict=True):
            yield name, layer, child


class Sequential(_Container):
    """One layer after another; the children are named ``"0"``, ``"1"`` and so on, or as they are given.

    Parameters
    ----------
    *layers, **named : Layer
        The layers, in order; with none, the output is the input.

    Attributes
    ----------
    applied : dict of int to Activation
        By the number of each layer that applies it to its own output, part by part: the activation behind it.
    """

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        super().__init__(*((str(number), layer) for number, layer in enumerate(layers)), *named.items())
        every = (*layers, *named.values())
        trained = [number for number, layer in enumerate(every) if layer.parameters()]
        self._untrained = trained[0] if trained else len(every)  # how many layers at the front have no parameters
        self.applied = {
            number: after
            for number, (layer, after) in enumerate(pairwise(every))
            if _says(layer, "applies_activations") and _overwrites(after)
        }

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in order."""
        return tuple(layer for _, layer in self.children)

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Run the layers in order."""
        context = call.context()
        for number, (name, layer) in enumerate(self.children):
            inner = call.child(name)
            if number - 1 in self.applied:
                context.children.append(self.applied[number - 1].applied(x, inner))
                continue
            if number in self.applied:
                inner = replace(inner, activation=self.applied[number])
            x, child = layer.forward(params.get(name, {}), x, inner)
            context.children.append(child)
        return x, context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Run the layers' input gradients in reverse, and keep each layer's ``dy`` for `backward_weight`."""
        context["gradients"] = gradients = []
        for name, layer, child in self._passes(context):
            gradients.append(dy)
            dy = layer.backward_input(params.get(name, {}), child, dy, call)
        return dy

    def backward_within(self, params: Tree, context: Context, dy: Array, call: Call) -> None:
        """Do as `backward_input` where the input needs no gradient: no further than to the first parameters."""
        context["gradients"] = gradients = []
        for number, (name, layer, child) in enumerate(self._passes(context), start=1):
            gradients.append(dy)
            if number < len(self.children) - self._untrained:
                dy = layer.backward_input(params.get(name, {}), child, dy, call)
                continue
            if isinstance(layer, Sequential):
                layer.backward_within(params.get(name, {}), child, dy, call)
            elif type(layer).backward is not Layer.backward:  # one that prepares there what its weights need
                layer.backward_input(params.get(name, {}), child, dy, call)
            return

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the layers' gradients, from what `backward_input` kept."""
        for (name, layer, child), gradient in zip(self._passes(context), context["gradients"], strict=False):
            layer.backward_weight(grads.get(name, {}), child, gradient, call)

    def backward(
        self, params: Tree, grads: Tree, context: Context, dy: Array, call: Call, want_dx: bool = True
    ) -> Array | None:
        """Run both passes layer by layer, giving memory back behind them, as far as a gradient is needed."""
        above: list[Context] = []  # the contexts in which dy may lie
        spare = False  # whether nobody else needs dy
        for number, (name, layer, child) in enumerate(self._passes(context), start=1):
            wanted = want_dx or number < len(self.children) - self._untrained
            dx: Array | None = dy
            if spare and _overwrites(layer):
                layer.gradient(child["x"], child["y"], dy, dy, call)
            else:
                dx = layer.backward(params.get(name, {}), grads.get(name, {}), child, dy, call.below(name), wanted)
            if dx is None:
                return None
            if not call.xp.may_share_memory(dx, dy):
                spare = True
                for finished in above:
                    finished.release()
                above.clear()
            above.append(child)
            dy = dx
        return dy


def _overwrites(layer: Layer) -> TypeGuard[Activation]:
    return isinstance(layer, Activation) and _says(layer, "overwrites")


def _says(layer: Layer, name: str) -> bool:
    """Tell whether a layer's class sets an attribute; one that inherits it may compute something else."""
    return bool(vars(type(layer)).get(name))


class Residual(_Container):
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
        super().__init__(("inner", inner), ("shortcut", shortcut if shortcut is not None else Sequential()))

    def forward(self, params: Tree, x: Array, call: Call) -> tuple[Array, Context]:
        """Run both branches and add."""
        context, branches = call.context(), []
        for name, layer in self.children:
            y, child = layer.forward(params.get(name, {}), x, call.child(name))
            context.children.append(child)
            branches.append(y)
        checks.same_shape("Residual", branches[0].shape, branches[1].shape)
        return _sum(branches, context, call), context

    def backward_input(self, params: Tree, context: Context, dy: Array, call: Call) -> Array:
        """Return the sum of the branches' input gradients."""
        parts = [
            layer.backward_input(params.get(name, {}), child, dy, call) for name, layer, child in self._passes(context)
        ]
        return _sum(parts, context, call)

    def backward_weight(self, grads: Tree, context: Context, dy: Array, call: Call) -> None:
        """Add the gradients of both branches."""
        for name, layer, child in self._passes(context):
            layer.backward_weight(grads.get(name, {}), child, dy, call)

    def backward(
        self, params: Tree, grads: Tree, context: Context, dy: Array, call: Call, want_dx: bool = True
    ) -> Array | None:
        """Run both passes of each branch."""
        parts = [
            layer.backward(params.get(name, {}), grads.get(name, {}), child, dy, call.below(name), want_dx)
            for name, layer, child in self._passes(context)
        ]
        return _sum([part for part in parts if part is not None], context, call) if want_dx else None


def _sum(parts: list[Array], context: Context, call: Call) -> Array:
    total = context.take(parts[0].shape, parts[0].dtype)
    call.xp.add(*parts, out=total)
    return total
