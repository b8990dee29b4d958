"""The figures of docs/results/gpt.md, as Markdown.

python tests/gpt_figures.py curve RUN    a run of jobs/gpt_pydoc.toml beside a 5-gram model on the same split
python tests/gpt_figures.py losses       the first 50 losses of that job beside PyTorch's, from the same weights
python tests/gpt_figures.py speed        a step beside PyTorch's, and where its time goes; one thread
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # before NumPy and PyTorch are imported

import numpy as np
import torch
from torch_gpt import pairs, twin_of
from witten_bell import bits_per_token

import mpitrain
from mpitrain import nn
from mpitrain.data import load
from mpitrain.train import Job
from mpitrain.train.assembly import assemble
from mpitrain.train.facts import Facts
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.samples import Samples, load_samples

JOB = Path(__file__).parents[1] / "jobs" / "gpt_pydoc.toml"
ORDER = 5
WINDOWS, ROUNDS = 8, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("curve").add_argument("run", type=Path)
    for name, function in (("losses", losses), ("speed", speed)):
        commands.add_parser(name).set_defaults(show=function)
    options = parser.parse_args()
    curve(options.run) if "run" in options else options.show()


# --- The curve ---


def curve(run: Path) -> None:
    """Print the evaluations of a run, and the 5-gram's figure on the tokens that they predict."""
    job = Job.load(run / "job.toml")
    samples = load_samples(job)
    assert samples.facts.fingerprint == Facts.read(run).fingerprint, "another Python, another text"
    rival = n_gram(job, samples)
    print(f"Witten-Bell {ORDER}-gram: {rival:.3f} bits per character\n")
    print("| step | seconds | test, bits per character | less than the 5-gram |\n|---|---|---|---|")
    for record in RunDirectory(run).read_metrics():
        if record["kind"] == "test":
            bits = record["bits_per_character"]
            print(f"| {record['step']:,} | {record['seconds']:.0f} | {bits:.3f} | {'yes' if bits < rival else 'no'} |")


def n_gram(job: Job, samples: Samples) -> float:
    """Return the 5-gram's bits per character on the targets of the test windows, counts being of all that is before."""
    whole = load(job.data.source, job.data.options | {"context": 1, "stride": 1})
    tokens = np.append(whole.inputs, whole.targets[-1:])
    test = samples.held_out["test"]
    wanted = test.rows(np.arange(len(test)))[1].ravel()
    first = len(samples.train) + samples.train.overlap + 1
    assert (tokens[first : first + len(wanted)] == wanted).all()
    return float(bits_per_token(tokens, first, ORDER, whole.classes)[: len(wanted)].mean())


# --- PyTorch beside ---


class Ours:
    """The job, one step at a time."""

    def __init__(self, job: Job) -> None:
        self.parts = assemble(job, mpitrain.world())
        self.method: Any = self.parts.method

    def __call__(self) -> float:
        """Take a step; return the loss."""
        return self.method.advance(self.parts.feed, self.method.step + 1).loss


class Theirs:
    """The same in PyTorch, from the same weights."""

    def __init__(self, job: Job, ours: Ours) -> None:
        torch.set_num_threads(1)
        layer, params, self.plan = ours.method.model.layer, ours.method.params, ours.method.plan
        self.share, self.step = ours.parts.feed.share(0, 1), 0
        self.twin = twin_of(layer, params, job.model.heads)
        named = pairs(layer, self.twin)
        groups = [
            {"params": [named[s.name] for s in params.layout if s.group == group], "weight_decay": decay}
            for group, decay in (("decay", job.optimizer.weight_decay), ("no_decay", 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, 1.0, betas=job.optimizer.betas, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self.plan.schedule(step + 1))

    def __call__(self) -> float:
        """Take a step; return the loss."""
        (batch,) = self.share.batch(self.step)
        self.step += 1
        inputs, targets = (torch.from_numpy(x.astype(np.int64)) for x in (batch.inputs, batch.targets))
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.twin(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.plan.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def both(*overrides: str) -> tuple[Ours, Theirs]:
    job = Job.load(JOB, overrides)
    ours = Ours(job)
    return ours, Theirs(job, ours)


def losses() -> None:
    """Print how far the first 50 losses lie from PyTorch's."""
    ours, theirs = both()
    found = np.array([(ours(), theirs()) for _ in range(50)])
    print("| step | mpitrain | PyTorch |\n|---|---|---|")
    for step in (1, 10, 20, 30, 40, 50):
        print(f"| {step} | {found[step - 1, 0]:.6f} | {found[step - 1, 1]:.6f} |")
    print(f"\nlargest difference of the 50: {np.abs(found[:, 0] - found[:, 1]).max():.1e}")


def speed() -> None:
    """Print the medians of steps taken in turn, and the parts of ours."""
    ours, theirs = both(f"train.batch_size={WINDOWS}")
    found: dict[str, list[float]] = {"mpitrain": [], "PyTorch": []}
    for number in range(ROUNDS + 3):
        for name, step in (("mpitrain", ours), ("PyTorch", theirs)):
            began = time.perf_counter()
            step()
            found[name] += [time.perf_counter() - began] if number > 2 else []
    tokens = WINDOWS * ours.parts.samples.train.sample_shape[0]
    print("| | step, ms: median (all) | tokens/s |\n|---|---|---|")
    for name, seconds in found.items():
        ms, median = 1e3 * np.array(seconds), float(np.median(seconds))
        print(f"| {name} | {1e3 * median:.1f} ({ms.min():.1f}–{ms.max():.1f}) | {tokens / median:,.0f} |")
    profile(ours)


PARTS = (nn.Linear, nn.CausalAttention, nn.LayerNorm, nn.GELU, nn.Embedding, nn.PositionEmbedding, nn.Unembedding)


def profile(ours: Ours) -> None:
    """Print the milliseconds of a step by kind of layer, forward and backward."""
    spent: Counter[str] = Counter()
    for part in PARTS:
        for method in ("forward", "backward_input", "backward_weight"):
            setattr(part, method, timed(getattr(part, method), spent, f"{part.__name__} {method.split('_')[0]}"))
    loss, optimizer = ours.method.model.loss, ours.method.optimizer
    loss.forward = timed(loss.forward, spent, "CrossEntropy")
    optimizer.__dict__["update"] = timed(optimizer.update, spent, "AdamW")
    began = time.perf_counter()
    for _ in range(ROUNDS):
        ours()
    spent["all else"] = time.perf_counter() - began - sum(spent.values())
    print("\n| part of a step | ms |\n|---|---|")
    for name, seconds in spent.most_common():
        print(f"| {name} | {1e3 * seconds / ROUNDS:.1f} |")


def timed(function: Callable[..., Any], spent: Counter[str], name: str) -> Callable[..., Any]:
    """Return the function with a clock around it."""

    @wraps(function)
    def with_clock(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent[name] += time.perf_counter() - began

    return with_clock


if __name__ == "__main__":
    main()
