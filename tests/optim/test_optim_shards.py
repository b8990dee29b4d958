"""Any cut of the flat range, into shards, chunks or threads, gives the bits of the whole; and each group its rule."""

from __future__ import annotations

import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpitrain.arrays import FlatBuffer, Layout, Shard
from mpitrain.optim import OPTIMIZERS, SGD, Terms, chunks, make_optimizer

ELEMENTWISE = sorted(set(OPTIMIZERS) - {"lamb"})
DECAYS = {"weight_decay": 0.1}


def updated(optimizer, params, gradients, shards, lr=0.05):
    """Return the flat parameters and states after all steps, each shard updated by itself."""
    flat = params.flat.copy()
    states = [optimizer.init(shard) for shard in shards]
    for step, grads in enumerate(gradients, start=1):
        g = grads.flat.copy()
        owned = [
            (flat[s.start : s.stop], g[s.start : s.stop], state, s) for s, state in zip(shards, states, strict=True)
        ]
        partials = [optimizer.partials(p, own, state, step, s) for p, own, state, s in owned]
        totals = None if partials[0] is None else sum(partials)
        for p, own, state, s in owned:
            optimizer.update(p, own, state, lr, step, s, totals)
    return flat, {slot: np.concatenate([state[slot] for state in states]) for slot in optimizer.slots}


def test_slots_begin_at_places_of_a_page_apart_from_those_of_parameters_and_of_each_other(layout):
    state = make_optimizer("adam").init(layout.whole())
    places = sorted([0, *(array.__array_interface__["data"][0] % mmap.PAGESIZE for array in state.values())])
    assert all(after - before >= 1024 for before, after in itertools.pairwise([*places, mmap.PAGESIZE]))
    assert all(array.shape == (layout.size,) and not array.any() for array in state.values())


@pytest.mark.parametrize("parts", [2, 3, 5, 40])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_shards_give_the_bits_of_the_whole(name, parts, layout, start, gradients):
    optimizer = make_optimizer(name, **DECAYS)
    whole, whole_state = updated(optimizer, start(), gradients, [layout.whole()])
    flat, state = updated(optimizer, start(), gradients, layout.shards(parts))
    assert flat.tobytes() == whole.tobytes()
    assert all(state[slot].tobytes() == whole_state[slot].tobytes() for slot in optimizer.slots)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_terms_give_the_bits_of_their_mean(name, count, layout, start, gradients):
    optimizer = make_optimizer(name, **DECAYS)
    assert optimizer.takes_terms
    means = [FlatBuffer(layout) for _ in gradients[1:]]
    for mean, (a, b) in zip(means, itertools.pairwise(gradients), strict=True):
        mean.flat[...] = (a.flat + b.flat) / count
    whole, whole_state = updated(optimizer, start(), means, [layout.whole()])
    params, state = start().flat, optimizer.init(layout.whole())
    for step, (a, b) in enumerate(itertools.pairwise(gradients), start=1):
        optimizer.update_mean(params, Terms((a.flat, b.flat), count), state, 0.05, step, layout.whole())
    assert params.tobytes() == whole.tobytes()
    assert all(state[slot].tobytes() == whole_state[slot].tobytes() for slot in optimizer.slots)


def test_what_walks_over_shards_by_itself_takes_no_terms():
    class Own(SGD):
        def update(self, *args, **kwargs):
            raise AssertionError

    assert not make_optimizer("lamb").takes_terms
    assert not Own().takes_terms


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(ELEMENTWISE))
def test_cuts_anywhere_give_the_bits_of_the_whole(data, name, layout, start, gradients):
    inner = data.draw(st.lists(st.integers(0, layout.size), max_size=6).map(sorted))
    bounds = [0, *inner, layout.size]
    shards = [Shard(layout, a, b) for a, b in itertools.pairwise(bounds)]
    optimizer = make_optimizer(name, **DECAYS)
    whole, _ = updated(optimizer, start(), gradients[:3], [layout.whole()])
    flat, _ = updated(optimizer, start(), gradients[:3], shards)
    assert flat.tobytes() == whole.tobytes()


