"""What `mpitrain verify` compares, of every method and model: losses, norms, gradients and weights of one rank's run.

By job files alone, as a user would divide a job.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpitrain.comm import LocalWorld
from mpitrain.train import Job
from mpitrain.train.comparison import compare, worst
from mpitrain.train.record import Record, record

STEPS, TOLERANCE = 3, 1e-10

REST = """
[optimizer]
kind = "adam"
lr = 0.01
clip_norm = 0.5
[train]
batch_size = 13
steps = 3
"""

MODELS = {
    "mlp": '[model]\nkind = "mlp"\nhidden = [12, 9, 7]\nbatch_norm = true\ndropout = 0.2\n',
    "cnn": '[model]\nkind = "cnn"\nchannels = [3, 4]\nhidden = 6\ndropout = 0.2\n',
    "gpt": '[model]\nkind = "gpt"\nlayers = 3\nwidth = 12\nheads = 4\ndropout = 0.1\n',
}

METHODS: dict[str, list[str]] = {
    "data": [],
    "gradient 1": ['method.kind="gradient"'],
    "gradient 2": ['method.kind="gradient"', "method.stage=2", "method.bucket_bytes=256"],
    "gradient 3": ['method.kind="gradient"', "method.stage=3", "method.bucket_bytes=256"],
    "tensor": ["mesh.data=1", "mesh.tensor={n}"],
    "sequence": ["mesh.data=1", "mesh.tensor={n}", "mesh.sequence_parallel=true"],
    "gpipe": ["mesh.pipe={n}", 'method.schedule="gpipe"'],
    "1f1b": ["mesh.pipe={n}", 'method.schedule="1f1b"'],
    "interleaved": ["mesh.pipe={n}", 'method.schedule="interleaved"', "method.chunks=2"],
    "zb-h1": ["mesh.pipe={n}", 'method.schedule="zb-h1"'],
    "data, tensor": ["mesh.data=2", "mesh.tensor=2"],
    "data, sequence": ["mesh.data=2", "mesh.tensor=2", "mesh.sequence_parallel=true"],
    "gradient 2, tensor": ["mesh.data=2", "mesh.tensor=2", 'method.kind="gradient"', "method.stage=2"],
    "gradient 3, tensor": ["mesh.data=2", "mesh.tensor=2", 'method.kind="gradient"', "method.stage=3"],
    "data, pipe": ["mesh.data=2", "mesh.pipe=2"],
    "pipe, tensor": ["mesh.pipe=2", "mesh.tensor=2", 'method.schedule="zb-h1"'],
    "gradient 1, pipe": ["mesh.data=2", "mesh.pipe=2", 'method.kind="gradient"'],
    "1f1b, by times": ["mesh.data=2", "mesh.pipe=2", 'method.cuts="measured"'],
    "by times, tensor": ["mesh.pipe=2", "mesh.tensor=2", 'method.cuts="measured"'],
}

MICROBATCHES = {2: 4, 3: 3, 4: 4}
"""Of so many ranks: of 13 samples, uneven ones; multiples of the ranks, as `interleaved` wants them."""


def applies(method: str, model: str, ranks: int) -> bool:
    """Tell whether there is such a case: meshes of two axes have four ranks; what divides tensors does not all."""
    dividable = {"tensor": ("mlp", "gpt"), "sequence": ("gpt",)}.get(method.rpartition(", ")[2], tuple(MODELS))
    return model in dividable and (ranks == 4 or "," not in method)


CASES = [
    (method, model, ranks)
    for ranks in (2, 3, 4)
    for model in MODELS
    for method in METHODS
    if applies(method, model, ranks)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, random = tmp_path_factory.mktemp("jobs"), np.random.default_rng(2)
    images, labels = random.standard_normal((60, 6, 6, 2)), np.arange(60) % 3
    np.savez(found / "images.npz", inputs=images, targets=labels)
    np.savez(found / "rows.npz", inputs=images.reshape(60, -1)[:, :10], targets=labels)
    (found / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 12)
    data = {
        "mlp": 'source = "npz"\npath = "rows.npz"',
        "cnn": 'source = "npz"\npath = "images.npz"',
        "gpt": 'source = "text"\npath = "text.txt"\nhold_out = "end"\noptions = { context = 6 }',
    }
    for name, model in MODELS.items():
        (found / f"{name}.toml").write_text(f'dtype = "float64"\n[data]\n{data[name]}\n{model}{REST}')
    return found


def recorded(path: Path, ranks: int, microbatches: int, *settings: str) -> Record:
    job = Job.load(path, [f"method.microbatches={microbatches}", *settings])
    found: Any = LocalWorld(ranks, timeout_s=20).run(lambda comm: record(job, comm, STEPS))[0]
    return found


serial = cache(recorded)


def few(method: str, model: str, ranks: int) -> bool:
    """Tell whether a case runs by default: of each method and model one, the numbers of ranks in turn."""
    sizes = [size for size in (2, 3, 4) if applies(method, model, size)]
    return ranks == sizes[(list(METHODS).index(method) + list(MODELS).index(model)) % len(sizes)]


@pytest.mark.parametrize(
    ("method", "model", "ranks"),
    [pytest.param(*case, id="-".join(map(str, case)), marks=() if few(*case) else pytest.mark.slow) for case in CASES],
)
def test_every_method_gives_every_model_the_steps_of_one_rank(folder, method, model, ranks):
    path, m = folder / f"{model}.toml", MICROBATCHES[ranks]
    found = recorded(path, ranks, m, *(each.format(n=ranks) for each in METHODS[method]))
    compared = compare(found, serial(path, 1, m), TOLERANCE)
    assert compared.first is None
    assert len(compared.losses) == STEPS
    assert worst(compared.totals).relative < 1e-11  # the whole gradient's norms
