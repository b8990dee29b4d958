"""The promise of reproducible jobs, as a user would check it: SHA-256 of the weights after 50 steps on 1 to 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import mpitrain, settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

JOBS: dict[str, dict[str, Any]] = {
    "digits_cnn": {"train__steps": 60, "optimizer__schedule__warmup_steps": 10},
    "gpt_pydoc": {
        "train__steps": 50, "optimizer__schedule__warmup_steps": 10, "data__test": 0.002, "data__options__context": 32,
        "model__layers": 2, "model__width": 32, "model__dropout": 0.1,
    },
}  # fmt: skip
"""An epoch of digits has 23 steps, of which the last takes 29 samples instead of 64."""

METHODS: dict[str, dict[str, Any]] = {
    "data": {},
    "gradient 1": {"method__kind": "gradient"},
    "gradient 2": {"method__kind": "gradient", "method__stage": 2},
    "pipeline": {"method__kind": "pipeline", "method__schedule": "zb-h1"},
    "data and pipeline": {"mesh__data": 2, "mesh__pipe": 2},
}

RANKS = {"data and pipeline": (4,)}
"""What does not run on any number."""


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> dict[str, Any]:
    return {name: trained(name, 1, "data", tmp_path_factory.mktemp(name)) for name in JOBS}


def trained(name: str, ranks: int, method: str, folder: Path) -> tuple[str, float]:
    changes = settings(reproducible=True, lanes=12, **JOBS[name], **METHODS[method])
    where = ["-n", str(ranks), "--json", "--quiet", "--run-dir", folder / "run"]
    done = mpitrain("run", ROOT / "jobs" / f"{name}.toml", *changes, *where)
    assert done.code == 0, done.err
    return done.result["weights_sha256"], done.result["loss"]


@pytest.mark.parametrize(
    ("method", "ranks"),
    [(method, ranks) for method in METHODS for ranks in RANKS.get(method, (1, 2, 3, 4))],
)
@pytest.mark.parametrize("name", JOBS)
def test_the_weights_have_one_hash(serial, tmp_path, name, method, ranks):
    if name == "digits_cnn":
        pytest.importorskip("sklearn")
    assert trained(name, ranks, method, tmp_path) == serial[name]
