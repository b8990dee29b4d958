"""What drops the views, or would give a wrong number, is an error that says what to do instead."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import loss_sum, mean_gradients, mlp, samples, seeded  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import CheckpointError, DtypeError, InputError, MismatchError, NonFiniteError  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402

ROWS = 10


class Run:
    """One rank with a module, an optimizer and ten samples."""

    def __init__(self, comm, **options):
        self.module = seeded(mlp)
        self.sgd = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.opt = mt.DistributedOptimizer(self.sgd, self.module, comm, **options)
        self.weight = self.module[0].weight

    def backward(self, reduction="sum"):
        loss_sum(self.module, *samples("mlp"), reduction).backward()

    def step(self, count=ROWS):
        self.opt.step(count=count)


def replace_grad(run):
    run.backward()
    run.weight.grad = run.weight.grad * 2
    run.step()


def drop_after_backward(run):
    run.backward()
    run.module.zero_grad(set_to_none=True)
    run.step()


def drop_between_passes(run):
    run.backward()
    run.module.zero_grad(set_to_none=True)
    run.backward()


def grad_without_backward(run):
    run.weight.grad = torch.ones_like(run.weight)
    run.step(0)


def clip_too_early(run):
    run.backward()
    torch.nn.utils.clip_grad_norm_(run.module.parameters(), 1e9)
    run.step()


def no_zero_grad(run):
    run.backward()
    run.step()
    run.backward()


def twice(run):
    run.backward()
    run.step()
    run.step()


def no_count(run):
    run.backward()
    run.step(None)


def bad_count(run):
    run.backward()
    run.step(float("nan"))


def count_of_text(run):
    run.backward()
    run.step("10")


def several_counts(run):
    run.backward()
    run.step(torch.tensor([4, 6]))


def count_beyond_floats(run):
    run.backward()
    run.step(10**400)


def several_counts_after_clip(run):
    run.backward()
    run.opt.clip_grad_norm_(1.0, count=ROWS)
    run.step(torch.tensor([4, 6]))


def nobody(run):
    run.step(0)


def other_count(run):
    run.backward()
    run.opt.clip_grad_norm_(1.0, count=ROWS)
    run.step(ROWS + 1)


def backward_after_clip(run):
    run.backward()
    run.opt.clip_grad_norm_(1.0, count=ROWS)
    run.backward()


def step_after_a_refused_sum(run):
    (float("nan") * loss_sum(run.module, *samples("mlp"))).backward()
    with pytest.raises(NonFiniteError, match=r"ranks whose own samples gave it: \[0\]"):
        run.step()
    run.step()


def silent_step(run):
    with run.opt.no_sync():
        run.backward()
        run.step()


def silent_clip(run):
    with run.opt.no_sync():
        run.backward()
        run.opt.clip_grad_norm_(1.0, count=ROWS)


def mean_loss(run):
    run.backward("mean")


def mean_with_penalty(run):
    (loss_sum(run.module, *samples("mlp"), "mean") + 0.1 * run.weight.square().sum()).backward()


def penalty_before_mean(run):
    (run.weight.square().sum() + loss_sum(run.module, *samples("mlp"), "mean")).backward()


def written_out_mean(run):
    run.module(samples("mlp")[0]).square().mean().backward()


def drop_sums(run):
    run.backward()
    run.sgd.zero_grad(set_to_none=True)
    run.step()


def drop_sums_before(run):
    run.sgd.zero_grad()
    run.backward()
    run.step()


def drop_sums_after_clip(run):
    run.backward()
    run.opt.clip_grad_norm_(1.0, count=ROWS)
    run.sgd.zero_grad(set_to_none=False)
    run.step()


def step_of_its_own(run):
    run.backward()
    run.sgd.step()


def edited(run):
    with torch.no_grad():
        run.weight.mul_(0.5)
    run.backward()
    run.step()


def moved(run):
    run.module.float()
    run.step(0)


def assigned(run):
    run.module.load_state_dict(seeded(mlp).state_dict(), assign=True)
    run.backward()
    run.step()


def replaced_parameter(run):
    run.module[0].bias = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    run.backward()
    run.step()


def another_group(run):
    run.sgd.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    run.backward()
    run.step()


MISUSE = {
    replace_grad: "no longer where the ranks share it; got parameter '0.weight'; .*zero_grad",
    drop_after_backward: "no longer where the ranks share it; .*zero_grad",
    drop_between_passes: "no longer where the ranks share it; .*zero_grad",
    grad_without_backward: "no longer where the ranks share it; .*zero_grad",
    clip_too_early: "changed after the backward pass; .*clip_grad_norm_",
    no_zero_grad: "adds to gradients of the step before; .*zero_grad",
    twice: "no backward pass since the last step",
    no_count: "step: no count; .*len",
    bad_count: "this is no count; got nan",
    count_of_text: "this is no count; got '10'",
    several_counts: r"this is no count; got tensor\(\[4, 6\]\); expected",
    count_beyond_floats: "this is no count; got 10{10}",
    several_counts_after_clip: r"another count than clip_grad_norm_ was handed; got tensor\(\[4, 6\]\); expected 10",
    nobody: "no rank had samples",
    other_count: "another count than clip_grad_norm_ was handed; got 11; expected 10",
    backward_after_clip: "summed over ranks already; got reduced.*zero_grad",
    step_after_a_refused_sum: "summed over ranks already; got refused.*zero_grad",
    silent_step: "inside no_sync",
    silent_clip: "clip_grad_norm_: called inside no_sync",
    mean_loss: 'the loss is a mean.*reduction="sum"',
    mean_with_penalty: 'the loss is a mean.*reduction="sum"',
    penalty_before_mean: "the loss is a mean",
    written_out_mean: "the loss is a mean",
    drop_sums: "sums of this rank's shard were dropped or changed; .*zero_grad.*of the DistributedOptimizer",
    drop_sums_before: "sums of this rank's shard",
    drop_sums_after_clip: "sums of this rank's shard",
    step_of_its_own: "would step by this rank's gradients alone; got its own step.*DistributedOptimizer",
    edited: r"changed in place.*opt\.edit",
    moved: "lie elsewhere",
    assigned: "has another parameter of this name.*assign",
    replaced_parameter: "has another parameter of this name; got parameter '0.bias'",
    another_group: "other parameter groups",
}


@pytest.mark.parametrize("misuse", MISUSE, ids=lambda each: each.__name__)
def test_misuse_is_an_error(misuse):
    def rank(comm):
        run = Run(comm)
        run.opt.zero_grad()
        with pytest.raises(InputError, match=MISUSE[misuse]) as caught:
            misuse(run)
        assert caught.value.exit_code == 2

    LocalWorld(1).run(rank)


def test_groups_are_not_added_where_every_rank_updates_everything():
    """What is added would be updated by each rank's own gradient."""

    def rank(comm):
        module = two_layers(frozen=False)
        sgd = torch.optim.SGD(module[1].parameters(), lr=0.1)
        opt = mt.DistributedOptimizer(sgd, module, comm, shard=False)
        sgd.add_param_group({"params": list(module[0].parameters())})
        module(torch.ones(2, 2, dtype=torch.float64)).sum().backward()
        with pytest.raises(InputError, match="other parameter groups than before; add them before it is handed in"):
            opt.step(count=2)

    LocalWorld(1).run(rank)


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


