"""Compiled loops of exponentials and sums over rows: as accurate as NumPy's path, and the same bits at every place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rebuilding import rebuild

from mpitrain import nn
from mpitrain.nn import kernel

pytestmark = pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the compiled loops are not built")

EPS = float(np.finfo(np.float32).eps)
SIZES = (1, 3, 15, 16, 17, 64, 130)


def gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x: np.ndarray) -> np.ndarray:
    s = 1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return s + s * (1 - s) * 2 * np.sqrt(2 / np.pi) * (x + 3 * 0.044715 * x**3)


Pass = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def both_passes(layer: nn.Layer, params: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray) -> Pass:
    call = nn.Call()
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    y, context = layer.forward(params, x, call)
    dx = layer.backward_input(params, context, dy, call)
    layer.backward_weight(grads, context, dy, call)
    return y.copy(), dx.copy(), grads


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loops that were run since the test began."""
    used: list[str] = []
    loop_over = type(kernel.LIBRARY).loop_over

    def noted(library: object, name: str, arguments: str, *arrays: np.ndarray) -> object:
        found = loop_over(kernel.LIBRARY, name, arguments, *arrays)
        if found is not None:
            used.append(name.removeprefix("mpitrain_"))
        return found

    monkeypatch.setattr(type(kernel.LIBRARY), "loop_over", noted)
    return used


def test_gelu_is_within_rounding_of_its_definition() -> None:
    x = np.concatenate([np.linspace(-12, 12, 100_001), [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30]]).astype(np.float32)
    y, dy, dx = np.empty_like(x), np.ones_like(x), np.empty_like(x)
    assert kernel.gelu(x, y)
    assert kernel.gelu_gradient(x, dy, dx)
    with np.errstate(over="ignore", invalid="ignore"):
        value, slope = gelu(x.astype(float)), gelu_slope(x.astype(float))
    slope[-2:] = 1, 0
    growth = 1 + np.minimum(np.abs(x), 12) ** 3 / 4  # rounding of the exponent is that of the tail, relative
    assert np.all(np.abs(y - value) <= 6 * EPS * np.abs(value) * growth + 1e-38 * np.abs(x) + 1e-44)
    assert np.all(np.abs(dx - slope) <= 8 * EPS + 1e-36 * np.abs(x))


def test_gelu_passes_on_what_is_no_number() -> None:
    x = np.array([np.nan, np.inf, 1.0], np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)
    kernel.gelu(x, y)
    kernel.gelu_gradient(x, np.ones_like(x), dx)
    assert np.isnan([y[0], dx[0]]).all()
    assert y[1] == np.inf
    assert np.isfinite([y[2], dx[2]]).all()


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5, 7), (70,)])
def test_layer_norm_is_as_accurate_as_numpys(features: int, shape: tuple[int, ...], uses: list[str]) -> None:
    rng = np.random.default_rng(features)
    layer = nn.LayerNorm(features)
    x, dy = (rng.standard_normal((*shape, features)) * 3 + 1 for _ in range(2))
    params = {"gamma": rng.standard_normal(features), "beta": rng.standard_normal(features)}
    exact = both_passes(layer, params, x, dy)
    assert not uses  # in float64 NumPy computes
    small = {name: value.astype(np.float32) for name, value in params.items()}
    found = both_passes(layer, small, x.astype(np.float32), dy.astype(np.float32))
    assert uses == ["layer_norm", "layer_norm_input", "layer_norm_weight"]
    scale = 1 + 3 * (features < 4)  # with few features a row may have nearly no variance
    for got, wanted in zip((*found[:2], *found[2].values()), (*exact[:2], *exact[2].values()), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-4 * scale, atol=2e-4 * scale)


