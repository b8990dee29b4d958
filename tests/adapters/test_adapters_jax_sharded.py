"""JAX functions in stage 3: cut into units whatever they are like, each with its own parameters, compiled once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="needs JAX")
from feeds import UnevenFeed  # noqa: E402
from jax import lax  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from mpitrain import Batch, DataParallel, GradientParallel, Key, Plan, optim  # noqa: E402
from mpitrain._errors import InputError, MismatchError  # noqa: E402
from mpitrain.adapters import JaxModel  # noqa: E402
from mpitrain.adapters.jax_sharded import ShardedLoss, _with_parameters  # noqa: E402
from mpitrain.adapters.jax_units import CompiledUnit  # noqa: E402
from mpitrain.comm import Communicator, LocalWorld  # noqa: E402
from mpitrain.parallel.buckets import StreamedGradients  # noqa: E402

ROWS, WIDTH, CLASSES = 10, 8, 3
BOUND = 1e-10


@pytest.fixture(autouse=True)
def float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def samples() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.standard_normal((ROWS, WIDTH)), random.integers(0, CLASSES, ROWS)


def weights(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(2)
    return [random.standard_normal(shape) / 2 for shape in shapes]


def dense(count: int = 3) -> list[dict[str, np.ndarray]]:
    """Equal layers and a last one."""
    sizes = [WIDTH] * count + [CLASSES]
    return [
        dict(zip(("w", "b"), weights((WIDTH, size), (size,)), strict=True)) | {"g": np.ones(WIDTH)} for size in sizes
    ]


def layer(params: Any, x: Any) -> Any:
    return (x * params["g"]) @ params["w"] + params["b"]


def chosen(outputs: Any, batch: Any) -> Any:
    """The sum of the cross-entropies."""
    found = jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["targets"][:, None], 1)[:, 0]
    return -(batch["weights"] * found).sum()


def layers_in_turn(step: Callable[..., Any]) -> Callable[..., Any]:
    def loss(params: Any, batch: Any, key: Any) -> Any:
        x = batch["inputs"]
        for number, each in enumerate(params[:-1]):
            x = step(each, x, number, key)
        return chosen(layer(params[-1], x), batch)

    return loss


plain = layers_in_turn(lambda params, x, number, key: jnp.tanh(layer(params, x)))


@jax.custom_vjp
def clipped(x: Any) -> Any:
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (jnp.clip(x, -1, 1), x), lambda x, dy: (dy * jnp.where(jnp.abs(x) < 1, 1.0, 0.1),))


def all_prepared_first(params: Any, batch: Any, key: Any) -> Any:
    return plain(jax.tree.map(lambda each: (2 * each.T).T / 2, params), batch, key)


def in_a_loop(params: Any, batch: Any, key: Any) -> Any:
    """The layers of a stack, and another layer's tensors, are read by one equation."""
    x, _ = lax.scan(
        lambda x, each: (jnp.tanh(x @ each["w"] + params["last"]["w"].sum()), None), batch["inputs"], params["stack"]
    )
    return chosen(x @ params["last"]["w"], batch)


def decoder(params: Any, batch: Any, key: Any) -> Any:
    """Attention over a row's numbers, whose table is used at both ends; constants, and a cache of nothing."""
    x = batch["inputs"][..., None] * params["table"][:WIDTH] + np.arange(WIDTH)[:, None]
    mask = jnp.tril(jnp.ones((WIDTH, WIDTH), bool))
    for each in params["blocks"]:
        q, k, v = (x @ each[name]["w"] for name in "qkv")
        scores = jnp.where(mask, q @ k.swapaxes(1, 2), -1e9)
        x = x + clipped(jax.nn.softmax(scores) @ v @ each["o"]["w"])
    return chosen((x @ params["table"].T).sum(1)[:, :CLASSES] / 50, batch)


def decoder_parameters() -> dict[str, Any]:
    def block() -> dict[str, Any]:
        return {name: {"w": each} for name, each in zip("qkvo", weights(*[(4, 4)] * 4), strict=True)}

    return {"table": weights((12, 4))[0], "blocks": [block(), block()]}


def penalised(params: Any, batch: Any, key: Any) -> Any:
    shrunk = sum((each**2).sum() for each in jax.tree.leaves(params))
    return plain(params, batch, key) + shrunk * batch["weights"].sum()


