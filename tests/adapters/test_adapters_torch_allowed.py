"""What looks like misuse, or is seldom done, and gives the right numbers all the same."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import ROWS, Run, loss_sum, mean_gradients, mlp, samples, seeded  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import InputError  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402


def test_what_is_harmless_is_allowed():
    """A user's zero_grad between steps, a mean that is multiplied out, edits of one's own memory."""

    def rank(comm):
        run, other = Run(comm), Run(comm, shard=False)
        run.backward()
        run.step()
        run.module.zero_grad(set_to_none=True)
        (ROWS * loss_sum(run.module, *samples("mlp"), "mean")).backward()
        run.step()
        with torch.no_grad():
            other.weight.mul_(1.0)
        for _ in range(2):
            other.opt.zero_grad(set_to_none=True)
            with other.opt.no_sync():
                other.backward()
            other.step()
        for name, value in run.module.state_dict().items():
            torch.testing.assert_close(value, other.module.state_dict()[name], rtol=1e-12, atol=1e-14)

    LocalWorld(1).run(rank)


def test_a_module_may_be_saved_and_copied_and_wrapped_anew(tmp_path):
    def rank(comm):
        run = Run(comm)
        torch.save(run.module, tmp_path / "module.pt")
        loaded = torch.load(tmp_path / "module.pt", weights_only=False)
        assert torch.equal(loaded[0].weight, run.weight)
        copied = copy.deepcopy(run.module)
        copied[0].weight.data.zero_()
        assert not torch.equal(copied[0].weight, run.weight)
        again = mt.DistributedOptimizer(torch.optim.SGD(run.module.parameters(), lr=0.1), run.module, comm)
        again.zero_grad()
        run.backward()
        again.step(count=ROWS)
        with pytest.raises(InputError, match="lie elsewhere"):
            run.step()
        replicated = Run(comm, shard=False)
        anew = mt.DistributedOptimizer(replicated.sgd, replicated.module, comm, shard=False)
        anew.zero_grad()
        replicated.backward()
        anew.step(count=ROWS)

    LocalWorld(1).run(rank)


@pytest.mark.parametrize("shard", [True, False])
def test_ranks_without_common_memory(shard):
    """Threads, each with memory of its own; five, three and two samples."""
    expected = mean_gradients(seeded(mlp), "mlp")
    modules = [seeded(mlp) for _ in range(3)]  # threads share PyTorch's generator

    def rank(comm):
        module, (inputs, targets) = modules[comm.rank], samples("mlp")
        before = copy.deepcopy(module)
        rows = [slice(0, 5), slice(5, 8), slice(8, 10)][comm.rank]
        opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), module, comm, shard=shard)
        opt.edit(lambda: module[0].weight.mul_(1.0))
        loss_sum(module, inputs[rows], targets[rows]).backward()
        norm = opt.clip_grad_norm_(1e9, count=rows.stop - rows.start)
        opt.step()
        for name, gradient in expected.items():
            got = before.get_parameter(name).detach() - module.get_parameter(name).detach()
            assert (got - gradient).norm() <= 1e-10 * gradient.norm(), name
        assert norm == pytest.approx(sum(float(each.square().sum()) for each in expected.values()) ** 0.5, rel=1e-12)

    LocalWorld(3).run(rank)


def test_versions_are_counted_one_parameter_at_a_time(monkeypatch):
    """As PyTorch 2.4 takes them."""
    counted, count = [], torch.autograd.graph.increment_version
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda each: (counted.append(each), count(each)))

    def rank(comm):
        run = Run(comm)
        run.backward()
        run.step()
        assert {id(each) for each in counted} == {id(each) for each in run.module.parameters()}

    LocalWorld(1).run(rank)


class Lookahead(torch.optim.Optimizer):
    """Goes half the way of every step; leaves out the base's constructor, as such wrappers do."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self):
        params = [each for group in self.param_groups for each in group["params"]]
        before = [each.detach().clone() for each in params]
        self.inner.step()
        with torch.no_grad():
            for each, old in zip(params, before, strict=True):
                each.lerp_(old, 0.5)


def test_optimizers_may_wrap_others():
    def rank(comm):
        run, module = Run(comm), seeded(mlp)
        inner = torch.optim.SGD(module.parameters(), lr=0.2)
        opt = mt.DistributedOptimizer(Lookahead(inner), module, comm)
        loss_sum(module, *samples("mlp")).backward()
        opt.step(count=ROWS)
        run.backward()
        run.step()
        for name, value in run.module.state_dict().items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-12, atol=1e-14)

    LocalWorld(1).run(rank)


def test_parameters_may_be_columns_of_others():
    """They are compared between ranks, and trained."""

    def rank(comm):
        module, column = torch.nn.Module(), torch.arange(6.0).reshape(3, 2)[:, 0]
        module.gain = torch.nn.Parameter(column)
        assert module.gain.stride() == (2,)
        opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), module, comm)
        module.gain.sum().backward()
        opt.step(count=1)
        assert module.gain.tolist() == [-1.0, 1.0, 3.0]

    LocalWorld(1).run(rank)
