"""A PyTorch module whose parameters are not all there: each is brought for the functions that read it.

Whatever a module does with a parameter goes through a function of PyTorch's, be it in the module that owns it, in
another one, or under a tie.  So functions are what is watched, not modules.  What autograd saves of a parameter for a
backward pass, the module's own ones too, is remembered by name and brought again there.  What is computed again there
(``torch.utils.checkpoint``) reads copies, for PyTorch keeps them until it has used them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from mpitrain._typing import Tree
from mpitrain.adapters.tree import find

_NOT_READING = frozenset(
    getattr(getattr(torch.Tensor, name), access)
    for name, access in (
        ("grad", "__get__"), ("grad", "__set__"), ("requires_grad", "__get__"), ("shape", "__get__"),
        ("ndim", "__get__"), ("dtype", "__get__"), ("device", "__get__"),
    )
)  # fmt: skip
"""What may be asked of a parameter without its values."""


_PASSES = (
    {torch.autograd.backward, torch.autograd.grad}
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 5)
    else ()
)
"""Backward passes, which may begin at edges of the graph; not yet in PyTorch 2.4."""

_INCOMING = ("grad_outputs", "grad_tensors")
"""How backward passes call the gradients that they begin with."""


def can_gather(module: torch.nn.Module) -> bool:
    """Tell whether all functions that a module calls can be seen: none of it is scripted, traced or compiled."""
    return not any(
        isinstance(each, torch.jit.ScriptModule) or hasattr(each, "_orig_mod") or each._compiled_call_impl is not None
        for each in module.modules()
    )


def layer_of(module: torch.nn.Module, name: str) -> str:
    """Return the layer to which a tensor belongs: that of the module that owns it.

    Attention of PyTorch's hands its own weights and those of a module inside it to one function.
    """
    path = name.rpartition(".")[0]
    outer = (path[:end] for end, each in enumerate(f"{path}.") if each == ".")
    return next((each for each in outer if isinstance(module.get_submodule(each), torch.nn.MultiheadAttention)), path)


def send_away(parameters: Iterable[Any]) -> None:
    """Leave of each parameter its shape, filled with NaN, in no memory."""
    for parameter in parameters:
        parameter.data = torch.full((), float("nan"), dtype=parameter.dtype).expand(parameter.shape)


@contextmanager
def gathering(parameters: Mapping[str, Any], tree: Tree) -> Iterator[None]:
    """Bring parameters from ``tree`` for whatever reads them inside, forward and backward.

    Parameters
    ----------
    parameters : dict of str to torch.nn.Parameter
        By name; sent away.
    tree : nested mapping
        Gives the array of each for as long as it is held, see `mpitrain.arrays.ParameterTree`.
    """
    reads = _Reads(parameters, tree)
    with reads, saved_tensors_hooks(reads.pack, reads.unpack):
        yield


class _Saved(NamedTuple):
    """What autograd saved of a parameter: all of it or a view."""

    name: str
    size: Any
    stride: Any
    offset: int


class _Reads(TorchFunctionMode):  # type: ignore[misc]  # PyTorch is optional, and so unknown to the type checker
    """Sees every function of PyTorch's that is called."""

    def __init__(self, parameters: Mapping[str, Any], tree: Tree) -> None:
        super().__init__()
        self._parameters, self._tree = parameters, tree
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._lent: dict[int, str] = {}  # by address, what was lent there last; what came before is held no more

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NOT_READING:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in _PASSES and not kwargs.get("is_grads_batched"):
            return self._pass(func, *args, **kwargs)
        backwards = torch._C._current_graph_task_id() != -1  # a backward pass is on: so asks torch.utils.checkpoint
        read = dict.fromkeys(self._read((*args, *kwargs.values())))
        for name in read:
            self._parameters[name].data = self._tensor(name).clone() if backwards else self._tensor(name)
        try:
            return func(*args, **kwargs)
        finally:
            send_away(self._parameters[name] for name in read)

    def _backward(self, tensor: Any, gradient: Any = None, **options: Any) -> None:
        """Run ``tensor.backward()`` as the function that it calls."""
        with self:
            torch.autograd.backward(tensor, self._copied(gradient), **options)

    def _pass(
        self,
        func: Callable[..., Any],
        tensors: Any,
        inputs: Any = None,
        materialize_grads: bool = False,
        **options: Any,
    ) -> Any:
        """Run a backward pass that does see the functions that are called in it.

        While a function is handed to a mode, the mode is off.  Backward passes between edges of the graph, instead of
        tensors, are not handed to it.  (Older versions of PyTorch hand it none of ``backward``, and leave it on.)
        The gradients with which a pass begins are read by no function, hence copies of those that are parameters.
        """
        if func is torch.autograd.backward:
            for each in inputs or ():
                if isinstance(each, torch.Tensor):
                    each.retain_grad()  # an edge has no place for it
        edges, ends = _edges(tensors), inputs and _edges(inputs)
        with self:
            incoming = {name: self._copied(options.pop(name)) for name in _INCOMING if name in options}
            found = func(edges, inputs=ends, **incoming, **options)
        if materialize_grads:
            graph = options.get("create_graph", False)
            return tuple(
                torch.zeros_like(end, requires_grad=graph) if each is None else each
                for each, end in zip(found, inputs, strict=True)
            )
        return found

    def _copied(self, gradients: Any) -> Any:
        """Return one gradient or several, with a copy in place of each that is a parameter."""
        if id(gradients) in self._names:
            return gradients.clone()
        if gradients is None or isinstance(gradients, torch.Tensor):
            return gradients
        return tuple(map(self._copied, gradients))

    def _read(self, values: Iterable[Any]) -> Iterator[str]:
        for value in values:
            if isinstance(value, (list, tuple)):
                yield from self._read(value)
            elif id(value) in self._names:
                yield self._names[id(value)]

    def _tensor(self, name: str) -> Any:
        tensor = torch.from_numpy(find(self._tree, name))
        self._lent[tensor.data_ptr()] = name
        return tensor

    def pack(self, tensor: Any) -> Any:
        """Return what is kept of a tensor that a backward pass needs: itself, unless it lies in a parameter."""
        name = self._lent.get(tensor.untyped_storage().data_ptr())
        if name is None or not tensor.numel():
            return tensor.detach() if id(tensor) in self._names else tensor  # of a copy, which is about to go as well
        return _Saved(name, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, saved: Any) -> Any:
        """Return the tensor again."""
        if not isinstance(saved, _Saved):
            return saved
        return self._tensor(saved.name).as_strided(saved.size, saved.stride, saved.offset)


def _edges(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Return where tensors lie in the graph."""
    return tuple(get_gradient_edge(each) if isinstance(each, torch.Tensor) else each for each in tensors)
