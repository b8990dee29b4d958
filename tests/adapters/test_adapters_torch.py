"""`mpitrain.torch`: gradients, trajectories and saved states of n ranks are PyTorch's alone on the whole batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import (  # noqa: E402
    MODULES,
    ROWS,
    Cnn,
    loss_sum,
    mean_gradients,
    mlp,
    samples,
    seeded,
    twin,
)  # fmt: skip
from feeds import rows_of  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import MismatchError, NonFiniteError  # noqa: E402

pytestmark = pytest.mark.mpi


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MODES = {"one node": {}, "nodes of two": {"MPITRAIN_RANKS_PER_NODE": "2"}, "ordinary": {"MPITRAIN_TRANSPORT": "host"}}


@pytest.fixture(params=MODES)
def comm(request, world, monkeypatch):
    """All ranks, with memory that a node shares, that two nodes share, and that nobody shares."""
    for name, value in MODES[request.param].items():
        monkeypatch.setenv(name, value)
    with world.split(0, axis="world") as part:
        yield part


def share(world, kind):
    inputs, targets = samples(kind)
    mine = rows_of(world.rank, world.size)
    return inputs[mine], targets[mine]


def backward(module, inputs, targets, microbatches=1):
    """Sum the losses of uneven microbatches; a rank without samples has no backward pass."""
    for part in torch.arange(len(inputs)).tensor_split([len(inputs) // 3] if microbatches == 2 else []):
        if len(part):
            loss_sum(module, inputs[part], targets[part]).backward()


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_gradients_are_serial(world, kind, shard):
    module = seeded(MODULES[kind])
    expected, before = mean_gradients(module, kind), twin(module)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    opt = mt.DistributedOptimizer(sgd, module, world, shard=shard)
    inputs, targets = share(world, kind)
    opt.zero_grad()
    backward(module, inputs, targets, microbatches=2)
    opt.step(count=targets.numel())
    assert {name for name, _ in module.named_parameters()} == set(expected)
    for name, old in before.named_parameters():
        got = old.detach() - module.get_parameter(name).detach()
        assert (got - expected[name]).norm() <= 1e-10 * expected[name].norm(), name


def two_groups(module):
    biases = [each for name, each in module.named_parameters() if name.endswith("bias")]
    weights = [each for name, each in module.named_parameters() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}], lr=0.1, fused=True)


def train_alone(module, optimizer, scheduler, steps, clip):
    inputs, targets = samples("mlp")
    for _ in range(steps):
        optimizer.zero_grad()
        (loss_sum(module, inputs, targets) / ROWS).backward()
        grads = [each.grad for each in module.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)  # PyTorch's own clipping adds 1e-6 to it
        for grad in grads:
            grad.mul_(min(1.0, clip / float(norm)))
        optimizer.step()
        scheduler.step()


def train_together(world, module, opt, scheduler, steps, clip):
    inputs, targets = share(world, "mlp")
    norms = []
    for _ in range(steps):
        opt.zero_grad()
        backward(module, inputs, targets)
        norms.append(opt.clip_grad_norm_(clip, count=len(inputs)))
        opt.step()
        scheduler.step()
    return norms


def assert_close(ours, theirs, bound=1e-9):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(np.asarray(ours[key]), np.asarray(value), rtol=bound, atol=bound, err_msg=str(key))


def scheduled(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


@pytest.mark.parametrize("shard", [True, False])
def test_trajectory_and_state(comm, shard):
    """Groups, weight decay, clipping, a schedule, a frozen parameter; the state goes from us to PyTorch and back."""
    module = seeded(mlp)
    module.get_parameter("0.bias").requires_grad_(False)
    alone = twin(module)
    rival = two_groups(alone)
    rival_schedule = scheduled(rival)
    opt = mt.DistributedOptimizer(two_groups(module), module, comm, shard=shard)
    schedule = scheduled(opt.optimizer)
    clip = 0.05
    train_alone(alone, rival, rival_schedule, 3, clip)
    norms = train_together(comm, module, opt, schedule, 3, clip)
    assert min(norms) > clip
    assert_close(module.state_dict(), alone.state_dict())
    ours, theirs = opt.state_dict(), copy.deepcopy(rival.state_dict())  # PyTorch's shares its memory
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert_close(ours["state"][number], state)

    module = twin(alone)  # from PyTorch's state, loaded before and after wrapping
    resumed = two_groups(module)
    if shard:
        resumed.load_state_dict(theirs)
    opt = mt.DistributedOptimizer(resumed, module, comm, shard=shard)
    if not shard:
        opt.load_state_dict(theirs)
    schedule = scheduled(opt.optimizer)
    schedule.load_state_dict(rival_schedule.state_dict())
    train_alone(alone, rival, rival_schedule, 2, clip)
    train_together(comm, module, opt, schedule, 2, clip)
    assert_close(module.state_dict(), alone.state_dict())


def test_integers_are_exact(world):
    """Values and a count that float32 holds exactly, so that no order of summation can matter."""
    random = np.random.default_rng(0)
    inputs = torch.from_numpy(random.integers(-8, 9, (16, 5)).astype(np.float32))
    wanted = torch.from_numpy(random.integers(-8, 9, (16, 3)).astype(np.float32))
    module = torch.nn.Linear(5, 3)
    with torch.no_grad():
        module.weight.zero_(), module.bias.zero_()
    opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), module, world)
    cuts = np.sort(np.random.default_rng(7).integers(0, 17, world.size - 1))
    mine = slice([0, *cuts][world.rank], [*cuts, 16][world.rank])
    opt.zero_grad()
    (module(inputs[mine]) * wanted[mine]).sum().backward()
    opt.step(count=len(inputs[mine]))
    assert torch.equal(module.weight.detach(), -(wanted.T @ inputs) / 16)
    assert torch.equal(module.bias.detach(), -wanted.sum(0) / 16)


def test_mean_losses_of_uneven_shares(world):
    module = seeded(mlp)
    expected, before = mean_gradients(module, "mlp"), twin(module)
    opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), module, world, reduction="mean")
    inputs, targets = share(world, "mlp")
    if len(inputs):
        loss_sum(module, inputs, targets, "mean").backward()
    opt.step(count=len(inputs))
    for name, old in before.named_parameters():
        assert (old.detach() - module.get_parameter(name).detach() - expected[name]).norm() < 1e-12, name


def test_unused_and_tied_parameters(world):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(3, 3), torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.once = torch.nn.Parameter(torch.ones(4))

        def forward(self, x, step):
            return self.second(self.first(x)) * (1.0 if step else self.once)

    module = seeded(Odd)
    before, alone = twin(module), twin(module)
    opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.5), module, world)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((ROWS, 4)))
    for step in range(2):  # what a step leaves behind in the gradients must not move what is unused in the next
        opt.zero_grad()
        mine = x[rows_of(world.rank, world.size)]
        module(mine, step).square().sum().backward()
        opt.step(count=len(mine))
    sgd = torch.optim.SGD(alone.parameters(), lr=0.5)
    for step in range(2):
        sgd.zero_grad()
        (alone(x, step).square().sum() / ROWS).backward()
        sgd.step()
    assert torch.equal(module.unused.weight, before.unused.weight)
    assert module.second.weight is module.first.weight
    assert_close(module.state_dict(), alone.state_dict(), 1e-12)


def test_running_statistics_are_the_weighted_mean(world):
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)).double()
    mt.broadcast_parameters(module, world)
    opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.0), module, world)
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((14, 2)))
    shares = x.split([2, 3, 4, 5])[: world.size]
    mine = shares[world.rank]
    module(mine).sum().backward()
    opt.step(count=len(mine))
    total = sum(map(len, shares))
    mean = sum(0.1 * part.mean(0) * len(part) for part in shares) / total
    variance = sum((0.9 + 0.1 * part.var(0)) * len(part) for part in shares) / total
    np.testing.assert_allclose(module[0].running_mean, mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(module[0].running_var, variance, rtol=1e-12)


def test_edits_happen_once_for_each_memory(comm):
    module = seeded(mlp)
    before = twin(module)
    opt = mt.DistributedOptimizer(torch.optim.SGD(module.parameters(), lr=0.0), module, comm)
    opt.edit(lambda: [each.mul_(0.5) for each in module.parameters()])
    for name, old in before.named_parameters():
        assert torch.equal(module.get_parameter(name), 0.5 * old)
    backward(module, *share(comm, "mlp"))
    opt.step(count=len(share(comm, "mlp")[0]))
    assert torch.equal(module.get_parameter("0.weight"), 0.5 * before.get_parameter("0.weight"))


def test_a_bad_rank_is_named_and_nothing_is_updated(comm):
    module = seeded(Cnn)
    before = twin(module)
    opt = mt.DistributedOptimizer(torch.optim.Adam(module.parameters()), module, comm)
    inputs, targets = samples("cnn")
    bad = comm.size - 1
    for poison in (True, False):
        opt.zero_grad()
        loss_sum(module, inputs * float("nan" if poison and comm.rank == bad else 1), targets).backward()
        if poison:
            with pytest.raises(NonFiniteError, match=rf"ranks whose own samples gave it: \[{bad}\].*conv\.weight"):
                opt.step(count=ROWS)
            assert_close(module.state_dict(), before.state_dict(), 0.0)
    opt.step(count=ROWS)
    assert not torch.equal(module.conv.weight, before.conv.weight)


def test_ranks_that_differ_are_named(world):
    if world.size == 1:
        pytest.skip("nothing can differ")
    last = world.size - 1
    module = torch.nn.Linear(3, 4 if world.rank == last else 2)
    for call in (
        lambda: mt.broadcast_parameters(module, world),
        lambda: mt.DistributedOptimizer(torch.optim.SGD(module.parameters()), module, world),
    ):
        with pytest.raises(MismatchError, match=rf"different modules.*on ranks \[{last}\]"):
            call()
    module = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(module.weight, float(world.rank == last)), torch.nn.init.zeros_(module.bias)
    with pytest.raises(MismatchError, match=rf"parameters differ.*on ranks \[{last}\].*broadcast_parameters"):
        mt.DistributedOptimizer(torch.optim.SGD(module.parameters()), module, world)
    mt.broadcast_parameters(module, world, root=last)
    assert (module.weight == 1).all()
    mt.DistributedOptimizer(torch.optim.SGD(module.parameters()), module, world)


def test_every_sample_is_taken_once(world):
    for rows, batch_size in ((10, 2), (world.size, 5), (17, 3), (5 if world.size < 5 else 8, 1)):
        if rows < world.size:
            continue
        sampler = mt.DistributedSampler(rows, world, batch_size, seed=1)
        orders = []
        for epoch in (0, 1):
            mine = list(sampler)
            assert len(mine) == len(sampler)
            shares = world.allgather_object(mine)
            assert {len(each) for each in shares} == {len(sampler)}
            sizes = {len(rows) for each in shares for rows in each}
            assert min(sizes) > 0
            assert max(sizes) - min(sizes) <= 2
            taken = [row for step in zip(*shares, strict=True) for part in step for row in part]
            assert sorted(taken) == list(range(rows))
            orders.append(taken)
            assert sampler.epoch == epoch + 1
        sampler.set_epoch(1)
        assert list(sampler) == mine
        if rows == 17:
            assert orders[0] != orders[1]
            alone = mt.DistributedSampler(rows, world.split(world.rank), batch_size * world.size, seed=1)
            assert [row for rows in alone for row in rows] == orders[0]


def test_a_loader_takes_it(world):
    data = torch.utils.data.TensorDataset(torch.arange(9.0))
    sampler = mt.DistributedSampler(data, world, 2, shuffle=False)
    taken = [float(x) for (batch,) in torch.utils.data.DataLoader(data, batch_sampler=sampler) for x in batch]
    assert sum(world.allgather_object(sum(taken))) == sum(range(9))
