"""PyTorch's own training loop on many ranks: the lines that are added to it are marked.

python jobs/research_torch.py
mpirun -n 2 python jobs/research_torch.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpitrain
import mpitrain.torch as mt
from mpitrain.data import load, split

if __name__ == "__main__":
    comm = mpitrain.world()  # added
    torch.set_num_threads(1)  # one thread a rank: ranks of a node share its cores
    train, test = (
        TensorDataset(torch.from_numpy(part.inputs).float(), torch.from_numpy(part.targets))
        for part in split(load("digits", {"flat": True}), seed=0)
    )
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    mt.broadcast_parameters(model, comm)  # added
    opt = mt.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=3e-3), model, comm)  # wrapped

    loader = DataLoader(train, batch_sampler=mt.DistributedSampler(train, comm, 64 // comm.size))  # replaces batch_size
    for epoch in range(20):
        for inputs, labels in loader:
            opt.zero_grad()
            cross_entropy(model(inputs), labels, reduction="sum").backward()  # a sum, as shares may differ in size
            opt.step(count=len(inputs))  # the division is by the count of all ranks
        if comm.rank == 0 and epoch % 5 == 4:
            inputs, labels = test.tensors
            with torch.no_grad():
                right = (model(inputs).argmax(1) == labels).float().mean()
            print(f"epoch {epoch + 1}  test accuracy {right:.4f}")
