"""From the tensors that a layer wants to the layout in which they lie."""

from __future__ import annotations

from typing import Any

from mpitrain._errors import InputError
from mpitrain.arrays import Layout
from mpitrain.nn.layer import Layer


def layout_of(layer: Layer, dtype: Any) -> Layout:
    """Return the layout of a layer's tensors, each of which has one place, however many names.

    Raises
    ------
    InputError
        Two tensors have one name, or a tie is between tensors that are not there, or differ in shape.
    """
    parameters, ties = layer.parameters(), layer.ties()
    wanted = {parameter.name: parameter for parameter in parameters}
    for alias, name in ties.items():
        shapes = [wanted[each].shape if each in wanted else None for each in (alias, name)]
        if shapes[0] is None or shapes[0] != shapes[1]:
            raise InputError(f"{alias!r} cannot be tied to {name!r}", got=shapes, expected="two tensors of one shape")
    return Layout.build([each.segment() for each in parameters if each.name not in ties], dtype, ties)