@pytest.mark.parametrize("length", [1, 2, 17, 64, 65, 130, 200])
def test_attention_is_as_accurate_as_numpys(length: int, uses: list[str]) -> None:
    rng = np.random.default_rng(length)
    layer = nn.CausalAttention(heads=3)
    x, dy = rng.standard_normal((2, length, 3 * 3 * 5)) * 2, rng.standard_normal((2, length, 3 * 5))
    exact = both_passes(layer, {}, x, dy)
    assert not uses
    found = both_passes(layer, {}, x.astype(np.float32), dy.astype(np.float32))
    assert set(uses) == {"causal_exponentials", "divide_heads", "divided_heads", "causal_slopes"}
    for got, wanted in zip(found[:2], exact[:2], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_comes_later_has_no_weight() -> None:
    x = np.random.default_rng(0).standard_normal((2, 100, 12)).astype(np.float32)
    later = x.copy()
    later[:, 60:] = 50
    layer = nn.CausalAttention(heads=2)
    (y, _), (changed, _) = (layer.forward({}, each, nn.Call()) for each in (x, later))
    np.testing.assert_array_equal(changed[:, :60], y[:, :60])
    assert (changed[:, 60:] != y[:, 60:]).all()


def _layer_norm(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    gamma, beta = (np.linspace(a, 2, rows.shape[1], dtype=np.float32) for a in (0.5, -1))
    normal, y, dx, inverse = *(np.empty_like(rows) for _ in range(3)), np.empty((len(rows), 1), np.float32)
    kernel.layer_norm(rows, gamma, beta, normal, inverse, y, 1e-5)
    kernel.layer_norm_input(normal, inverse, gamma, rows, dx)
    return y, inverse, dx


def _gelu(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    y, dx = np.empty_like(rows), np.empty_like(rows)
    kernel.gelu(rows, y)
    kernel.gelu_gradient(rows, rows, dx)
    return y, dx


def _exponentials(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    scores, totals = rows.reshape(len(rows), 1, 1, -1).copy(), np.empty((len(rows), 1, rows.shape[1], 1), np.float32)
    kernel.causal_exponentials(scores, totals, 0.3)
    return scores, totals[:, 0, -1]


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("run", [_layer_norm, _gelu, _exponentials])
def test_a_row_has_the_same_bits_wherever_it_stands(
    run: Callable[[np.ndarray], tuple[np.ndarray, ...]], features: int
) -> None:
    """Alone, among others, and at any alignment: so lanes may be dealt out to any ranks."""
    rows = np.random.default_rng(features).standard_normal((23, features)).astype(np.float32) * 4
    together = run(rows)
    for number, row in enumerate(rows):
        memory = np.empty(features + 5, np.float32)
        alone = memory[number % 5 : number % 5 + features].reshape(1, features)
        alone[...] = row
        for found, all_rows in zip(run(alone), together, strict=True):
            np.testing.assert_array_equal(found[0], all_rows[number])


LAYERS = (
    (nn.GELU(), (37, 515)),
    (nn.LayerNorm(131), (67, 131)),
    (nn.CausalAttention(3), (2, 150, 3 * 3 * 7)),
    (nn.Conv2d(3, 5, 3, padding=1), (4, 9, 11, 3)),
    (nn.ReLU(), (300, 301)),
    (nn.MaxPool2d(2), (3, 8, 6, 67)),
)


def all_bits() -> list[bytes]:
    """What both passes of all layers with loops give."""
    rng, found = np.random.default_rng(0), []
    for layer, shape in LAYERS:
        x = (rng.standard_normal(shape) * 4).astype(np.float32)
        params = {p.name: rng.standard_normal(p.shape).astype(np.float32) for p in layer.parameters()}
        dy = rng.standard_normal(layer.forward(params, x, nn.Call())[0].shape).astype(np.float32)
        y, dx, grads = both_passes(layer, params, x, dy)
        found += [each.tobytes() for each in (y, dx, *grads.values())]
    return found


CLONES = 'target_clones("avx512f", "avx2", "default")'


@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma"), ("-mavx512f", "-mavx512vl", "-mfma"), ("-O1",)], ids=str)
def test_bits_are_those_of_every_instruction_set(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {flag[2:] for flag in flags if flag.startswith("-m")} - set(Path("/proc/cpuinfo").read_text().split())
    if lacking:
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    source = kernel.LIBRARY.path.with_name("kernel.c").read_text()
    assert CLONES in source
    expected = all_bits()
    built = rebuild(kernel.LIBRARY, tmp_path, *flags, kernel=source.replace(CLONES, "unused"))
    monkeypatch.setattr(kernel, "LIBRARY", built)
    assert all_bits() == expected


def test_arrays_that_do_not_fit_are_left_to_numpy(uses: list[str]) -> None:
    x = np.asfortranarray(np.ones((4, 6), np.float32))
    assert not kernel.gelu(x, np.empty_like(x))
    assert not kernel.gelu_gradient(x.copy("C"), np.ones((4, 1), np.float32), np.empty((4, 6), np.float32))
    assert not uses
