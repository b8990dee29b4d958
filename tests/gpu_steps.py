"""Training steps of GPTs on a GPU, mpitrain's and PyTorch's in turn: ``python tests/gpu_steps.py FILE`` writes JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cupy
import numpy as np
import torch

from mpitrain import data, nn, optim
from mpitrain.arrays import Key, device
from mpitrain.comm import LocalWorld
from mpitrain.data.windows import windows
from mpitrain.method import Plan, Precision
from mpitrain.nn import CrossEntropy, Network
from mpitrain.parallel import DataParallel
from mpitrain.train.bench.torch_models import TorchGPT

VOCABULARY, HEADS, LR = 64, 8, 1e-3
WARM_UPS, ROUNDS = 3, 15


class Size(NamedTuple):
    """Of a GPT, and of a batch."""

    layers: int
    width: int
    length: int
    batch: int

    def __str__(self) -> str:
        """Say all."""
        return f"{self.layers} layers of width {self.width}, {self.batch} x {self.length} tokens"


SIZES = (Size(4, 128, 128, 16), Size(8, 1024, 256, 32))
Step = Callable[[], float]


def main(file: Path) -> None:
    """Time all sizes in all ways; of each, the losses fall."""
    found = {}
    for size in SIZES:
        steps = {
            "mpitrain, float32": _ours(size, None), "mpitrain, bfloat16": _ours(size, "bfloat16"),
            "PyTorch, float32": _theirs(size, False), "PyTorch, bfloat16": _theirs(size, True),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(WARM_UPS + ROUNDS):
            for name, step in steps.items():
                cupy.cuda.Device().synchronize()
                begun = time.perf_counter()
                losses[name].append(step())
                cupy.cuda.Device().synchronize()
                if turn >= WARM_UPS:
                    times[name].append(time.perf_counter() - begun)
        assert all(each[-1] < each[0] for each in losses.values()), losses
        found[str(size)] = {name: 1e3 * statistics.median(each) for name, each in times.items()}
        del steps
        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
    file.write_text(json.dumps(found, indent=1))


def _tokens(size: Size) -> np.ndarray:
    """Return text of which the next letter can be learned."""
    return np.arange(4 * size.batch * size.length + 1) ** 2 % 61 % VOCABULARY


def _ours(size: Size, compute: str | None) -> Step:
    comm = LocalWorld(1).run(lambda comm: comm)[0]
    layer = nn.MODELS["gpt"](VOCABULARY, size.length, layers=size.layers, width=size.width, heads=HEADS)
    method = DataParallel(comm, allocator=device, precision=Precision(compute=compute) if compute else None)
    method.setup(Network(layer, CrossEntropy()), optim.AdamW(), Plan(Key(0), optim.Constant(lr=LR), WARM_UPS + ROUNDS))
    letters = "".join(map(chr, range(40, 40 + VOCABULARY)))
    feed = data.Batches(windows(_tokens(size), "squares", size.length, None, letters), size.batch, seed=0)
    turns = iter(range(1, WARM_UPS + ROUNDS + 1))
    return lambda: float(method.advance(feed, next(turns)).loss)


def _theirs(size: Size, autocast: bool) -> Step:
    model = TorchGPT(VOCABULARY, size.length, size.layers, size.width, HEADS).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    rows = torch.from_numpy(_tokens(size)[:-1].reshape(-1, size.length)).cuda()
    nexts = torch.from_numpy(_tokens(size)[1:].reshape(-1, size.length)).cuda()
    generator = np.random.default_rng(0)

    def step() -> float:
        chosen = torch.from_numpy(generator.choice(len(rows), size.batch, replace=False)).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            scores = model(rows[chosen])
            loss = torch.nn.functional.cross_entropy(scores.reshape(-1, VOCABULARY), nexts[chosen].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
