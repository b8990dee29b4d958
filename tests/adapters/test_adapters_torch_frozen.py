"""Parameters that are frozen, and when they may be."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import ROWS, Run, two_layers  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import InputError, MismatchError  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402


def test_frozen_parameters_may_be_of_any_dtype():
    """They are compared between ranks, and otherwise left alone."""

    def rank(comm):
        module = torch.nn.Linear(2, 2)
        module.table = torch.nn.Parameter(torch.full((3,), 1.0 + differs * comm.rank).bfloat16(), requires_grad=False)
        with torch.no_grad():
            module.weight.fill_(0.5), module.bias.fill_(0.0)
        return mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), module, comm).steps

    differs = False
    assert LocalWorld(2).run(rank) == [0, 0]
    differs = True
    with pytest.raises(MismatchError, match=r"other values than rank 0's on ranks \[1\]"):
        LocalWorld(2).run(rank)


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("frozen", [True, False], ids=["unfrozen after", "frozen after"])
def test_who_is_frozen_is_settled_when_the_optimizer_is_made(frozen, shard):
    """Rank 1 alone changes it: both refuse, both have moved nothing, and both go on when it is changed back."""

    def rank(comm):
        module = two_layers(frozen)
        before = copy.deepcopy(module.state_dict())
        sgd = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.1)
        opt = mt.DistributedOptimizer(sgd, module, comm, shard=shard)
        x = torch.ones(2, 2, dtype=torch.float64) + comm.rank
        if comm.rank == 1:
            module[0].requires_grad_(frozen)
        module(x).sum().backward()
        with pytest.raises(InputError) as caught:
            opt.step(count=2)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        module[0].requires_grad_(not frozen)
        opt.zero_grad()
        module(x).sum().backward()
        opt.step(count=2)
        assert torch.equal(module[0].weight, before["0.weight"]) == frozen
        return str(caught.value), [value.tolist() for value in module.state_dict().values()]

    (words, values), (same_words, same_values) = LocalWorld(2).run(rank)
    assert words == same_words
    assert "were frozen or unfrozen since the optimizer was made; got 0.weight, 0.bias on ranks [1]; make an" in words
    assert values == same_values


def test_a_freezing_is_told_by_a_few_names():
    def rank(comm):
        run = Run(comm)
        run.backward()
        run.module.requires_grad_(False)
        with pytest.raises(InputError, match=r"clip_grad_norm_: .* got 0\.weight, 0\.bias, 2\.weight and 1 more on"):
            run.opt.clip_grad_norm_(1.0, count=ROWS)

    LocalWorld(1).run(rank)


def test_others_of_the_module_may_be_frozen_at_any_time():
    """As a discriminator's while its generator is trained; and who freezes more makes another optimizer."""

    def rank(comm):
        module = two_layers(frozen=False)
        before = copy.deepcopy(module.state_dict())
        x = torch.ones(2, 2, dtype=torch.float64)
        opt = mt.DistributedOptimizer(torch.optim.SGD(module[1].parameters(), lr=0.1), module, comm)
        module[0].requires_grad_(False)
        module(x).sum().backward()
        opt.step(count=2)
        module[1].bias.requires_grad_(False)
        again = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), module, comm)
        moved = module[1].bias.clone()
        again.zero_grad()
        module(x).sum().backward()
        again.step(count=2)
        assert torch.equal(module[1].bias, moved)
        assert not torch.equal(moved, before["1.bias"])
        assert torch.equal(module[0].weight, before["0.weight"])

    LocalWorld(1).run(rank)