def partly_constant(params: Any, batch: Any, key: Any) -> Any:
    """Two layers are read for a decision only, another has no gradient, and integers go along."""
    choice = jnp.argmax(layer(params[1], jnp.tanh(layer(params[0], batch["inputs"]))), 1)
    x = jnp.tanh(layer(lax.stop_gradient(params[2]), batch["inputs"]))
    x = jnp.where(choice[:, None] > 3, x, jnp.tanh(layer(params[3], x)))
    return chosen(layer(params[4], x), batch)


def behind_a_stopped_gradient(params: Any, batch: Any, key: Any) -> Any:
    """A loop that has no derivative backward, of what a layer before has made."""
    x = lax.stop_gradient(jnp.tanh(layer(params[0], batch["inputs"])))
    y = layer(params[1], x)
    x = lax.while_loop(lambda x: (x > 0.1).any(), lambda x: jnp.where(x > 0.1, x / 2, x), x)
    return chosen(layer(params[2], x + y), batch)


def flat(params: Any, batch: Any, key: Any) -> Any:
    return chosen(jnp.tanh(batch["inputs"] @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"], batch)


KINDS: dict[str, tuple[Callable[..., Any], Any]] = {
    "layers": (plain, dense()),
    "layers that differ by a number": (
        layers_in_turn(lambda params, x, number, key: jnp.tanh((1 + number / 1e9) * layer(params, x) * (1 + number))),
        dense(),
    ),
    "jitted": (layers_in_turn(jax.jit(lambda params, x, number, key: jax.nn.relu(layer(params, x)))), dense()),
    "checkpointed": (
        layers_in_turn(jax.checkpoint(lambda params, x, number, key: jnp.tanh(layer(params, x)))), dense(),
    ),
    "all prepared first": (all_prepared_first, dense()),
    "in a loop": (in_a_loop, {"last": {"w": weights((WIDTH, CLASSES))[0]}, "stack": {"w": weights((4, 8, 8))[0]}}),
    "decoder": (decoder, decoder_parameters()),
    "penalised": (penalised, dense()),
    "partly constant": (partly_constant, dense(4)),
    "behind a stopped gradient": (behind_a_stopped_gradient, dense(2)),
    "flat": (flat, dict(zip(("w1", "b1", "w2", "b2"), weights((8, 8), (8,), (8, 3), (3,)), strict=True))),
    "a number alone": (lambda params, batch, key: params["x"] * batch["weights"].sum(), {"x": np.array(2.0)}),
}  # fmt: skip


FEW = [
    (3, "layers"), (3, "layers that differ by a number"), (3, "in a loop"), (3, "decoder"), (3, "partly constant"),
    (3, "behind a stopped gradient"),
]  # fmt: skip
MORE = [(size, kind) for kind in KINDS for size in (1, 2, 3, 4) if (size, kind) not in FEW]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
"""Three ranks are uneven, and one has no sample."""


def by_name(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.array(leaf) for path, leaf in leaves}


def mean_gradients(kind: str) -> dict[str, np.ndarray]:
    """JAX's own, of the whole function on all samples."""
    function, parameters = KINDS[kind]
    inputs, labels = samples()
    batch = {"inputs": inputs, "targets": labels, "weights": np.ones(ROWS)}
    return by_name(jax.grad(lambda params: function(params, batch, None) / ROWS)(parameters))


def trained(comm: Communicator, model: JaxModel, steps: int = 1, microbatches: int = 1, stage: int = 3) -> Any:
    method = GradientParallel(comm, stage=stage, bucket_bytes=1, microbatches=microbatches)
    method.setup(model, optim.SGD(), Plan(Key(1), lambda step: 1.0, steps))
    method.advance(UnevenFeed(*samples()), steps)
    return method


@pytest.mark.parametrize(("size", "kind"), CASES)
def test_gradients_are_serial_whatever_a_function_is_like(size, kind):
    function, parameters = KINDS[kind]
    model, before, expected = JaxModel(function, parameters), by_name(parameters), mean_gradients(kind)

    def check(comm: Communicator) -> None:
        method = trained(comm, model, microbatches=1 + (kind == "layers"))
        after = method.whole().views
        assert after.keys() == expected.keys()
        for name, gradient in expected.items():
            got = before[name] - after[name]
            assert np.linalg.norm(got - gradient) <= BOUND * max(np.linalg.norm(gradient), 1e-3), name
        assert sum(comm.allgather_object(method.params.nbytes)) == model.layout.nbytes

    LocalWorld(size, timeout_s=60).run(check)


def noisy(params: Any, batch: Any, key: Any) -> Any:
    def step(each: Any, x: Any, number: int, key: Any) -> Any:
        if key is not None:
            x = x * jax.random.bernoulli(jax.random.fold_in(key, number), 0.5, x.shape)
        return jnp.tanh(layer(each, x))

    return layers_in_turn(step)(params, batch, key)


def test_what_is_called_back_comes_twice_but_for_the_last_unit():
    seen: list[int] = []

    def step(each: Any, x: Any, number: int, key: Any) -> Any:
        if key is not None:  # nor when it is seen whether the loss is a sum
            jax.debug.callback(lambda largest: seen.append(number), x.max())
        return jnp.tanh(layer(each, x))

    def check(comm: Communicator) -> None:
        trained(comm, JaxModel(layers_in_turn(step), dense(2)))
        jax.effects_barrier()

    LocalWorld(1, timeout_s=60).run(check)
    assert sorted(seen) == [0, 0, 1, 1]


def test_a_backward_pass_draws_what_the_forward_pass_drew():
    """As in stage 2, where JAX keeps it."""

    def check(comm: Communicator) -> None:
        second, third = (trained(comm, JaxModel(noisy, dense(1)), stage=stage).whole().views for stage in (2, 3))
        for name in second:
            np.testing.assert_allclose(second[name], third[name], rtol=0, atol=1e-12)

    LocalWorld(2, timeout_s=60).run(check)


@pytest.mark.parametrize("kind", ["layers", "jitted", "checkpointed", "all prepared first"])
def test_a_unit_reads_one_layer(kind):
    model, (inputs, labels) = JaxModel(*KINDS[kind]), samples()
    steps = model._sharded.steps(model._arguments(Batch(inputs, labels, np.arange(ROWS)), Key(0)))
    assert steps.reads == [(f"{each}.b", f"{each}.g", f"{each}.w") for each in range(4)]


def test_what_is_gathered_is_what_the_passes_read():
    """Forward every layer but the last, the last for both passes, and backward the others: two buckets each."""
    model = JaxModel(plain, dense())

    def check(comm: Communicator) -> None:
        method = trained(comm, model)
        comm.ledger.reset()
        method.plan = Plan(Key(1), lambda step: 1.0, 2)
        method.advance(UnevenFeed(*samples()), 2)
        layers = [8 * (-(-WIDTH * size // 8) * 8 + 8 * -(-size // 8) + WIDTH) for size in (WIDTH,) * 3 + (CLASSES,)]
        found = comm.ledger.snapshot()[comm.ledger.axis, "allgather"]
        assert (found.calls, found.logical_bytes) == (2 * 7, 2 * sum(layers) - layers[-1])

    LocalWorld(2, timeout_s=60).run(check)


def test_gradients_are_complete_as_soon_as_they_can_be(monkeypatch):
    """Those of what no derivative needs at once, for the last layers' are reduced only after them."""
    found: list[str] = []
    monkeypatch.setattr(StreamedGradients, "complete", lambda grads, name: found.append(name))
    function, parameters = KINDS["partly constant"]
    LocalWorld(1, timeout_s=60).run(lambda comm: trained(comm, JaxModel(function, parameters)) and None)
    assert [name.partition(".")[0] for name in found] == [each for each in "01243" for _ in range(3)]


@pytest.fixture(scope="module")
def compilations():
    """Counts what is compiled, for as long as the process lives: older versions of JAX forget no listener."""
    found: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return found


@pytest.mark.parametrize("function", [plain, KINDS["jitted"][0]], ids=["plain", "a derivative rule under jit"])
def test_nothing_is_traced_or_compiled_twice_and_equal_layers_once(compilations, function):

    def compiled(layers: int, steps: int) -> tuple[int, int]:
        before, calls = len(compilations), list[str]()

        def counted(params: Any, batch: Any, key: Any) -> Any:
            calls.append("")
            return function(params, batch, key)

        LocalWorld(1, timeout_s=60).run(lambda comm: trained(comm, JaxModel(counted, dense(layers)), steps) and None)
        return len(compilations) - before, len(calls)

    compiled(3, 1)  # what JAX itself compiles for the first time
    once = compiled(3, 1)
    assert compiled(3, 4) == once
    assert compiled(7, 2) == once
    assert once[1] == 3  # the step, and twice to see that the loss is a sum


class OnePlace(Mapping[str, Any]):
    """Parameters of one size, each brought to the same memory, which holds no number before."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        (shape,) = {each.shape for each in values.values()}
        self.values_of = values
        memory = np.empty(np.prod(shape) + 8)
        self.place = memory[-memory.ctypes.data // 8 % 8 :][: np.prod(shape)].reshape(shape)  # as JAX shares it

    def __getitem__(self, name: str) -> np.ndarray:
        self.place[...] = self.values_of[name]
        return self.place.view()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_of)

    def __len__(self) -> int:
        return len(self.values_of)


def keep(found: dict[str, np.ndarray], name: str, gradient: np.ndarray) -> None:
    found[name] = gradient.copy()


def test_memory_may_be_overwritten_as_soon_as_a_unit_is_done():
    """JAX computes in a thread of its own; the next parameters are written to the memory which that reads."""
    size, names = 384, ("a", "b", "c")
    values = {name: np.random.default_rng(number).standard_normal((size, size)) for number, name in enumerate(names)}

    def loss(parameters: list[Any], x: Any) -> Any:
        for each in parameters:
            for _ in range(6):
                x = jnp.tanh(x @ each / 16)
        return (x**2).sum()

    x = np.ones((size, size))
    expected, gradients = jax.value_and_grad(loss)(list(values.values()), x)
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in values.values()]
    sharded = ShardedLoss(loss, names, shapes, lambda name: name)
    steps = sharded.steps([x])
    assert sharded.steps([2 * x]) is steps
    assert steps.reads == [(name,) for name in names]
    for _ in range(3):
        found: dict[str, np.ndarray] = {}
        value = steps.run(OnePlace(values), [x], partial(keep, found))
        assert value == pytest.approx(float(expected), rel=1e-12)
        for name, gradient in zip(names, gradients, strict=True):
            np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-9 * np.abs(gradient).max())


def test_ranks_of_one_process_trace_one_after_the_other():
    """A derivative rule, in what they share, keeps notes while it is traced."""
    inside, most = 0, 0

    @jax.custom_vjp
    def halved(x: Any) -> Any:
        return x / 2

    def forward(x: Any) -> tuple[Any, None]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return halved(x), None

    halved.defvjp(forward, lambda _, dy: (dy / 2,))

    values, x = {"a": weights((8, 8))[0]}, np.ones((2, 8))
    shapes = [jax.ShapeDtypeStruct((8, 8), x.dtype)]
    steps = ShardedLoss(lambda parameters, x: halved(x @ parameters[0]).sum(), "a", shapes, str).steps([x])
    (unit,), known = steps._program.units, dict.fromkeys(steps._program.arguments, x)
    compiled = CompiledUnit(unit.jaxpr, [0], [0])
    assert not most
    with ThreadPoolExecutor(2) as ranks:
        last, backward = (
            ranks.submit(_with_parameters, OnePlace(values), unit, known, *function)
            for function in ((compiled.last,), (compiled.backward, [np.ones(())]))
        )
        for gradient in (last.result()[1][0], backward.result()[0]):
            assert np.array_equal(gradient, np.ones((8, 8)))
    assert most == 1


def test_the_first_samples_tell_whether_the_loss_is_a_sum():
    """Not a share without any, though another rank of the process has it."""
    model, (inputs, labels) = JaxModel(MISUSE["a mean"][0], dense()), samples()
    model._let_go(Batch(inputs[:0], labels[:0], np.arange(0)))
    with pytest.raises(InputError, match="the loss is a mean over the batch"):
        model._let_go(Batch(inputs, labels, np.arange(ROWS)))
    assert not model._initial


MORE_PAIRS = [((3, 3), (2, 2)), ((2, 1), (3, 3)), ((4, 3), (3, 3))]
"""Ranks and stage of who writes, and of who reads."""


def large_arrays() -> list[jax.Array]:
    return [each for each in jax.live_arrays() if each.nbytes >= 8 * WIDTH * WIDTH]


def test_a_rank_holds_its_shards_and_no_parameter_whole():
    model, others = JaxModel(plain, dense(6)), large_arrays()

    def check(comm: Communicator) -> None:
        method = trained(comm, model, steps=2)
        own = method.params.nbytes
        assert sum(comm.allgather_object(own)) == model.layout.nbytes
        assert method.params.passage_nbytes == 8 * (WIDTH * WIDTH + 2 * WIDTH)  # the largest weight, bias and factor
        assert not [each for each in large_arrays() if not any(each is other for other in others)]
        with pytest.raises(InputError, match="first values were let go when the model was trained fully sharded"):
            method.setup(model, optim.SGD(), Plan(Key(1), lambda step: 1.0, 1))

    LocalWorld(3, timeout_s=60).run(check)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [((2, 3), (1, 3)), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)],
)
def test_a_state_goes_on_in_any_stage_on_any_number_of_ranks(writer, reader):
    """Two steps in one way, and the third in another, are three steps."""

    def begun(comm: Communicator, stage: int, steps: int) -> Any:
        method = GradientParallel(comm, stage=stage, bucket_bytes=1)
        method.setup(JaxModel(plain, dense()), optim.Adam(), Plan(Key(1), lambda step: 0.1, 3))
        method.advance(UnevenFeed(*samples()), steps)
        return method

    def write(comm: Communicator) -> tuple[Any, dict[str, np.ndarray]]:
        state = begun(comm, writer[1], 2).state()
        tensors: dict[str, np.ndarray] = {}
        for pieces in comm.allgather_object([(p.name, p.global_shape, p.span, p.array.copy()) for p in state.pieces]):
            for name, shape, span, array in pieces:
                tensors.setdefault(name, np.full(shape, np.nan)).reshape(-1)[slice(*span)] = array.reshape(-1)
        return state.scalars, tensors

    def read(comm: Communicator) -> dict[str, np.ndarray]:
        method = begun(comm, reader[1], 0)
        method.load(scalars, tensors.__getitem__)
        method.advance(UnevenFeed(*samples()), 3)
        return {name: each.copy() for name, each in method.whole().views.items()}

    scalars, tensors = LocalWorld(writer[0], timeout_s=60).run(write)[0]
    for found in LocalWorld(reader[0], timeout_s=60).run(read):
        for name, expected in uninterrupted().items():
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-9)


@cache
def uninterrupted() -> dict[str, np.ndarray]:
    def alone(comm: Communicator) -> dict[str, np.ndarray]:
        method = DataParallel(comm)
        method.setup(JaxModel(plain, dense()), optim.Adam(), Plan(Key(1), lambda step: 0.1, 3))
        method.advance(UnevenFeed(*samples()), 3)
        return {name: each.copy() for name, each in method.params.views.items()}

    return LocalWorld(1).run(alone)[0]


def by_size_of_batch(params: Any, batch: Any, key: Any) -> Any:
    rows = len(batch["inputs"])
    return plain(params[::-1] if rows == 3 else params, batch, key)  # the second rank's share


MISUSE = {
    "a mean": (
        lambda *given: plain(*given) / len(given[1]["targets"]),
        InputError, "the loss is a mean over the batch",
    ),
    "no number": (
        lambda params, batch, key: layer(params[-1], batch["inputs"]),
        InputError, r"the loss is no number; got float64 of shape \(., 8\); expected a floating-point scalar",
    ),
    "more than a number": (
        lambda *given: (plain(*given), {}),
        InputError, "the loss is no number; got tuple; expected a floating-point scalar",
    ),
    "another way": (by_size_of_batch, MismatchError, "ranks called different collectives"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSE)
def test_what_stage_3_cannot_do_is_an_error(what):
    function, error, message = MISUSE[what]
    square = [dict(each) for each in dense(3)[:-1]]
    with pytest.raises(error, match=message):
        LocalWorld(2, timeout_s=20).run(lambda comm: trained(comm, JaxModel(function, square)) and None)
