"""What is particular to PyTorch tensors: memory, autograd, and tensors that have no values to send."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import DtypeError, InputError, MissingExtraError
from mpitrain.comm import Communicator, LocalWorld

torch = pytest.importorskip("torch")


def on_ranks(size: int) -> Callable[[Callable[[Communicator], Any]], Callable[[], None]]:
    """Make a test of a function that every rank runs."""

    def make(function: Callable[[Communicator], Any]) -> Callable[[], None]:
        def test() -> None:
            LocalWorld(size, timeout_s=20).run(function)

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return make


@on_ranks(3)
def test_strides(comm: Communicator) -> None:
    base = torch.arange(24.0).reshape(4, 6) + comm.rank
    total = (3 * np.arange(24.0) + 3).reshape(4, 6)
    for view in (lambda a: a[::2], lambda a: a.T, lambda a: a[1:, 2:4], lambda a: a[:, ::3]):
        expected = view(total)
        assert np.array_equal(comm.allreduce(view(base)).numpy(), expected)
        x = base.clone()
        half = view(x.to(torch.bfloat16))
        assert comm.allreduce(view(x), out=view(x)) is not None
        assert np.array_equal(view(x).numpy(), expected)
        assert np.array_equal(comm.allreduce(half, out=half).float().numpy(), expected)
    wide = torch.ones(1).expand(4)
    assert comm.allreduce(wide).tolist() == [3.0] * 4


@on_ranks(2)
def test_gradients_do_not_flow(comm: Communicator) -> None:
    weight = torch.nn.Parameter(torch.full((3,), comm.rank + 1.0))
    for x in (weight, weight * 2):
        got = comm.allreduce(x)
        assert type(got) is torch.Tensor
        assert not got.requires_grad
    assert not comm.broadcast({"w": weight})["w"].requires_grad
    assert weight.requires_grad


@on_ranks(2)
def test_parameters_are_written_under_no_grad(comm: Communicator) -> None:
    weight = torch.nn.Parameter(torch.full((3,), comm.rank + 1.0))
    words = r"broadcast: out requires grad; make the call under torch.no_grad\(\), or pass its detach\(\)"
    with pytest.raises(InputError, match=words):
        comm.broadcast(weight, out=weight)
    assert weight.tolist() == [comm.rank + 1.0] * 3
    with torch.no_grad():
        assert comm.broadcast(weight, out=weight) is weight
    assert weight.requires_grad
    assert weight.tolist() == [1.0] * 3
    comm.allreduce(weight.detach(), out=weight.detach())
    assert weight.tolist() == [2.0] * 3


@on_ranks(2)
def test_autograd_notices_what_was_overwritten(comm: Communicator) -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        comm.allreduce(weight, out=weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_ranks(2)
def test_autograd_notices_what_a_plan_overwrote(comm: Communicator) -> None:
    weight, x = torch.ones(3, requires_grad=True), torch.ones(3)
    for plan in (comm.allreduce_plan(x), comm.allreduce_plan(x, in_place=True)):
        loss = (weight * plan()).sum()
        plan()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@on_ranks(2)
def test_gradients_of_a_module(comm: Communicator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    model(torch.full((4, 3), comm.rank + 1.0)).sum().backward()
    own = [p.grad.clone() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    comm.allreduce(grads, "mean", out=grads)
    everyones = [[torch.tensor(each) for each in rank] for rank in comm.allgather_object([g.tolist() for g in own])]
    for got, *parts in zip(grads, *everyones, strict=True):
        assert torch.allclose(got, sum(parts) / 2)


@on_ranks(2)
def test_state_dict(comm: Communicator) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(comm.rank)
    state = model.state_dict()
    got = comm.broadcast(state, root=1)
    assert type(got) is type(state)
    assert list(got) == list(state)
    assert got._metadata == state._metadata
    assert got["1.num_batches_tracked"].dtype == torch.int64
    model.load_state_dict(got)
    assert all((p == 1).all() for p in model.parameters())
    comm.broadcast(model.state_dict(), out=model.state_dict())


def _refused() -> dict[str, tuple[Callable[[], Any], str]]:
    z = torch.zeros(2, dtype=torch.complex64)
    return {
        "conjugate": (lambda: z.conj(), r"tensor is lazily conjugated; .*use its resolve_conj\(\)"),
        "negative": (lambda: z.conj().imag, r"tensor is lazily negated; .*use its resolve_neg\(\)"),
        "sparse": (lambda: torch.eye(2).to_sparse(), r"tensor is not dense; got torch.sparse_coo; use its to_dense"),
        "meta": (lambda: torch.empty(3, device="meta"), "tensor holds no values; got a meta tensor"),
        "quantised": (_quantised, "tensor is quantised; got torch.quint8"),
        "fake": (_fake, r"tensor has no memory of its own; got FakeTensor .*outside of torch.func"),
        "float8": (lambda: torch.zeros(2).to(torch.float8_e5m2), "unsupported dtype; got torch.float8_e5m2"),
        "half complex": (
            lambda: torch.view_as_complex(torch.zeros(2, 2).half()),
            "unsupported dtype; got torch.complex32",
        ),
    }


def _quantised() -> Any:
    return torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize("case", _refused())
def test_tensors_without_plain_values_are_refused(case: str) -> None:
    make, words = _refused()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about its own prototypes
        x = make()

    def run(comm: Communicator) -> None:
        for call in (lambda: comm.allgather(x), lambda: comm.broadcast(x, out=x)):
            with pytest.raises((InputError, DtypeError), match=f"(allgather|broadcast): {words}") as caught:
                call()
            assert "\n" not in str(caught.value)

    LocalWorld(1).run(run)


@on_ranks(1)
def test_inside_vmap_is_refused(comm: Communicator) -> None:
    with pytest.raises(InputError, match="allreduce: tensor has no memory of its own"):
        torch.func.vmap(comm.allreduce)(torch.ones(2, 3))


@on_ranks(2)
def test_tensors_that_overlap_themselves_are_not_written(comm: Communicator) -> None:
    for out in (torch.zeros(1).expand(3), torch.zeros(9).as_strided((3, 3), (1, 1))):
        with pytest.raises(InputError, match="allreduce: elements of out share memory; got shape"):
            comm.allreduce(torch.ones(out.shape), out=out)


def test_bfloat16_without_ml_dtypes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ml_dtypes", None)

    def run(comm: Communicator) -> None:
        with pytest.raises(MissingExtraError, match=r"allgather: bfloat16 tensors .* pip install 'mpitrain\[torch\]'"):
            comm.allgather(torch.zeros(3, dtype=torch.bfloat16))

    LocalWorld(1).run(run)


# Plans and shared memory.


def plans_on_tensors(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(5, 3, dtype=dtype)
        plan, in_place = comm.allreduce_plan(x), comm.allreduce_plan(x, "mean", in_place=True)
        assert plan.buffer is x
        for step in range(3):
            x.fill_(step + 1)
            got = plan()
            assert got is plan.result
            assert got.dtype is dtype
            assert got.tolist() == [[comm.size * (step + 1)] * 3] * 5
            assert x.tolist() == [[step + 1] * 3] * 5
        assert in_place() is x
        assert x.tolist() == [[3] * 3] * 5


def refused_plans(comm: Communicator) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    for buffer, words in (
        (torch.ones(4, 4).T, "the buffer is not contiguous"),
        (torch.ones(1).expand(3), "elements of the buffer share memory"),
        (weight, "the buffer requires grad"),
        (torch.ones(3, device="meta"), "tensor holds no values"),
    ):
        with pytest.raises(InputError, match=f"allreduce_plan: {words}"):
            comm.allreduce_plan(buffer)


def shared_memory_in_a_tensor(comm: Communicator) -> None:
    """A tensor over memory of `empty` is reduced where it lies."""
    memory = comm.empty(200_000)  # below 256 KiB it does not matter where arrays lie
    x = torch.from_numpy(memory)
    places = _spy(comm)
    for view in (x, x[:90_000].view(3, -1)):
        x.fill_(comm.rank + 1)
        assert comm.allreduce(view, out=view) is view
        assert view.flatten().tolist() == [comm.size * (comm.size + 1) / 2] * view.numel()
    assert x.data_ptr() == memory.ctypes.data
    assert places is None or [place.block for place in places] == [places[0].block] * 2
    plan = comm.allreduce_plan(x)
    x.fill_(1)
    assert plan().tolist() == [comm.size] * 200_000


def _spy(comm: Communicator) -> list[Any] | None:
    """Note where the shared transport finds the arrays that it reduces; None if that is not in use."""
    if comm.transport != "shared":
        return None
    arena, found = comm._moves()._arena, []  # type: ignore[attr-defined]
    locate = arena.locate
    arena.locate = lambda array: found.append(locate(array)) or found[-1]
    return found


MEMORY = [plans_on_tensors, refused_plans, shared_memory_in_a_tensor]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("check", MEMORY, ids=lambda check: check.__name__)
def test_between_threads(check: Callable[[Communicator], None], size: int) -> None:
    LocalWorld(size, timeout_s=20).run(check)


@pytest.mark.mpi
@pytest.mark.parametrize("check", MEMORY, ids=lambda check: check.__name__)
def test_over_mpi(check: Callable[[Communicator], None], world: Communicator) -> None:
    part = world.split(0, axis="tensors")
    assert part is not None
    with part:
        check(part)
