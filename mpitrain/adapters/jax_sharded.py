"""A JAX loss and its gradient while a method keeps the parameters divided: they are brought unit by unit.

Between the passes only what one unit hands to another is kept.  A unit's parameters are in memory only while it runs.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mpitrain._typing import Array, Tree
from mpitrain.adapters.jax_cutting import Program, Unit, cut
from mpitrain.adapters.jax_units import CompiledUnit, Compiler
from mpitrain.adapters.tree import find

_RELEASE_S = 10.0
"""How long to wait until JAX lets go of what it was lent; then the method reports it (`mpitrain.arrays.Loans`)."""

_CALLING = threading.Lock()
"""Held while a unit is called: ranks in one process share its functions, and derivative rules keep notes while traced.

Older versions of JAX let two threads trace one function at once.
"""

Receive = Callable[[str, Array], None]
"""Is handed a gradient by name, which is its alone until it returns."""


class ShardedLoss:
    """The value and gradient of a function of parameters that are not all there.

    Parameters
    ----------
    function : callable
        ``function(parameters, *arguments)`` returns a scalar; parameters come as a list.
    names, shapes : sequence
        The parameters' names, and what JAX has to know of each: ``jax.ShapeDtypeStruct``.
    layer_of : callable
        Returns the layer of a name: what a method brings together.

    Notes
    -----
    A program is traced, cut and compiled for each shape of the arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        names: Sequence[str],
        shapes: Sequence[Any],
        layer_of: Callable[[str], str],
    ) -> None:
        self._names, self._shapes, self._layer_of = names, shapes, layer_of
        self._traced = jax.make_jaxpr(lambda *arguments: _apart(function(*arguments)))
        self._compiler = Compiler()
        self._steps: dict[Any, Steps] = {}

    def steps(self, arguments: Sequence[Any]) -> Steps:
        """Return what is to be done for arguments of such shapes."""
        leaves, tree = jax.tree_util.tree_flatten(arguments)
        kind = tree, tuple((each.shape, each.dtype) for each in leaves)
        if kind not in self._steps:
            traced = self._traced(list(self._shapes), *arguments)
            self._steps[kind] = Steps(cut(traced, self._names, self._layer_of), self._compiler)
        return self._steps[kind]


class Steps:
    """A program that is run forward and backward.

    Parameters
    ----------
    program : Program
        What it is.
    compiler : Compiler
        Compiles its units.

    Attributes
    ----------
    reads : list of tuple of str
        The parameters of each unit of which it gives gradients.
    """

    def __init__(self, program: Program, compiler: Compiler) -> None:
        self._program = program
        self._moving: list[list[Any]] = []  # by unit, the inputs that are given a gradient
        self._varying: list[list[Any]] = []  # and the outputs from whose gradients it follows
        self._plan()
        self._compiled = [self._compile(number, compiler) for number in range(len(program.units))]
        self.reads = [unit.reads for number, unit in enumerate(program.units) if self._is_pulled(number)]

    def _plan(self) -> None:
        """Find out, from the last unit to the first, which gradients are asked for."""
        last, asked = self._program.units[-1], set[Any]()
        for unit in reversed(self._program.units):
            varying = [var for var in unit.outputs if var in asked]
            moving = [var for var in unit.inputs if var in self._program.varying]
            self._varying.insert(0, varying)
            self._moving.insert(0, moving)
            asked.update(moving if varying or unit is last else ())

    def _is_pulled(self, number: int) -> bool:
        """Tell whether a unit is run backward."""
        return bool(self._varying[number]) or number == len(self._program.units) - 1

    def _compile(self, number: int, compiler: Compiler) -> CompiledUnit:
        unit = self._program.units[number]
        parameters = range(len(unit.reads))
        moving = [len(parameters) + unit.inputs.index(var) for var in self._moving[number]]
        varying = [unit.outputs.index(var) for var in self._varying[number]]
        return compiler.compiled(unit, [*parameters, *moving], varying)

    def run(self, tree: Tree, arguments: Sequence[Any], receive: Receive) -> float:
        """Return the value; hand the gradient of each unit's parameters to ``receive``, the last unit's first.

        Parameters
        ----------
        tree : nested mapping
            Gives a parameter for as long as it is held, see `mpitrain.arrays.ParameterTree`.
        arguments : sequence
            Trees of arrays, of the shapes for which the program was made.
        receive : callable
            See `Receive`.  A parameter that several units read comes once from each.
        """
        program = self._program
        known = dict(zip(program.arguments, jax.tree_util.tree_leaves(arguments), strict=True)) | program.constants
        for unit, compiled in zip(program.units[:-1], self._compiled, strict=False):
            outputs = _with_parameters(tree, unit, known, compiled.forward)
            known.update(zip(unit.outputs, outputs, strict=True))
        value, found = _with_parameters(tree, program.units[-1], known, self._compiled[-1].last)
        self._pull(tree, known, found, receive)
        return float(value)

    def _pull(self, tree: Tree, known: dict[Any, Any], found: Sequence[Any], receive: Receive) -> None:
        """Go backward from the gradients of the last unit's inputs."""
        gradients: dict[Any, Any] = {}
        for number in reversed(range(len(self._program.units))):
            unit = self._program.units[number]
            if not self._is_pulled(number):
                continue
            if unit is not self._program.units[-1]:
                outer = [gradients.pop(var) for var in self._varying[number]]
                found = _with_parameters(tree, unit, known, self._compiled[number].backward, outer)
            for var in unit.outputs:
                known.pop(var, None)
            for name, gradient in zip(unit.reads, found, strict=False):
                receive(name, np.asarray(gradient))
            for var, gradient in zip(self._moving[number], found[len(unit.reads) :], strict=True):
                gradients[var] = gradients[var] + gradient if var in gradients else gradient


def _with_parameters(tree: Tree, unit: Unit, known: dict[Any, Any], function: Callable[..., Any], *others: Any) -> Any:
    """Call a unit's function, and return when it is done with the parameters, which may be overwritten from then on."""
    copies = [np.array(find(tree, name)) for name in unit.reads[: unit.copied]]  # another layer takes their place
    with _Shown(find(tree, name) for name in unit.reads[unit.copied :]) as lent:
        inputs = [*copies, *lent, *(known[var] for var in unit.inputs)]
        with _CALLING:
            found = function(inputs, *others)
        return jax.block_until_ready(found)


class _Shown:
    """JAX arrays over the memory of arrays, for a while; on another device than the CPU copies there.

    JAX runs what it is handed some time later, and lets go of NumPy's arrays later still, when garbage is collected.
    So the memory is shown by DLPack, which gives it back when told to; and a thread of JAX's may be a moment late.
    """

    def __init__(self, arrays: Iterable[Array]) -> None:
        on_host = jax.default_backend() == "cpu"
        self._lent: list[weakref.ref[Array]] = []
        self._shown = []
        for array in arrays:
            if on_host:
                self._lent.append(weakref.ref(array))
            self._shown.append(jax.dlpack.from_dlpack(array) if on_host else jax.device_put(np.array(array)))

    def __enter__(self) -> list[Any]:
        return self._shown

    def __exit__(self, *_: object) -> None:
        for shown in self._shown:
            shown.delete()
        deadline = time.monotonic() + _RELEASE_S
        while any(lent() is not None for lent in self._lent) and time.monotonic() < deadline:
            time.sleep(0)


def _apart(value: Any) -> Any:
    """Return a number as the outcome of an equation of its own, whatever it was."""
    value = jax.numpy.asarray(value)
    return jax.lax.mul(value, np.ones((), value.dtype))
