"""Checkpoints: what n ranks write, m read; which are kept; what a failing disk leaves."""

import errno
import json
import os
import resource

import numpy as np
import pytest

from mpitrain._errors import CheckpointError, InputError, MpitrainError, StorageError
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import LocalWorld
from mpitrain.method.state import Piece, State, fill, pieces_of
from mpitrain.train import checkpoint
from mpitrain.train.checkpoint import Score, best, checkpoints, latest, load, save, verify

LAYOUT = Layout.build(
    [Segment("0.weight", (7, 5)), Segment("0.bias", (5,), group="no_decay"), Segment("1.scale", (), group="no_decay")]
)


def values(layout=LAYOUT, factor=1.0):
    """A flat array in which every element is different."""
    return np.arange(layout.size, dtype=layout.dtype) * layout.dtype.type(factor)


def sharded(rank, size, factor=1.0, layout=LAYOUT):
    shard = layout.shards(size)[rank]
    flat = values(layout, factor)[shard.start : shard.stop]
    return State(pieces_of("params", flat, shard), {"epoch": 3, "name": "é", "loss": 0.1})


def write(directory, step=1, ranks=1, factor=1.0, **options):
    return LocalWorld(ranks).run(
        lambda comm: save(directory, step, sharded(comm.rank, ranks, factor), comm, LAYOUT, **options)
    )[0]


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_what_n_ranks_write_m_ranks_read(tmp_path, writers, readers):
    path = write(tmp_path, 120, writers)
    assert path == tmp_path / "step-00000120"

    def read(comm):
        opened = load(path, comm, LAYOUT)
        shard = LAYOUT.shards(readers)[comm.rank]
        flat = np.full(shard.size, -1, np.float32)
        fill("params", flat, shard, opened.read)
        return opened, flat

    found = LocalWorld(readers).run(read)
    flat = np.concatenate([part for _, part in found])
    for segment in LAYOUT:
        np.testing.assert_array_equal(flat[segment.offset : segment.stop], values()[segment.offset : segment.stop])
    opened = found[0][0]
    assert (opened.step, opened.scalars) == (120, {"epoch": 3, "name": "é", "loss": 0.1})
    assert opened.names == ("params/0.bias", "params/0.weight", "params/1.scale")
    np.testing.assert_array_equal(opened.read("params/0.weight"), np.arange(35, dtype=np.float32).reshape(7, 5))
    assert opened.read("params/1.scale").shape == ()
    assert "params/1.scale" in opened
    assert "params/2.scale" not in opened


def test_boxes_of_a_split_tensor_are_put_together(tmp_path):
    whole = np.arange(24.0).reshape(4, 6)

    def run(comm):
        columns = ((0, 4), (0, 2)) if comm.rank == 0 else ((0, 4), (2, 6))
        part = whole[:, slice(*columns[1])]
        halves = [(0, 3), (3, part.size)]
        pieces = [Piece("w", (4, 6), columns, part.reshape(-1)[low:high], (low, high)) for low, high in halves]
        return save(tmp_path, 1, State(tuple(pieces)), comm, LAYOUT)

    path = LocalWorld(2).run(run)[0]
    np.testing.assert_array_equal(load(path).read("w"), whole)


