"""Your own training loop: a model of layers, data-parallel Adam, and an evaluation over all ranks.

python jobs/research_training.py
mpirun -n 2 python jobs/research_training.py
"""

from __future__ import annotations

from mpitrain import Batches, DataParallel, Key, Network, Plan, world
from mpitrain.data import evaluation_batches, load, split
from mpitrain.nn import CrossEntropy, Dropout, Linear, ReLU, Sequential
from mpitrain.optim import Adam, Cosine

if __name__ == "__main__":
    comm = world()
    train, test = split(load("digits", {"flat": True}), seed=0)
    layers = Sequential(Linear(64, 128), ReLU(), Dropout(0.2), Linear(128, 10))

    method = DataParallel(comm)
    method.setup(Network(layers, CrossEntropy()), Adam(), Plan(Key(seed=0), Cosine(lr=3e-3, steps=600), steps=600))
    feed = Batches(train, batch_size=64, seed=0)  # global batches: the same for any number of ranks
    for until in range(100, 601, 100):
        progress = method.advance(feed, until)
        metrics = method.evaluate(evaluation_batches(test, 512, comm.rank, comm.size))
        if comm.rank == 0:
            print(f"step {progress.step}  loss {progress.loss:.4f}  test accuracy {metrics['accuracy']:.4f}")
