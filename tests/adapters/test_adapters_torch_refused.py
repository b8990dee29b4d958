"""What cannot be trained, clipped or loaded is refused, and a step that is refused changes nothing."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import ROWS, Run, mean_gradients, mlp, seeded  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import CheckpointError, DtypeError, InputError, NonFiniteError  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402


def test_what_cannot_be_trained_is_refused():
    def rank(comm):
        module, other = seeded(mlp), seeded(mlp)
        mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
        half, brain = torch.nn.Linear(2, 2).half(), torch.nn.Linear(2, 2).bfloat16()  # NumPy has only one of these
        nowhere = torch.nn.Linear(2, 2, device="meta")
        for make, error, words in (
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(mixed.parameters()), mixed, comm), DtypeError,
             "torch.float32 on cpu, torch.float64 on cpu"),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(half.parameters()), half, comm), DtypeError,
             "torch.float16 on cpu"),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(brain.parameters()), brain, comm), DtypeError,
             "torch.bfloat16 on cpu"),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(nowhere.parameters()), nowhere, comm), DtypeError,
             "torch.float32 on meta"),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(other.parameters()), module, comm), InputError,
             "the module has not; got 4 in parameter group 0"),
            (lambda: mt.DistributedOptimizer(torch.optim.Adafactor(module.parameters()), module, comm, shard=True),
             InputError, "Adafactor; expected ASGD"),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(module.parameters()), module, comm, reduction="avg"),
             InputError, "'avg'; expected \"sum\""),
            (lambda: mt.DistributedOptimizer(torch.optim.SGD(other.requires_grad_(False).parameters()), other, comm),
             InputError, "nothing is trained"),
        ):  # fmt: skip
            with pytest.raises(error, match=re.escape(words)):
                make()

    LocalWorld(1).run(rank)


def test_what_cannot_be_wrapped_is_refused():
    def rank(comm):
        module = seeded(mlp)
        with pytest.raises(InputError, match="evaluates the loss by itself, in a closure; got LBFGS"):
            mt.DistributedOptimizer(torch.optim.LBFGS(module.parameters()), module, comm)
        with pytest.raises(InputError, match=r"takes sparse gradients alone; got SparseAdam; expected .* dense"):
            mt.DistributedOptimizer(torch.optim.SparseAdam(module.parameters()), module, comm)
        half = module.bfloat16()
        with pytest.raises(DtypeError, match=r"got torch\.bfloat16 on cpu; expected all torch\.float32"):
            mt.DistributedOptimizer(torch.optim.SGD(half.parameters(), lr=0.1), half, comm)

    LocalWorld(1).run(rank)


def test_sparse_gradients_are_refused():
    def rank(comm):
        table = torch.nn.Embedding(4, 2, sparse=True)
        mt.DistributedOptimizer(torch.optim.SGD(table.parameters()), table, comm)
        with pytest.raises(InputError, match="sparse=False"):
            table(torch.tensor([1])).sum().backward()

    LocalWorld(1).run(rank)


def test_what_gradients_cannot_be_clipped_to_is_refused():
    """Before anything is reduced, so that the step may be taken after all."""

    def rank(comm):
        run = Run(comm)
        run.backward()
        for bad in (-1, 0.0, float("nan"), True, "1"):
            with pytest.raises(InputError, match=r"clip_grad_norm_: max_norm is not allowed; got .*; expected a num"):
                run.opt.clip_grad_norm_(bad, count=ROWS)
        before = run.weight.clone()
        norm = run.opt.clip_grad_norm_(float("inf"), count=ROWS)
        run.step()
        assert norm > 0
        torch.testing.assert_close(before - run.weight, 0.1 * mean_gradients(seeded(mlp), "mlp")["0.weight"])

    LocalWorld(1).run(rank)


def test_states_of_other_groups_are_refused():
    def rank(comm):
        run = Run(comm)
        saved = torch.optim.SGD([run.weight], lr=0.1).state_dict()
        with pytest.raises(CheckpointError, match=re.escape("groups of [1] parameters; expected [4]")):
            run.opt.load_state_dict(saved)
        adam = torch.optim.Adam(run.module.parameters())
        run.backward()
        adam.step()
        uneven = adam.state_dict()
        uneven["state"][0]["step"] = torch.tensor(5.0)
        module = seeded(mlp)
        opt = mt.DistributedOptimizer(torch.optim.Adam(module.parameters()), module, comm)
        with pytest.raises(CheckpointError, match=re.escape("different 'step'; got [1.0, 5.0]")):
            opt.load_state_dict(uneven)

    LocalWorld(1).run(rank)


def nan_in_the_batch(run, x, rank):
    x = x.clone()
    x[0, 0] = float("nan") if rank == 1 else 0.0
    run.opt.zero_grad()
    run.module(x).sum().backward()
    with pytest.raises(NonFiniteError):
        run.step(len(x))


def no_samples(run, x, rank):
    run.module(x)
    run.opt.zero_grad()
    with pytest.raises(InputError, match="no rank had samples"):
        run.step(0)


class Normalised(Run):
    """A layer whose running statistics are means over all batches, so that their count matters."""

    def __init__(self, comm):
        self.module = torch.nn.Sequential(torch.nn.BatchNorm1d(2, momentum=None), torch.nn.Linear(2, 1)).double()
        with torch.no_grad():
            self.module[1].weight.fill_(0.5), self.module[1].bias.fill_(0.0)
        self.opt = mt.DistributedOptimizer(torch.optim.SGD(self.module.parameters(), lr=0.1), self.module, comm)

    def train(self, x):
        self.opt.zero_grad()
        self.module(x).sum().backward()
        self.step(len(x))

    def values(self):
        return {name: value.tolist() for name, value in self.module.state_dict().items()}


@pytest.mark.parametrize("refused", [nan_in_the_batch, no_samples], ids=lambda each: each.__name__)
def test_a_refused_step_leaves_running_statistics_as_they_were(refused):
    """At first those that the module had, then those that an edit and those that a step left."""

    def rank(comm):
        run, spared = Normalised(comm), Normalised(comm)
        x = torch.arange(6.0, dtype=torch.float64).view(3, 2) + comm.rank
        refused(run, x, comm.rank)
        assert run.values() == spared.values()
        for each in (run, spared):
            each.opt.edit(lambda each=each: each.module[0].running_mean.fill_(7.0))
        refused(run, x, comm.rank)
        assert run.values() == spared.values()
        for each in (run, spared):
            each.train(x)
        refused(run, x, comm.rank)
        assert run.values() == spared.values()
        for each in (run, spared):
            each.train(x)
        assert run.values() == spared.values()
        assert run.values()["0.num_batches_tracked"] == 2

    LocalWorld(2).run(rank)