def test_a_replicated_tensor_is_written_once_by_the_first_rank_that_holds_it(tmp_path):
    def run(comm):
        names = ["everywhere"] if comm.rank == 0 else ["everywhere", "not on 0"]
        pieces = [Piece(name, (3,), ((0, 3),), np.full(3, comm.rank), kind="replicated") for name in names]
        return save(tmp_path, 1, State(tuple(pieces)), comm, LAYOUT)

    path = LocalWorld(3).run(run)[0]
    opened = load(path)
    np.testing.assert_array_equal(opened.read("everywhere"), [0, 0, 0])
    np.testing.assert_array_equal(opened.read("not on 0"), [1, 1, 1])
    sizes = {file.name: file.stat().st_size for file in path.glob("*.bin")}
    assert sizes == {"rank-00000.bin": 24, "rank-00001.bin": 24, "rank-00002.bin": 0}


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_the_terms_of_a_sum_keep_their_sum(tmp_path, readers):
    def run(comm):
        piece = Piece("left over", (4,), ((1, 4),), np.full(3, 10.0**comm.rank), kind="summed")
        zero = Piece("left over", (4,), ((0, 1),), np.zeros(1), kind="summed")
        return save(tmp_path, 1, State((zero, piece)), comm, LAYOUT)

    path = LocalWorld(3).run(run)[0]
    terms = LocalWorld(readers).run(lambda comm: load(path, comm).read("left over"))
    np.testing.assert_array_equal(sum(terms), [0, 111, 111, 111])
    if readers == 3:
        np.testing.assert_array_equal(terms[1], [0, 10, 10, 10])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "bfloat16", "float64", "complex64", ">f4"])
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    pytest.importorskip("ml_dtypes")
    array = np.array([[0, 1, 0], [1, 1, 0]]).astype(dtype)
    state = State((Piece("a", (2, 3), ((0, 2), (0, 3)), array), Piece("none", (0, 3), ((0, 0), (0, 3)), array[:0])))
    path = LocalWorld(1).run(lambda comm: save(tmp_path, 1, state, comm, LAYOUT))[0]
    opened = load(path)
    assert opened.read("a").dtype.name == array.dtype.name
    np.testing.assert_array_equal(opened.read("a").astype(complex), array.astype(complex))
    assert opened.read("none").shape == (0, 3)


def test_non_contiguous_values_are_written_in_c_order(tmp_path):
    array = np.arange(12).reshape(3, 4).T
    state = State((Piece("a", (4, 3), ((0, 4), (0, 3)), array),))
    path = LocalWorld(1).run(lambda comm: save(tmp_path, 1, state, comm, LAYOUT))[0]
    np.testing.assert_array_equal(load(path).read("a"), array)


def test_nothing_is_pickled(tmp_path):
    path = write(tmp_path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    piece = manifest["tensors"]["params/0.weight"]["pieces"][0]
    raw = (path / piece["file"]).read_bytes()[piece["offset"] : piece["offset"] + piece["nbytes"]]
    assert raw == np.arange(35, dtype="<f4").tobytes()
    state = State((Piece("o", (1,), ((0, 1),), np.array([object()])),))
    with pytest.raises(CheckpointError, match="dtype that checkpoints do not hold; got 'object'"):
        LocalWorld(1).run(lambda comm: save(tmp_path, 2, state, comm, LAYOUT))


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.7, 6: 0.6}
    for step, value in scores.items():
        write(tmp_path, step, keep=2, score=Score("accuracy", value, True))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert latest(tmp_path).name == "step-00000006"
    assert best(tmp_path).name == "step-00000002"
    assert json.loads((tmp_path / "best.json").read_text())["checkpoint"] == "step-00000002"
    write(tmp_path, 7, keep=1, score=Score("loss", 4.0, False))
    write(tmp_path, 8, keep=1, score=Score("loss", 5.0, False))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000007", "step-00000008"]


def test_without_scores_none_is_best(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=1)
    assert best(tmp_path) is None
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"]
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoint": "../../etc"}', '{"checkpoint": 3, "score": null}'])
def test_a_damaged_record_of_the_best_is_said_and_mended_by_the_next(tmp_path, text):
    write(tmp_path, 1, score=Score("loss", 1.0, False))
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"best\.json: cannot be read"):
        best(tmp_path)
    write(tmp_path, 2, score=Score("loss", 2.0, False))
    assert best(tmp_path).name == "step-00000001"


def test_a_best_that_is_gone_is_said(tmp_path):
    path = write(tmp_path, 1, score=Score("loss", 1.0, False))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="names a checkpoint that is gone"):
        best(tmp_path)


def test_later_checkpoints_of_an_abandoned_future_go(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, score=Score("loss", 1.0 / step, False))
    assert best(tmp_path).name == "step-00000030"
    checkpoint.discard_after(tmp_path, 20)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010", "step-00000020"]
    assert best(tmp_path).name == "step-00000020"


