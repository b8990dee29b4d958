"""PyTorch modules in stage 3: a parameter is brought for whatever reads it, and a module that keeps one is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import CLASSES, mean_gradients, mlp, samples, seeded, twin  # noqa: E402
from feeds import UnevenFeed  # noqa: E402
from torch import nn as tnn  # noqa: E402
from torch.autograd.graph import get_gradient_edge  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from mpitrain import GradientParallel, Key, Plan, nn, optim  # noqa: E402
from mpitrain._errors import InputError  # noqa: E402
from mpitrain.adapters import TorchModel  # noqa: E402
from mpitrain.arrays import FlatBuffer  # noqa: E402
from mpitrain.comm import Communicator, Count, LocalWorld  # noqa: E402

sizes = pytest.mark.parametrize("size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 4)), 3])
"""Three ranks are uneven, and one has no sample."""

FEED = UnevenFeed(*(each.numpy() for each in samples("mlp")))
BOUND = 1e-10


Again = Callable[..., torch.Tensor]
"""Calls a layer, and may see to it that it is called again in the backward pass."""


class Deep(tnn.Module):
    """Three layers; ``middle`` says what becomes of the second."""

    def __init__(self, middle: Callable[[Deep, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = tnn.Linear(6, 8), tnn.Linear(8, 8), tnn.Linear(8, CLASSES)
        self.middle, self.passes = middle, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.third(self.middle(self, self.first(x)))


class Attentive(tnn.Module):
    """A parameter of its own, attention, which hands two modules' weights to one function, and a normalised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.place = tnn.Linear(6, 8), tnn.Parameter(torch.ones(1, 1, 8) / 4)
        self.attention = tnn.MultiheadAttention(8, 2, batch_first=True)
        self.block = tnn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.out = tnn.utils.parametrizations.weight_norm(tnn.Linear(8, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)[:, None] + self.place
        x = x + self.attention(x, x, x)[0]
        return self.out(torch.relu_(self.block(x))[:, 0])


def used_by_another(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """Reads a layer's tensors outside of it, one as a view; and a second time, so that both give gradients."""
    return tnn.functional.linear(x @ module.second.weight.T, module.second.weight, module.second.bias)


class Deeper(tnn.Module):
    """Two blocks, of two layers and what lies between them, that ``again`` calls."""

    def __init__(self, again: Again, middle: Callable[[], tnn.Module]) -> None:
        super().__init__()
        layers = (tnn.Linear(6, 8), middle(), tnn.Tanh(), tnn.Linear(8, 6))
        self.blocks = tnn.ModuleList(tnn.Sequential(*copy.deepcopy(layers)) for _ in range(2))
        self.out, self.again = tnn.Linear(6, CLASSES), again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.again(block, x)
        return self.out(x)


def computed_once(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def computed_again(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def computed_again_by_another_pass(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x if x.requires_grad else x.clone().requires_grad_(), use_reentrant=True)


AGAIN = {"within the pass": computed_again, "by another pass": computed_again_by_another_pass}


def with_slope(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """Adds a derivative by the input, of a layer that is called again for it; one by what is not used is zero."""
    y, unused = computed_again(module.second, x), torch.ones(3, requires_grad=True)
    slope, nothing = torch.autograd.grad(torch.tanh(y).sum(), (x, unused), create_graph=True, materialize_grads=True)
    assert nothing.requires_grad
    return y + slope + nothing.sum()


def with_slopes_left_in_inputs(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """As a constant: in a leaf, and in what is none."""
    leaf = x.detach().requires_grad_()
    double = 2 * leaf
    torch.tanh(computed_again(module.second, double)).sum().backward(inputs=(leaf, double))
    return module.second(x) + leaf.grad + double.grad


def slopes_by_parameters(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """Along parameters: as what a derivative begins with, alone and beside others, and of two kinds of pass."""
    y, weights = torch.tanh(module.second(x)), (module.first.bias, None, module.second.weight)
    alone = torch.autograd.grad(y.sum(0), x, module.first.bias, create_graph=True)[0]
    beside = torch.autograd.grad((y.sum(0), y.sum(), y.mT @ y), x, weights, create_graph=True)[0]
    leaf = x.detach().requires_grad_()
    torch.autograd.backward([torch.tanh(module.second(leaf)).sum(0)], [module.first.bias], inputs=[leaf])
    return y + alone + beside + leaf.grad


def slope_along_a_bias(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """As a constant."""
    leaf = x.detach().requires_grad_()
    torch.tanh(module.second(leaf)).sum(0).backward(module.second.bias, inputs=leaf)
    return module.second(x) + leaf.grad


def slope_left_by_an_edge(module: Deep, x: torch.Tensor) -> torch.Tensor:
    """As a constant."""
    leaf = x.detach().requires_grad_()
    torch.tanh(module.second(leaf)).sum().backward(inputs=[get_gradient_edge(leaf)])
    return module.second(x) + leaf.grad


def slope_computed_again(module: Deep, x: torch.Tensor) -> torch.Tensor:
    def layer(x: torch.Tensor) -> torch.Tensor:
        y = module.second(x)
        return y + torch.autograd.grad(torch.tanh(y).sum(), x, create_graph=True)[0]

    return computed_again(layer, x)


KINDS = {
    "attention": Attentive,
    "used by another": lambda: Deep(used_by_another),
    "in place": lambda: Deep(lambda module, x: torch.relu_(module.second(x))),
    "twice": lambda: Deep(lambda module, x: module.second(torch.tanh(module.second(x)))),
    "computed again, used by another": lambda: Deep(
        lambda module, x: computed_again(partial(used_by_another, module), x)
    ),
    "its slope": lambda: Deep(with_slope),
    "its slopes, left in inputs": lambda: Deep(with_slopes_left_in_inputs),
    "its slopes along parameters": lambda: Deep(slopes_by_parameters),
    "its slope along a bias": lambda: Deep(slope_along_a_bias),
    "its slope, left by an edge": lambda: Deep(slope_left_by_an_edge),
    "its slope, computed again": lambda: Deep(slope_computed_again),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "compiled",
    [lambda module: torch.jit.trace(module, torch.ones(2, 6).double()), lambda module: torch.compile(module)],
    ids=["traced", "compiled"],
)
def test_modules_whose_functions_cannot_be_seen_keep_their_parameters_whole(compiled):
    model = TorchModel(tnn.Sequential(compiled(seeded(mlp)), tnn.Identity()), nn.CrossEntropy())

    def check(comm: Communicator) -> None:
        method = GradientParallel(comm, stage=3)
        method.setup(model, optim.SGD(), Plan(Key(1), lambda step: 1.0, 1))
        assert isinstance(method.params, FlatBuffer)

    LocalWorld(1).run(check)


def advanced(
    comm: Communicator, module: tnn.Module, steps: int = 1, stage: int = 3, microbatches: int = 2
) -> tuple[GradientParallel, dict[str, np.ndarray]]:
    method = GradientParallel(comm, stage=stage, bucket_bytes=1, microbatches=microbatches)
    method.setup(TorchModel(twin(module), nn.CrossEntropy()), optim.SGD(), Plan(Key(1), lambda step: 1.0, steps))
    before = {name: view.copy() for name, view in method.whole().views.items()}
    method.advance(FEED, steps)
    return method, before


@pytest.mark.parametrize("kind", KINDS)
@sizes
def test_gradients_are_serial_however_a_parameter_is_read(size, kind):
    module = seeded(KINDS[kind])
    expected = mean_gradients(module, "mlp")

    def check(comm: Communicator) -> None:
        method, before = advanced(comm, module)
        after = method.whole().views
        for name, gradient in expected.items():
            got = before[name] - after[name]
            assert np.linalg.norm(got - gradient.numpy()) <= BOUND * float(gradient.norm()), name

    LocalWorld(size, timeout_s=20).run(check)


def once_and_again(again: Again, middle: Callable[[], tnn.Module]) -> list[tnn.Module]:
    return [seeded(partial(Deeper, each, middle)) for each in (computed_once, again)]


def check_same_bits(comm: Communicator, modules: list[tnn.Module]) -> None:
    found = {advanced(comm, each, 2, stage, 1)[0].weights_sha256() for each in modules for stage in (1, 2, 3)}
    assert len(found) == 1


every_way_again = pytest.mark.parametrize("again", AGAIN.values(), ids=AGAIN)


@pytest.mark.mpi
@every_way_again
def test_what_is_computed_again_has_the_same_bits(world, again):
    """Dropout drops the same values, in every stage."""
    check_same_bits(world, once_and_again(again, lambda: tnn.Dropout(0.5)))


@every_way_again
@sizes
def test_what_is_computed_again_moves_running_statistics_once(size, again):
    """PyTorch's own do so twice."""
    if size == 4:
        pytest.skip("of four shares one is a single sample, which PyTorch does not normalise")
    LocalWorld(size, timeout_s=20).run(check_same_bits, once_and_again(again, lambda: tnn.BatchNorm1d(8)))


@pytest.mark.parametrize(
    "modules",
    [once_and_again(computed_again, tnn.Tanh), [seeded(lambda: Deep(slope_along_a_bias))]],
    ids=["computed again", "slope along a bias"],
)
def test_what_passes_read_is_copied_before_pytorch_handed_passes_to_modes(monkeypatch, modules):
    """Older versions tell a mode of a tensor's ``backward`` alone."""
    monkeypatch.setattr(torch.autograd, "has_torch_function", lambda values: False)
    LocalWorld(1).run(check_same_bits, modules)


@pytest.mark.parametrize("middle", [slopes_by_parameters, slope_along_a_bias, slope_left_by_an_edge])
def test_slopes_have_the_same_bits(middle):
    LocalWorld(1).run(check_same_bits, [seeded(lambda: Deep(middle))])


def kept(module: Deep, x: torch.Tensor) -> torch.Tensor:
    module.weight_as_it_was = module.second.weight.T
    return module.second(x)


def in_another_order(module: Deep, x: torch.Tensor) -> torch.Tensor:
    return x if module.passes > 2 else module.second(x)


@pytest.mark.parametrize(
    ("middle", "error", "message"),
    [
        (kept, InputError, "keeps parameters after its call.* a view of 'second.weight' that is still held"),
        (in_another_order, InputError, "in another order than in the first step; got third; expected second"),
    ],
)
@sizes
def test_what_stage_3_cannot_do_is_an_error(size, middle, error, message):
    module = seeded(lambda: Deep(middle))
    with pytest.raises(error, match=message):
        LocalWorld(size, timeout_s=20).run(lambda comm: advanced(comm, module, 2))


@sizes
def test_a_rank_holds_its_shards_and_no_parameter_whole(size):
    module = seeded(lambda: Deep(lambda deep, x: deep.second(x)))

    def check(comm: Communicator) -> None:
        method, _ = advanced(comm, module)
        model, params = method.model, method.params
        assert sum(comm.allgather_object(params.nbytes)) == model.layout.nbytes
        assert params.passage_nbytes == 8 * (8 * 8 + 8)  # the largest weight and bias
        assert [each.untyped_storage().nbytes() for each in model.module.parameters()] == [8] * 6
        with pytest.raises(InputError, match="first values were let go when it was trained fully sharded"):
            method.setup(model, optim.SGD(), Plan(Key(1), lambda step: 1.0, 1))

    LocalWorld(size, timeout_s=20).run(check)


@sizes
def test_what_is_gathered_is_what_the_passes_read(size):
    """Forward every layer; backward all but the last, which is there, and the first, whose input needs no gradient."""
    module = seeded(lambda: tnn.Sequential(*mlp()[:2], tnn.Linear(8, 8), tnn.Linear(8, CLASSES)))

    def check(comm: Communicator) -> None:
        method, _ = advanced(comm, module, 1)
        comm.ledger.reset()
        method.plan = Plan(Key(1), lambda step: 1.0, 2)
        method.advance(FEED, 2)
        layout, passes = method.model.layout, 2
        ends = sum(padded_bytes(layout[f"{layer}.{name}"].size) for layer in (0, 3) for name in ("weight", "bias"))
        found = comm.ledger.snapshot().get((comm.ledger.axis, "allgather"), Count())
        expected = (passes * (6 + 2), passes * (2 * layout.nbytes - ends)) if size > 1 else (0, 0)
        assert (found.calls, found.logical_bytes) == expected

    LocalWorld(size, timeout_s=20).run(check)


def padded_bytes(size: int) -> int:
    return -(-size * 8 // 64) * 64