@pytest.mark.parametrize("parts", [2, 3, 5, 40])
def test_shards_of_lamb_agree_to_rounding_of_the_norms(parts, layout, start, gradients):
    optimizer = make_optimizer("lamb", adapt="trained", **DECAYS)
    whole, whole_state = updated(optimizer, start(), gradients[:1], [layout.whole()])
    flat, state = updated(optimizer, start(), gradients[:1], layout.shards(parts))
    np.testing.assert_allclose(flat, whole, rtol=1e-15, atol=1e-16)
    assert all(state[slot].tobytes() == whole_state[slot].tobytes() for slot in optimizer.slots)
    flat, _ = updated(optimizer, start(), gradients, layout.shards(parts))
    whole, _ = updated(optimizer, start(), gradients, [layout.whole()])
    np.testing.assert_allclose(flat, whole, rtol=1e-13)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_chunks_do_not_change_the_result(name, layout, start, gradients, monkeypatch):
    optimizer = make_optimizer(name, **DECAYS)
    whole, _ = updated(optimizer, start(), gradients, [layout.whole()])
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 56)
    flat, _ = updated(optimizer, start(), gradients, [layout.whole()])
    np.testing.assert_allclose(flat, whole, rtol=0 if name != "lamb" else 1e-13)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_one_optimizer_serves_many_threads(name, layout, start, gradients):
    optimizer = make_optimizer(name, **DECAYS)
    alone, _ = updated(optimizer, start(), gradients, [layout.whole()])
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(updated, optimizer, start(), gradients, [layout.whole()]) for _ in range(8)]
        assert {job.result()[0].tobytes() for job in jobs} == {alone.tobytes()}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_float32_follows_float64(name, layout, start, gradients):
    """Rounding of the parameters and state is all that single precision adds."""
    optimizer = make_optimizer(name, **DECAYS)
    double, _ = updated(optimizer, start(), gradients, [layout.whole()])
    single = start(layout)
    narrow = layout.astype(np.float32)
    single.flat = single.flat.astype(np.float32)
    copies = [type("Grads", (), {"flat": g.flat.astype(np.float32)}) for g in gradients]
    flat, state = updated(optimizer, single, copies, [narrow.whole()])
    assert flat.dtype == np.float32
    assert {array.dtype for array in state.values()} <= {np.dtype(np.float32)}
    np.testing.assert_allclose(flat, double, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_only_weights_decay(name, layout, start, gradients):
    """A strong decay changes the tensors of group ``decay`` and no other bit."""
    with_decay = updated(make_optimizer(name, weight_decay=0.5), start(), gradients, [layout.whole()])[0]
    without = updated(make_optimizer(name, weight_decay=0.0), start(), gradients, [layout.whole()])[0]
    for segment in layout:
        here = slice(segment.offset, segment.stop)
        if segment.group == "decay":
            assert (with_decay[here] != without[here]).all()
        else:
            assert with_decay[here].tobytes() == without[here].tobytes()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_statistics_are_running_averages_under_every_optimizer(name, parts, layout, start, gradients):
    flat, state = updated(make_optimizer(name, **DECAYS), start(), gradients, layout.shards(parts), lr=123.0)
    for tensor in ("norm.mean", "norm.var"):
        segment, expected = layout[tensor], start().views[tensor]
        for grads in gradients:
            expected = (1 - segment.rate) * expected + segment.rate * grads.views[tensor]
        here = slice(segment.offset, segment.stop)
        np.testing.assert_allclose(flat[here], expected, rtol=1e-13)
        assert all(not array[here].any() for array in state.values())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_empty_shard_is_left_alone(name, layout):
    shard, nothing = layout.shard(8, 8), np.zeros(0)
    optimizer = make_optimizer(name)
    state = optimizer.init(shard)
    totals = optimizer.partials(nothing, nothing, state, 1, shard)
    optimizer.update(nothing, nothing, state, 0.1, 1, shard, totals)
    assert totals is None or not totals.any()


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_a_layout_without_tensors_is_updated(kind):
    empty = Layout.build([], np.float64)
    updated(make_optimizer(kind), FlatBuffer(empty), [FlatBuffer(empty)] * 2, [empty.whole()])
