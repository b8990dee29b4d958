"""Compiles the units of a program, forward and backward; units that do the same are compiled once.

Backward, a unit is computed again: what a JAX function saves for its derivative has parameters in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from mpitrain.adapters.jax_cutting import Unit


class CompiledUnit:
    """A unit as two or three compiled functions, each compiled when it is first called.

    Parameters
    ----------
    jaxpr : Jaxpr
        The unit's.
    moving : sequence of int
        Which inputs are differentiated, parameters among them.
    varying : sequence of int
        Which outputs have a derivative.

    Attributes
    ----------
    forward : callable
        Returns the outputs for a list of the inputs.
    backward : callable
        Returns the gradients of the ``moving`` inputs for a list of the inputs and one of the gradients of the
        ``varying`` outputs.
    last : callable
        Returns the single output for a list of the inputs, and its derivative by the ``moving`` inputs.
    """

    def __init__(self, jaxpr: Any, moving: Sequence[int], varying: Sequence[int]) -> None:
        run = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))

        def outputs_of(inputs: Sequence[Any]) -> Callable[..., list[Any]]:
            def outputs(*values: Any) -> list[Any]:
                given = dict(zip(moving, values, strict=True))
                return list(run(*(given.get(number, each) for number, each in enumerate(inputs))))

            return outputs

        def backward(inputs: Sequence[Any], gradients: Sequence[Any]) -> tuple[Any, ...]:
            outputs = outputs_of(inputs)
            _, pull = jax.vjp(
                lambda *values: [outputs(*values)[number] for number in varying], *(inputs[each] for each in moving)
            )
            found: tuple[Any, ...] = pull(list(gradients))
            return found

        def last(inputs: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
            outputs, values = outputs_of(inputs), [inputs[each] for each in moving]
            value, pull = jax.vjp(lambda *values: outputs(*values)[0], *values)
            return value, pull(jax.numpy.ones_like(value))

        self.forward = jax.jit(lambda inputs: list(run(*inputs)))
        self.backward, self.last = jax.jit(backward), jax.jit(last)


class Compiler:
    """Compiles units; those whose equations are the same share what is compiled."""

    def __init__(self) -> None:
        self._compiled: dict[Any, CompiledUnit] = {}

    def compiled(self, unit: Unit, moving: Sequence[int], varying: Collection[int]) -> CompiledUnit:
        """Return a unit's functions; see `CompiledUnit`."""
        what = _signature(unit.jaxpr), tuple(moving), tuple(varying)
        try:
            if what not in self._compiled:
                self._compiled[what] = CompiledUnit(unit.jaxpr, *what[1:])
        except TypeError:  # an equation has what cannot be compared, such as an array
            return CompiledUnit(unit.jaxpr, *what[1:])
        return self._compiled[what]


def _signature(jaxpr: Any) -> tuple[Any, ...]:
    """Return a value that is equal for jaxprs that do the same: their equations, with variables numbered in order."""
    numbers = {var: number for number, var in enumerate(jaxpr.invars)}
    rows: list[Any] = [tuple(var.aval for var in jaxpr.invars)]
    for eqn in jaxpr.eqns:
        inputs = tuple(_value(atom) if isinstance(atom, Literal) else numbers[atom] for atom in eqn.invars)
        numbers.update({var: len(numbers) + number for number, var in enumerate(eqn.outvars)})
        outputs = tuple(var.aval for var in eqn.outvars)
        rows.append((eqn.primitive, inputs, outputs, eqn.ctx, tuple(sorted(eqn.params.items()))))
    return (*rows, tuple(numbers[var] for var in jaxpr.outvars))


def _value(literal: Any) -> tuple[Any, bytes]:
    return literal.aval, np.asarray(literal.val).tobytes()