def test_the_one_just_written_stays_also_below_later_ones(tmp_path):
    for step in (10, 20, 5):
        write(tmp_path, step, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000020"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 1, factor=2.0)
    np.testing.assert_array_equal(load(path).read("params/0.bias"), values(factor=2.0)[48:53])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


WEIGHT, BIAS, SCALE = sorted(LAYOUT, key=lambda segment: segment.size, reverse=True)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Layout.build([Segment("0.weight", (7, 4)), BIAS, SCALE]), r"'0.weight' has shape \(7, 5\), not \(7, 4\)"),
        (Layout.build([WEIGHT, BIAS]), "'1.scale' is in it, not in the model"),
        (Layout.build([WEIGHT, BIAS, SCALE, Segment("9.weight", (1,))]), "'9.weight' is missing in it"),
        (LAYOUT.astype(np.float64), "dtype is float32, not float64"),
        (Layout.build([WEIGHT, Segment("0.bias", (5,)), SCALE]), "'0.bias' is of group 'no_decay', not 'decay'"),
        (Layout.build([WEIGHT, BIAS, SCALE], ties={"tied": "0.weight"}), "ties are {}, not {'tied': '0.weight'}"),
        (Layout.build([Segment(f"{i}", (1,)) for i in range(5)]), "'0' is missing in it.* and 5 more; go on with"),
    ],
)
def test_another_model_is_told_by_its_tensors(tmp_path, other, says):
    path = write(tmp_path)
    with pytest.raises(CheckpointError, match=f"step-00000001: checkpoint of another model: .*{says}"):
        load(path, layout=other)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    opened = load(write(tmp_path))
    with pytest.raises(CheckpointError, match=r"no tensor 'optimizer.m/0.weight'"):
        opened.read("optimizer.m/0.weight")


@pytest.mark.parametrize("missing", [0, 1])
def test_pieces_that_do_not_make_up_a_tensor_are_not_written(tmp_path, missing):
    def run(comm):
        state = sharded(comm.rank, 3)
        return save(tmp_path, 1, state if comm.rank != missing else State(()), comm, LAYOUT)

    with pytest.raises(MpitrainError, match=r"tensor 'params/0.weight': its pieces hold"):
        LocalWorld(3).run(run)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_on_a_tensor_are_told(tmp_path):
    def run(comm):
        piece = Piece("a", (2,), ((comm.rank, comm.rank + 1),), np.zeros(1, [np.float32, np.float64][comm.rank]))
        return save(tmp_path, 1, State((piece,)), comm, LAYOUT)

    with pytest.raises(MpitrainError, match="tensor 'a': pieces disagree on what it is"):
        LocalWorld(2).run(run)


@pytest.mark.parametrize("scalar", [float("nan"), np.float32(1), {1: 2}, object()])
def test_scalars_that_json_cannot_say_are_refused(tmp_path, scalar):
    with pytest.raises(InputError, match="scalar of the state"):
        LocalWorld(1).run(lambda comm: save(tmp_path, 1, State((), {"x": scalar}), comm, LAYOUT))
    assert list(tmp_path.iterdir()) == []


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="keep: the newest checkpoint is always kept; got 0"):
        write(tmp_path, keep=0)


def test_a_file_in_place_of_the_directory_is_a_storage_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")

    def run(comm):
        try:
            save(tmp_path / "file" / "checkpoints", 1, sharded(comm.rank, 3), comm, LAYOUT)
        except MpitrainError as error:
            return error
        return None

    errors = LocalWorld(3).run(run)
    assert [error.exit_code for error in errors] == [1, 1, 1]
    assert isinstance(errors[0], StorageError)
    assert "write checkpoint: " in str(errors[0])
    assert "Not a directory; choose a directory" in str(errors[0])


@pytest.mark.parametrize("limit", [10, 100, 1000])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path, limit):
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # the kernel cuts writes short there: EFBIG
    try:
        with pytest.raises(MpitrainError) as caught:
            write(tmp_path, 2, ranks=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.exit_code == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    verify(tmp_path / "step-00000001")
    verify(write(tmp_path, 2))


@pytest.mark.parametrize("call", range(1, 7))
def test_no_space_at_any_fsync_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            write(tmp_path, 1, factor=2.0, score=Score("loss", 1.0, False))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"step-00000001", "best.json"}
    factor = 1.0 if call < 5 else 2.0  # the fifth syncs the directory after the rename
    np.testing.assert_array_equal(load(latest(tmp_path)).read("params/0.bias"), values(factor=factor)[48:53])