def test_a_graph_from_before_the_step_is_stale():
    def rank(comm):
        run = Run(comm)
        loss = (run.module(samples("mlp")[0]) ** 2).sum()
        run.backward()
        run.step()
        run.opt.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    LocalWorld(1).run(rank)


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


def test_means_are_not_added_up():
    def rank(comm):
        run = Run(comm, reduction="mean")
        run.backward("mean")
        run.backward("mean")
        with pytest.raises(InputError, match=r'several means were added up; got 2 backward passes.*reduction="sum"'):
            run.step()
        run.opt.zero_grad()
        with pytest.raises(InputError, match="the loss is a sum"):
            run.backward("sum")

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


def two_layers(frozen):
    """The same on all threads; PyTorch's generator is not theirs alone."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).double()
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(torch.linspace(-1.0, 1.0, each.numel()).view(each.shape))
    module[0].requires_grad_(not frozen)
    return module


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


def test_sparse_gradients_are_refused():
    def rank(comm):
        table = torch.nn.Embedding(4, 2, sparse=True)
        mt.DistributedOptimizer(torch.optim.SGD(table.parameters()), table, comm)
        with pytest.raises(InputError, match="sparse=False"):
            table(torch.tensor([1])).sum().backward()

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


def test_a_sampler_needs_samples_for_every_rank():
    def rank(comm):
        with pytest.raises(InputError, match="got 1 samples; expected at least one sample for each of 2 ranks"):
            mt.DistributedSampler(1, comm, 1)
        for batch_size in (0, 2.5):
            with pytest.raises(InputError, match=f"DistributedSampler: batch_size is .*; got {batch_size}"):
                mt.DistributedSampler(5, comm, batch_size)

    LocalWorld(2).run(rank)


def test_a_sampler_takes_numbers_of_numpy():
    def rank(comm):
        ours, theirs = mt.DistributedSampler(np.int64(10), comm, np.int64(2)), mt.DistributedSampler(10, comm, 2)
        assert list(ours) == list(theirs)
        assert len(ours) == 3
        for unsized in (10.0, iter(range(10))):
            with pytest.raises(InputError, match=r"dataset is of another kind; got .*; expected a data set that has"):
                mt.DistributedSampler(unsized, comm, 2)

    LocalWorld(2).run(rank)


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [(4, 1, [[1, 1, 2]]), (5, 1, [[1, 2, 2]]), (6, 1, [[1, 1, 1], [1, 1, 1]]), (5, 2, [[1, 2, 2]]),
     (7, 2, [[1, 1, 1], [1, 1, 2]]), (3, 8, [[1, 1, 1]])],
)  # fmt: skip
def test_sizes_of_batches(rows, batch_size, sizes):
    """Only batches of 1 are ever exceeded, rather than leave a rank without samples."""
    shares = LocalWorld(3).run(lambda comm: [len(each) for each in mt.DistributedSampler(rows, comm, batch_size)])
    assert [sorted(step) for step in zip(*shares, strict=True)] == sizes


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
