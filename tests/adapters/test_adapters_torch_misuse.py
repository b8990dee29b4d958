"""What drops the views, or would give a wrong number, is an error that says what to do instead."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import ROWS, Run, loss_sum, mlp, samples, seeded, two_layers  # noqa: E402

import mpitrain.torch as mt  # noqa: E402
from mpitrain._errors import InputError, NonFiniteError  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402


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
