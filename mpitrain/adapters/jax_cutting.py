"""Cuts a traced JAX function into units, each of which reads few parameters: those of one layer, as far as it can.

A trace is a list of equations.  Parameters are inputs of some; all others go with what they follow.  What is made of
parameters alone and about as large, such as a cast or a transpose, is made in each unit that uses it: kept between
units, it would be the parameters that a method has sent away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.extend.core import Literal, Var

_CALLS = ("jit", "call", "closed_call", "remat2")
"""Equations that stand for others, which are taken in their place."""

_SMALL = 4
"""What is at least so many times smaller counts as little: values made of parameters that may be kept between units,
and the parameters of other layers that a unit may read beside those of its own."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Equations that run together.

    Parameters
    ----------
    reads : tuple of str
        Names of the parameters that it reads, layer by layer, the largest layer last.
    copied : int
        How many of them belong to the other layers, and are copied.
    inputs, outputs : tuple of Var
        Further inputs, and what later units or the caller want.
    jaxpr : Jaxpr
        The equations, from ``reads`` and ``inputs`` to ``outputs``.
    """

    reads: tuple[str, ...]
    copied: int
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    jaxpr: Any


@dataclass(frozen=True)
class Program:
    """A function as units, one after the other.

    Parameters
    ----------
    units : tuple of Unit
        The last one gives the function's value, and nothing else.
    arguments : tuple of Var
        The function's arguments that are no parameters.
    constants : dict of Var to array
        Arrays that the function refers to without being handed them.
    varying : set of Var
        The parameters, and the floating-point variables that have a derivative with respect to them.
    """

    units: tuple[Unit, ...]
    arguments: tuple[Any, ...]
    constants: dict[Any, Any]
    varying: Collection[Any]


def cut(traced: Any, names: Sequence[str], layer_of: Callable[[str], str]) -> Program:
    """Return the program of a traced function.

    Parameters
    ----------
    traced : ClosedJaxpr
        Its first inputs are the parameters; one output, which an equation of its own gives.
    names : sequence of str
        The parameters' names.
    layer_of : callable
        Returns the layer of a name.
    """
    constants: dict[Any, Any] = {}
    arguments = tuple(traced.jaxpr.invars)
    eqns: list[Any] = []
    (value,) = _open(traced, arguments, eqns, constants)
    eqns = _needed(eqns, value)
    parameters = dict(zip(arguments, names, strict=False))
    cutter = _Cutter(traced.jaxpr, eqns, parameters, layer_of)
    return Program(cutter.units(value), arguments[len(names) :], constants, _varying(eqns, parameters))


def _open(jaxpr: Any, arguments: Iterable[Any], eqns: list[Any], constants: dict[Any, Any]) -> list[Any]:
    """Append the equations of a jaxpr, and of those that it calls, to ``eqns``; return where its outputs are."""
    names: dict[Any, Any] = {}
    if hasattr(jaxpr, "consts"):
        jaxpr, values = jaxpr.jaxpr, jaxpr.consts
        names = {var: Var(var.aval) for var in jaxpr.constvars}
        constants.update(zip(names.values(), values, strict=True))
    names.update(zip(jaxpr.invars, arguments, strict=True))

    def place(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else names[atom]

    for eqn in jaxpr.eqns:
        inputs = [place(atom) for atom in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            outputs = _open(inner, inputs, eqns, constants)
        else:
            outputs = [Var(var.aval) for var in eqn.outvars]
            eqns.append(eqn.replace(invars=inputs, outvars=outputs))
        names.update(zip(eqn.outvars, outputs, strict=True))
    return [place(atom) for atom in jaxpr.outvars]


def _variables(eqn: Any) -> Iterator[Any]:
    return (atom for atom in eqn.invars if not isinstance(atom, Literal))


def _needed(eqns: Sequence[Any], value: Any) -> list[Any]:
    """Return the equations on which a value depends, and those with effects."""
    wanted, found = {value}, []
    for eqn in reversed(eqns):
        if eqn.effects or not wanted.isdisjoint(eqn.outvars):
            found.append(eqn)
            wanted.update(_variables(eqn))
    return found[::-1]


def _varying(eqns: Iterable[Any], parameters: Iterable[Any]) -> set[Any]:
    """Return the floating-point variables that depend on parameters, as far as a derivative goes."""
    found = set(parameters)
    for eqn in eqns:
        if eqn.primitive.name != "stop_gradient" and not found.isdisjoint(_variables(eqn)):
            found.update(var for var in eqn.outvars if _is_floating(var))
    return found


def _is_floating(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)


def _size(variables: Iterable[Any]) -> int:
    return sum(prod(getattr(var.aval, "shape", ())) for var in variables)


class _Cutter:
    """Goes through equations by number, and begins a new unit where the one at hand would read too much."""

    def __init__(
        self, whole: Any, eqns: Sequence[Any], parameters: Mapping[Any, str], layer_of: Callable[[str], str]
    ) -> None:
        self._whole, self._eqns, self._parameters, self._layer_of = whole, eqns, parameters, layer_of
        self._order = {name: number for number, name in enumerate(parameters.values())}
        self._sizes = Counter[str]()  # of layers, all of which comes with any of their tensors
        for var, name in parameters.items():
            self._sizes[layer_of(name)] += _size([var])
        self._made_of: dict[Any, frozenset[Any]] = {var: frozenset((var,)) for var in parameters}
        self._maker: dict[Any, int] = {}  # of what is made in each unit that uses it
        for number, eqn in enumerate(eqns[:-1]):
            self._consider(number, eqn)

    def _consider(self, number: int, eqn: Any) -> None:
        """Find out whether an equation only prepares parameters (or nothing, as those of a mask do)."""
        inputs = list(_variables(eqn))
        if eqn.effects or not all(var in self._made_of for var in inputs):
            return
        sources = frozenset().union(*(self._made_of[var] for var in inputs))
        if sources and _size(eqn.outvars) * _SMALL <= _size(sources):
            return
        for var in eqn.outvars:
            self._made_of[var], self._maker[var] = sources, number

    def units(self, value: Any) -> tuple[Unit, ...]:
        """Return the units that lead to a value."""
        prepared = set(self._maker.values())
        runs, layers = [set[int]()], set[str]()
        for number in range(len(self._eqns)):
            if number in prepared:
                continue
            new = self._with_preparations(number)
            more = set(self._read(self._eqns[each] for each in new))
            if runs[-1] and not self._fit(layers | more):
                runs.append(set())
                layers = set()
            runs[-1] |= new
            layers |= more
        parts = [[self._eqns[number] for number in sorted(run)] for run in runs]
        taken = [self._taken(part) for part in parts]
        wanted = {value}.union(*taken)
        return tuple(self._unit(part, inputs, wanted) for part, inputs in zip(parts, taken, strict=True))

    def _with_preparations(self, number: int) -> set[int]:
        """Return an equation's number, with those that make of parameters what it takes."""
        found, todo = {number}, [number]
        while todo:
            makers = {self._maker[var] for var in _variables(self._eqns[todo.pop()]) if var in self._maker}
            todo.extend(makers - found)
            found |= makers
        return found

    def _fit(self, layers: Iterable[str]) -> bool:
        """Tell whether layers are one, and little beside it; or none."""
        sizes = [self._sizes[layer] for layer in layers]
        return not sizes or (sum(sizes) - max(sizes)) * _SMALL <= max(sizes)

    def _read(self, eqns: Iterable[Any]) -> dict[str, list[Any]]:
        """Return the parameters that are read, by layer."""
        found: dict[str, list[Any]] = {}
        for var in {var for eqn in eqns for var in _variables(eqn) if var in self._parameters}:
            found.setdefault(self._layer_of(self._parameters[var]), []).append(var)
        return found

    def _taken(self, eqns: Sequence[Any]) -> dict[Any, None]:
        """Return what equations take from elsewhere, parameters aside, in order."""
        made = {var for eqn in eqns for var in eqn.outvars}
        taken = (var for eqn in eqns for var in _variables(eqn))
        return dict.fromkeys(var for var in taken if var not in made and var not in self._parameters)

    def _unit(self, eqns: list[Any], inputs: Iterable[Any], wanted: Collection[Any]) -> Unit:
        layers = self._read(eqns)
        ordered = [sorted(layers[layer], key=self._place) for layer in sorted(layers, key=self._rank)]
        reads = [var for layer in ordered for var in layer]
        made = (var for eqn in eqns for var in eqn.outvars if var not in self._maker)
        outputs = tuple(var for var in made if var in wanted)
        effects = frozenset().union(*(eqn.effects for eqn in eqns))
        jaxpr = self._whole.replace(
            constvars=(), invars=[*reads, *inputs], outvars=list(outputs), eqns=eqns, effects=effects
        )
        names = tuple(self._parameters[var] for var in reads)
        return Unit(names, len(reads) - len(ordered[-1]) if ordered else 0, tuple(inputs), outputs, jaxpr)

    def _rank(self, layer: str) -> tuple[int, str]:
        return self._sizes[layer], layer

    def _place(self, parameter: Any) -> int:
        return self._order[self._parameters[parameter]]
