"""Adam's compiled loop gives the bits of the NumPy path, and is left alone where it does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from rebuilding import header, rebuild

from mpitrain.arrays import Layout, Segment
from mpitrain.optim import Adam, AdamW, Terms, kernel

LAYOUT = [
    Segment("w", (37, 19)),
    Segment("b", (3001,), group="no_decay"),
    Segment("s", (5,), group="statistics", rate=0.1),
]

compiled = pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the compiled loops are not built: no C compiler")


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


def terms_of(count: float, dtype: str, size: int, **options: object) -> list[Terms]:
    """Three terms of very different sizes, for each of some steps."""
    rng = np.random.default_rng(1)
    scales = 10.0 ** rng.integers(-20, 10, (29, 3, size))
    return [Terms(tuple(each), count, **options) for each in (rng.standard_normal(scales.shape) * scales).astype(dtype)]


@pytest.fixture(params=["spared", "not spared"])
def lines(request, tmp_path, monkeypatch) -> str:
    """Loops that find lines which others have always slow to write, or never."""
    rate = "1000000" if request.param == "spared" else "0"
    text = header("slow_lines.h").replace("BYTES_PER_NS = 4", f"BYTES_PER_NS = {rate}")
    monkeypatch.setattr(kernel, "LIBRARY", rebuild(kernel.LIBRARY, tmp_path, slow_lines=text))
    return request.param


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lines_that_others_have_are_spared_where_they_are_slow_to_write(monkeypatch, lines, dtype):
    """Until somebody has looked they are spared as well; and whichever it is, the bits are the same."""
    assert kernel.spares_lines()
    test_terms_give_the_bits_of_their_mean(monkeypatch, dtype, 128, {"own": 1, "parameters_are_read": False}, "on")
    assert kernel.spares_lines()
    test_terms_give_the_bits_of_their_mean(monkeypatch, dtype, 128, {"own": 1, "parameters_are_read": True}, "on")
    assert kernel.spares_lines() == (lines == "spared")
    test_terms_give_the_bits_of_their_mean(monkeypatch, dtype, 7, {"own": 1, "parameters_are_read": True}, "on")
    test_sums_are_added_up(monkeypatch, 5000, dtype, "on")


@compiled
@pytest.mark.parametrize("which", ["on", "off"])
@pytest.mark.parametrize("options", [{}, {"own": 1, "parameters_are_read": True}])
@pytest.mark.parametrize("count", [1, 7, 128, 0.5, 2.0**100])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_terms_give_the_bits_of_their_mean(monkeypatch, dtype, count, options, which):
    """Whatever compiled loops do: they divide by some counts by multiplying, and spare caches that others share."""
    layout = Layout.build(LAYOUT, dtype)
    shard = layout.shard(5, layout.size)
    optimizer, start = AdamW(weight_decay=0.03), np.random.default_rng(0).standard_normal(shard.size).astype(dtype)
    by_mean, by_terms = [(start.copy(), optimizer.init(shard)) for _ in range(2)]
    for step, terms in enumerate(terms_of(count, dtype, shard.size, **options), start=1):
        a, b, c = terms.arrays
        monkeypatch.setenv("MPITRAIN_KERNEL", "off")
        optimizer.update(by_mean[0], (a + b + c) / np.dtype(dtype).type(count), by_mean[1], 0.01, step, shard)
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        before = [each.tobytes() for each in terms.arrays]
        optimizer.update_mean(by_terms[0], terms, by_terms[1], 0.01, step, shard)
        assert by_terms[0].tobytes() == by_mean[0].tobytes()
        assert all(by_terms[1][slot].tobytes() == by_mean[1][slot].tobytes() for slot in optimizer.slots)
        assert [each.tobytes() for each in terms.arrays] == before


@pytest.mark.parametrize("which", ["on", "off"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_sums_are_added_up(monkeypatch, size, dtype, which):
    monkeypatch.setenv("MPITRAIN_KERNEL", which)
    (a, b, c), sums = terms_of(1, dtype, size)[0].arrays, np.linspace(-1, 1, size).astype(dtype)
    expected = sums + (a + b + c)
    kernel.add(sums, Terms((a, b, c), own=2))
    assert sums.tobytes() == expected.tobytes()


@compiled
def test_the_loop_is_used_and_can_be_forbidden(monkeypatch):
    p, g, m, v = (np.ones(5, np.float32) for _ in range(4))
    settings = kernel.AdamSettings(0, 1, 0.1, 0.9, 0.1, 1e-8, 0.5)
    assert kernel.adam(p, Terms((g,)), m, v, settings)
    assert p[0] == pytest.approx(1 - 0.5, rel=1e-6)
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    assert not kernel.adam(p, Terms((g,)), m, v, settings)


@compiled
@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_types_are_left_to_numpy(dtype):
    p, g, m, v = (np.ones(5, dtype) for _ in range(4))
    assert not kernel.adam(p, Terms((g,)), m, v, kernel.AdamSettings())
    p, m, v = (np.ones(5, np.float32) for _ in range(3))
    assert not kernel.adam(p, Terms((p, np.ones(5, np.float64))), m, v, kernel.AdamSettings())


@pytest.mark.parametrize("which", ["on", "off"])
def test_read_only_parameters_are_refused(monkeypatch, which):
    monkeypatch.setenv("MPITRAIN_KERNEL", which)
    layout = Layout.build([Segment("w", (5,))], "float32")
    optimizer, p, shard = Adam(), np.ones(layout.size, "float32"), layout.shard(0, layout.size)
    p.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.update(p, np.ones_like(p), optimizer.init(shard), 0.1, 1, shard)
    assert (p == 1).all()


def test_bytes_in_another_order_are_left_to_numpy():
    layout = Layout.build([Segment("w", (5,))], ">f4")
    optimizer, p, shard = Adam(), np.ones(layout.size, ">f4"), layout.shard(0, layout.size)
    optimizer.update(p, np.ones_like(p), optimizer.init(shard), 0.1, 1, shard)
    np.testing.assert_allclose(p[:5], 0.9, rtol=1e-6)
