"""Adam's compiled loop gives the bits of the NumPy path, and is left alone where it does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.arrays import Layout, Segment
from mpitrain.optim import Adam, AdamW, kernel

LAYOUT = [
    Segment("w", (37, 19)),
    Segment("b", (1001,), group="no_decay"),
    Segment("s", (5,), group="statistics", rate=0.1),
]

compiled = pytest.mark.skipif(kernel.library() is None, reason="the compiled loops are not built: no C compiler")


def trajectory(optimizer: Adam, dtype: str, start: int, stop: int | None) -> list[bytes]:
    layout = Layout.build(LAYOUT, dtype)
    shard = layout.shard(start, layout.size if stop is None else stop)
    rng = np.random.default_rng(0)
    p = rng.standard_normal(layout.size).astype(dtype)[shard.start : shard.stop]
    state, seen = optimizer.init(shard), []
    for step in range(1, 30):
        g = (rng.standard_normal(layout.size) * 10.0 ** rng.integers(-30, 10, layout.size)).astype(dtype)
        g[::7] = 0
        optimizer.update(p, g[shard.start : shard.stop], state, 0.01 * step, step, shard)
        seen += [p.tobytes(), *(state[slot].tobytes() for slot in optimizer.slots)]
    return seen


@compiled
@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 700), (16, 17), (5, 5)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("make", [Adam, AdamW])
def test_bits_are_those_of_numpy(monkeypatch, make, decay, dtype, start, stop):
    found = {}
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        with np.errstate(all="ignore"):
            found[which] = trajectory(make(weight_decay=decay), dtype, start, stop)
    assert found["on"] == found["off"]


@compiled
def test_the_loop_is_used_and_can_be_forbidden(monkeypatch):
    arrays = [np.ones(5, np.float32) for _ in range(4)]
    settings = kernel.AdamSettings(0, 1, 0.1, 0.9, 0.1, 1e-8, 0.5)
    assert kernel.adam(*arrays, settings)
    assert arrays[0][0] == pytest.approx(1 - 0.5, rel=1e-6)
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    assert not kernel.adam(*arrays, settings)


@compiled
@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_types_are_left_to_numpy(dtype):
    assert not kernel.adam(*(np.ones(5, dtype) for _ in range(4)), kernel.AdamSettings())
    mixed = [np.ones(5, np.float32), np.ones(5, np.float64), np.ones(5, np.float32), np.ones(5, np.float32)]
    assert not kernel.adam(*mixed, kernel.AdamSettings())
