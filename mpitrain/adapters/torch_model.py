"""A PyTorch module and a loss, as the model that the training methods know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from mpitrain._errors import InputError
from mpitrain._options import check_kind
from mpitrain._typing import Array, Tree
from mpitrain.adapters import checks
from mpitrain.adapters.empty import two_of_zeros
from mpitrain.adapters.torch_gathering import can_gather, gathering, layer_of, send_away
from mpitrain.adapters.torch_layout import layout_of, statistics_of
from mpitrain.adapters.torch_loss import TorchLoss, tensor
from mpitrain.adapters.torch_random import seeded
from mpitrain.adapters.tree import add
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, ParameterSource
from mpitrain.arrays.dtypes import floating
from mpitrain.nn import Loss, Model, Pool, Reduce

_PREDICT_ROWS = 256
"""Samples that `TorchModel.predict` takes at a time."""


class TorchModel(Model):
    """Trains a PyTorch module under any method.

    Parameters
    ----------
    module : torch.nn.Module
        On the CPU, all float32 or all float64.  It is taken over: from now on its parameters are views of whatever
        buffer a call is handed.
    loss : Loss or callable
        One of `mpitrain.nn`, or a function of PyTorch's that gives one loss per sample, see `TorchLoss`.
    dtype : dtype, optional
        To which the module is converted first: float32 or float64, of NumPy or of PyTorch.

    Raises
    ------
    DtypeError, InputError
        See `layout_of` and `statistics_of`.

    Notes
    -----
    *Batches*: floating inputs come in the module's dtype, integers as int64.  Images, and whatever else has four axes
    or more, are channels-last here and come to the module as PyTorch has them, (n, channels, height, width).

    *Initial values* are those that the module was handed over with, so they may be pretrained ones; make it under
    `seeded` where they are random.  They must be the same on all ranks, which methods verify.

    *What depends on the layout*: dropout and the like draw from PyTorch's generator, seeded for each microbatch of each
    rank from the step's key and the first sample's place in the global batch.  So runs repeat, but other numbers of
    ranks draw other values.  Batch normalisation normalises over each rank's microbatch; its statistics are averaged
    over all samples.  Both are layout-free in `mpitrain.nn`.  Without them, any number of ranks takes the same steps.

    *Fully sharded* (`GradientParallel`, stage 3): a parameter is brought for each function of PyTorch's that reads it,
    in whichever module.  In between it is NaN.  All ranks have to go through the module together: one with an empty
    batch does so with two samples of zeros, of which nothing is counted.  The values that the module was handed over
    with are let go when training begins.

    *The module's parameters* are the method's.  Where these are one for the ranks of a node, writing to them by hand is
    an error at the next pass: each rank would do it.

    Unlike other models it may not be shared by threads, since a module holds its parameters.
    """

    def __init__(self, module: Any, loss: Loss | Callable[[Any, Any], Any], dtype: Any = None) -> None:
        check_kind("TorchModel", "module", module, torch.nn.Module, "a torch.nn.Module")
        if dtype is not None:
            module = module.to(_torch_dtype(dtype))
        self.module = module
        self.reads_by_layer = can_gather(module)
        self.loss = loss if isinstance(loss, Loss) else TorchLoss(loss)
        self._layout = layout_of(module)
        self._statistics = statistics_of(module)
        self._parameters = dict(module.named_parameters())
        self._modules = list(module.modules())
        self._made_of = self._parts()
        self._initial = {name: each.detach().clone() for name, each in self._tensors().items()}
        self._pool = Pool()
        self._bound: Array | None = None
        self._versions: dict[str, int] = {}  # of parameters in memory that others read, as they were bound
        self._receive: Callable[[str, Any], None] | None = None
        self._constants = [each for name, each in module.named_buffers() if not self._is_statistic(name)]
        for layer in self._statistics.values():
            layer.momentum = 1.0  # then what a forward pass leaves behind is the batch's own statistic
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, name))

    @property
    def layout(self) -> Layout:
        """Names, shapes and groups of the parameters and running statistics."""
        return self._layout

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        """Fill ``params`` with the values that the module was handed over with; ``key`` has no say in them."""
        if not self._initial and self._layout.segments:
            raise InputError(
                "the module's first values were let go when it was trained fully sharded", operation="TorchModel",
                remedy="build the module again",
            )  # fmt: skip
        checks.on_host("TorchModel", params.flat)
        for segment in params.layout.segments:
            params.views[segment.name][...] = self._initial[segment.name].numpy()

    def loss_and_gradients(
        self, params: ParameterSource, batch: Batch, grads: Gradients, rng: Key, reduce: Reduce | None = None
    ) -> tuple[float, float]:
        """Add the gradient of the sum of the batch's losses to ``grads``; see `Model.loss_and_gradients`.

        Each gradient is complete as soon as autograd has it.  ``reduce`` is not called.

        Raises
        ------
        InputError
            The module changes a buffer that is no running statistic; no checkpoint would hold it.  Parameters or
            modules in it were added, replaced, taken out, frozen or unfrozen since it was handed over.  It gives no
            tensor, or one that no trained parameter has a part in.
        """
        if self._parts() != self._made_of:
            raise InputError(
                "the module has other parameters or modules than when it was handed over, or others are frozen",
                operation="TorchModel", remedy="change it first, then make a TorchModel of it",
            )  # fmt: skip
        self.module.train()
        with self._brought(params):
            if len(batch):
                return self._pass(batch, grads, rng)
            if not isinstance(params, FlatBuffer):
                self._pass_of_nothing(batch, grads, rng)
            return 0.0, 0.0

    def _pass(self, batch: Batch, grads: Gradients, rng: Key) -> tuple[float, float]:
        count = self.loss.count(batch)
        with self._batch_statistics():
            with seeded(rng.child(f"from{int(batch.index[0])}")):
                outputs = _checked(self.module(self._inputs(batch.inputs)))
            self._add_statistics(grads.tree, count)
            loss_sum, context = self.loss.forward(_shown(outputs), batch, self._pool)
            self._backward(outputs, torch.from_numpy(self.loss.backward(context)), partial(self._add, grads))
        context.release()
        return loss_sum, count

    def _pass_of_nothing(self, batch: Batch, grads: Gradients, rng: Key) -> None:
        """Go through the module as the ranks do that have samples, and add nothing."""
        with self._batch_statistics():
            with seeded(rng.child("empty")):
                outputs = self.module(self._inputs(two_of_zeros(batch.inputs)))
            self._add_statistics(grads.tree, 0.0)
            self._backward(outputs, torch.zeros_like(outputs), lambda name, grad: grads.complete(name))

    def _backward(self, outputs: Any, gradient: Any, arrived: Callable[[str, Any], None]) -> None:
        self._receive = arrived
        try:
            torch.autograd.backward(outputs, gradient)
        finally:
            self._receive = None

    def layer_of(self, name: str) -> str:
        """See `Model.layer_of`."""
        return layer_of(self.module, name)

    def predict(self, params: FlatBuffer, inputs: Array) -> Array:
        """Return the outputs for ``inputs``, shape (n, …), in evaluation mode; a new array.

        Raises
        ------
        DataError
            The inputs are no array.
        """
        checks.array("TorchModel", inputs)
        if not len(inputs):  # for which x.view(x.size(0), -1) fails, as modules are often written
            return self.predict(params, two_of_zeros(inputs))[:0]
        self._bind(params)
        self.module.eval()
        starts = range(0, len(inputs), _PREDICT_ROWS)
        with torch.no_grad():
            parts = [_shown(self.module(self._inputs(inputs[start : start + _PREDICT_ROWS]))) for start in starts]
        found: Array = np.concatenate(parts)
        return found

    def sums(self, params: FlatBuffer, batch: Batch) -> dict[str, Array]:
        """Return the sums over the batch from which `metrics` follow."""
        return self.loss.sums(self.predict(params, batch.inputs), batch)

    def metrics(self, sums: Mapping[str, Array]) -> dict[str, Any]:
        """Turn added `sums` into the loss's metrics."""
        return self.loss.metrics(sums)

    def _parts(self) -> set[tuple[int, bool | None]]:
        """Return what the module is made of, under whatever names, and of parameters whether they are trained."""
        parameters = chain.from_iterable(owner._parameters.values() for owner in self._modules)
        modules = chain.from_iterable(owner._modules.values() for owner in self._modules)
        return {(id(each), each.requires_grad) for each in parameters if each is not None} | {
            (id(each), None) for each in modules if each is not None
        }

    def _tensors(self) -> dict[str, Any]:
        """Return parameters and running statistics by name."""
        return {name: each for name, each in self.module.named_buffers() if self._is_statistic(name)} | self._parameters

    def _is_statistic(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return path in self._statistics and leaf in ("running_mean", "running_var", "num_batches_tracked")

    def _brought(self, params: ParameterSource) -> AbstractContextManager[None]:
        """Return a context in which the module has its parameters: all of them, or each while it is read."""
        if isinstance(params, FlatBuffer):
            self._bind(params)
            return nullcontext()
        if self._bound is not None or self._initial:
            self._let_go()
        return gathering(self._parameters, params.tree)

    def _let_go(self) -> None:
        """Drop all parameters and the initial values: a method that divides parameters has no room for them."""
        send_away(self._parameters.values())
        for layer in self._statistics.values():  # a training pass reads none
            layer.running_mean, layer.running_var = map(torch.zeros_like, (layer.running_mean, layer.running_var))
        self._bound = None
        self._initial.clear()

    def _bind(self, params: FlatBuffer) -> None:
        """Make the module's tensors views of a buffer."""
        if params.flat is self._bound:
            self._check_unwritten()
            return
        checks.on_host("TorchModel", params.flat)
        for name, parameter in self._parameters.items():
            parameter.data = _tensor(params.views[name])
        for path, layer in self._statistics.items():
            for leaf in ("running_mean", "running_var"):
                setattr(layer, leaf, _tensor(params.views[f"{path}.{leaf}".lstrip(".")]))
        self._bound = params.flat
        shared = not params.flat.flags.writeable
        self._versions = {name: each._version for name, each in self._parameters.items()} if shared else {}

    def _check_unwritten(self) -> None:
        """Refuse what a user wrote to parameters that are one for all ranks: each rank would have written it."""
        for name, version in self._versions.items():
            if self._parameters[name]._version != version:
                raise InputError(
                    "a parameter of the module was written to, which is one for all ranks of the node",
                    operation="TorchModel", got=repr(name),
                    remedy="set it by the method's load_parameters(read) on all ranks, or give DataParallel an "
                    "allocator, e.g. mpitrain.arrays.plain: then each rank has its own",
                )  # fmt: skip

    def _add_statistics(self, tree: Tree, count: float) -> None:
        """Add the batch's statistics, weighted by its count, to the gradients."""
        for path, layer in self._statistics.items():
            for leaf in ("running_mean", "running_var"):
                add(tree, f"{path}.{leaf}".lstrip("."), getattr(layer, leaf).numpy() * count)

    @contextmanager
    def _batch_statistics(self) -> Iterator[None]:
        """Give layers buffers of their own for the batch's statistics, and put the running ones back afterwards.

        Backward passes belong inside as well, as ``torch.utils.checkpoint`` computes layers again in them.

        Raises
        ------
        InputError
            Other buffers have changed.
        """
        running = {path: (layer.running_mean, layer.running_var) for path, layer in self._statistics.items()}
        versions = [each._version for each in self._constants]
        for path, (mean, variance) in running.items():
            layer = self._statistics[path]
            layer.running_mean, layer.running_var = torch.zeros_like(mean), torch.zeros_like(variance)
        try:
            yield
        finally:
            for path, (mean, variance) in running.items():
                self._statistics[path].running_mean, self._statistics[path].running_var = mean, variance
        if [each._version for each in self._constants] != versions:
            raise InputError(
                "the module changes buffers while it trains, which no checkpoint would hold", operation="TorchModel",
                expected="no buffers that change but those of batch normalisation",
            )  # fmt: skip

    def _inputs(self, inputs: Array) -> Any:
        values = tensor(inputs, self._layout.dtype)
        return values.movedim(-1, 1) if values.ndim >= 4 else values

    def _arrived(self, name: str, parameter: Any) -> None:
        """Hand over a gradient that autograd has just completed."""
        grad, parameter.grad = parameter.grad, None
        if self._receive is not None:  # else it is a backward pass of the user's own
            self._receive(name, grad)

    def _add(self, grads: Gradients, name: str, grad: Any) -> None:
        add(grads.tree, name, grad.detach().numpy())
        grads.complete(name)


def _checked(outputs: Any) -> Any:
    """Return the outputs of a training pass, from which gradients can come.

    Raises
    ------
    InputError
        They are no tensor, or no trained parameter has a part in them.
    """
    check_kind("TorchModel", "what the module gives", outputs, torch.Tensor, "one tensor, of which the loss is taken")
    if not outputs.requires_grad:
        raise InputError(
            "the module's output depends on no parameter that is trained", operation="TorchModel",
            expected="one with requires_grad, and neither detach() nor no_grad() behind it",
        )  # fmt: skip
    return outputs


def _shown(outputs: Any) -> Array:
    """Return a contiguous array over the values of a tensor."""
    found: Array = outputs.detach().contiguous().numpy()
    return found


def _tensor(values: Array) -> Any:
    """Return a tensor over parameters, which may be read-only; tensors have no flag that says so."""
    view = values.view()
    with suppress(ValueError):  # a file's, which nobody can write to
        view.flags.writeable = True
    return torch.from_numpy(view)


def _torch_dtype(dtype: Any) -> Any:
    """Return PyTorch's dtype for one of NumPy's, its name, or itself."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    return getattr(torch, floating(name, "TorchModel").name)
