"""What is particular to JAX arrays: they are immutable, and some have no values yet, or any more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpitrain._errors import InputError
from mpitrain.comm import Communicator, LocalWorld

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")


def test_tracers_are_refused() -> None:
    x = jnp.ones((2, 3))
    words = "allreduce: arrays have no values while JAX traces .* a tracer of .*outside of jit, grad .*io_callback"

    def run(comm: Communicator) -> None:
        for traced in (
            jax.jit(comm.allreduce),
            jax.vmap(comm.allreduce),
            jax.grad(lambda v: comm.allreduce(v).sum()),
            jax.jit(lambda v: comm.allreduce({"a": [v * 2]})),
        ):
            with pytest.raises(InputError, match=words) as caught:
                traced(x)
            assert "\n" not in str(caught.value)
        assert comm.allreduce(x).tolist() == x.tolist()

    LocalWorld(1).run(run)


@pytest.mark.mpi
def test_the_remedy_for_tracers_works(world: Communicator) -> None:
    from jax.experimental import io_callback

    @jax.jit
    def total(x: Any) -> Any:
        return 2 * io_callback(lambda v: world.allreduce(np.asarray(v)), x, x, ordered=True)

    for step in range(3):
        got = total(jnp.full(4, world.rank + step, jnp.float32))
        assert got.tolist() == [2 * (sum(range(world.size)) + world.size * step)] * 4


def test_gradients_are_reduced_between_jitted_functions() -> None:
    gradient = jax.jit(jax.grad(lambda params, x: ((x @ params["w"] + params["b"]) ** 2).sum()))

    def run(comm: Communicator) -> Any:
        params = {"w": jnp.arange(3.0), "b": jnp.float32(0.5)}
        x = jnp.asarray(np.arange(12.0, dtype="float32").reshape(4, 3)[comm.rank :: comm.size])
        return comm.allreduce(gradient(params, x))

    whole = LocalWorld(1).run(run)[0]
    for got in LocalWorld(3).run(run):
        assert jax.tree.structure(got) == jax.tree.structure(whole)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.allclose(a, b, rtol=1e-6)), got, whole))


def _deleted() -> Any:
    x = jnp.ones(3)
    x.delete()
    return x


def _wide() -> Any:
    with jax.enable_x64(True):
        return jnp.ones(3, jnp.float64)


REFUSED = {
    "deleted": (_deleted, r"array was deleted, or donated to a computation; got float32\[3\]; pass a live one"),
    "keys": (lambda: jax.random.key(0), r"array of random keys; got key<fry>; send jax.random.key_data"),
    "64 bits": (_wide, "64-bit array while JAX makes no such results; got float64; set jax_enable_x64"),
    "int4": (lambda: jnp.ones(3, jnp.int4), "unsupported dtype; got int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_without_plain_values_are_refused(case: str) -> None:
    make, words = REFUSED[case]

    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match=f"broadcast: {words}"):
            comm.broadcast(make())

    LocalWorld(1).run(run)


def test_double_precision_where_it_is_on() -> None:
    def run(comm: Communicator) -> None:
        with jax.enable_x64(True):
            got = comm.allreduce(jnp.full(3, 0.1, jnp.float64))
        assert got.dtype == np.float64
        assert np.asarray(got).tolist() == [0.2] * 3

    LocalWorld(2).run(run)


def test_results_are_on_the_devices_of_the_input() -> None:
    def run(comm: Communicator) -> None:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        x = jax.device_put(jnp.ones(4), sharding)
        assert comm.allreduce(x).sharding == sharding
        assert comm.allgather(x).shape == (comm.size, 4)
        assert not comm.allreduce(jnp.ones(4)).committed  # as jnp.ones is: JAX may move it

    LocalWorld(2).run(run)


def test_plans_are_refused() -> None:
    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match="allreduce_plan: the buffer is a JAX array, and these are immutable"):
            comm.allreduce_plan(jnp.ones(3))

    LocalWorld(1).run(run)


def test_a_view_of_a_jax_array_is_not_written() -> None:
    view = np.asarray(jnp.ones(3))

    def run(comm: Communicator) -> None:
        with pytest.raises(InputError, match="allreduce: out is read-only"):
            comm.allreduce(np.ones(3, "float32"), out=view)

    LocalWorld(1).run(run)
