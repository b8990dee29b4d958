"""Whatever happens to the bytes of a checkpoint, it is a `CheckpointError` that says where: never a wrong number."""

import json
import re
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain._errors import CheckpointError
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import LocalWorld
from mpitrain.method.state import State, pieces_of
from mpitrain.train.checkpoint import load, save, verify
from mpitrain.train.checkpoint.manifest import seal, unseal

LAYOUT = Layout.build([Segment("weight", (40,)), Segment("bias", (4,), group="no_decay")])


def write(directory, step):
    def run(comm):
        shard = LAYOUT.shards(2)[comm.rank]
        flat = np.arange(shard.size, dtype=np.float32)
        return save(directory, step, State(pieces_of("params", flat, shard), {"lr": 0.1}), comm, LAYOUT)

    return LocalWorld(2).run(run)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints; the tests damage the second, and mend it."""
    directory = tmp_path_factory.mktemp("run")
    return write(directory, 1), write(directory, 2)


@pytest.fixture
def path(run):
    before = {file: file.read_bytes() for file in run[1].iterdir()}
    yield run[1]
    for file, data in before.items():
        file.write_bytes(data)
    verify(run[1])


def refused(path, file):
    """Check that the file is named, and the checkpoint that can be used instead."""
    remedy = f"remove {path} to go on from step-00000001, which is whole"
    with pytest.raises(CheckpointError, match=f"^load checkpoint: .*{file}.*{re.escape(remedy)}$"):
        load(path)


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.bin", "rank-00001.bin"])
def test_every_flipped_bit_is_found(path, file):
    whole = (path / file).read_bytes()
    positions = np.random.default_rng(0).permutation(8 * len(whole))[:400]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << (position % 8)
        (path / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(file)):
            load(path)
    refused(path, file)


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.bin"])
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_truncated_files_are_found(path, file, left):
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    refused(path, file)


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.bin"])
def test_missing_files_are_found(path, file):
    (path / file).unlink()
    refused(path, file)


def test_damage_that_only_one_rank_checks_ends_all(path):
    data = bytearray((path / "rank-00001.bin").read_bytes())
    data[-1] ^= 1
    (path / "rank-00001.bin").write_bytes(data)

    def open_it(comm):
        try:
            load(path, comm, LAYOUT)
        except Exception as error:
            return str(error), error.exit_code
        return None

    for text, code in LocalWorld(3).run(open_it):
        assert "rank-00001.bin: damaged" in text
        assert code == 2


def test_without_another_checkpoint_it_says_so(tmp_path):
    path = write(tmp_path, 1)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no other one is whole"):
        load(path)
    with pytest.raises(CheckpointError, match=r"nowhere/manifest\.json: No such file"):
        load(tmp_path / "nowhere")


def rewrite(path, change):
    """Change the manifest and seal it again, as a faulty or hostile writer might."""
    document = json.loads((path / "manifest.json").read_bytes())
    del document["checksum"]
    change(document)
    (path / "manifest.json").write_bytes(seal(document))


def piece(document, tensor="params/weight", number=0):
    return document["tensors"][tensor]["pieces"][number]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=2), "unknown format; got 'mpitrain-checkpoint', version 2"),
        (lambda d: d.update(format="other"), "unknown format; got 'other'"),
        (lambda d: d.update(version="1"), "unknown format"),
        (lambda d: d.update(version=True), "version: Input should be a valid integer"),
        (lambda d: d.update(byteorder="big"), "other byte order; got big; expected little"),
        (lambda d: d.update(step="2"), "step: Input should be a valid integer"),
        (lambda d: d.update(step=-1), "step: "),
        (lambda d: d.update(ranks=0), "ranks: "),
        (lambda d: d.update(more=1), "more: Extra inputs"),
        (lambda d: d.pop("scalars"), "scalars: Field required"),
        (lambda d: d.update(tensors=[]), "tensors: "),
        (lambda d: d.update(layout={}), "layout.dtype: "),
        (lambda d: d.update(score={"metric": "a", "value": "1", "higher_is_better": True}), "score.value: "),
        (lambda d: d["tensors"]["params/bias"].update(dtype="object"), "dtype that checkpoints do not hold"),
        (lambda d: d["tensors"]["params/bias"].update(kind="torn"), "kind: "),
        (lambda d: d["tensors"]["params/bias"].update(shape=[4.0]), "shape.0: "),
        (lambda d: d["tensors"]["params/bias"].update(shape=[10**30]), "hold 4 values, not 1000"),
        (lambda d: d["tensors"]["params/bias"].update(shape=[2, 2]), "a piece lies outside it"),
        (lambda d: d["tensors"]["params/bias"].update(pieces=[]), "hold 0 values, not 4"),
        (lambda d: piece(d).update(file="../step-00000001/rank-00000.bin"), "pieces.0.file: "),
        (lambda d: piece(d).update(file="/etc/passwd"), "pieces.0.file: "),
        (lambda d: piece(d).update(file="rank-00000.bin\n"), "pieces.0.file: "),
        (lambda d: piece(d).update(file="rank-00007.bin"), r"rank-00007\.bin: No such file"),
        (lambda d: piece(d).update(offset=-4), "offset: "),
        (lambda d: piece(d).update(offset=10**30), r"rank-00000\.bin: truncated"),
        (lambda d: piece(d, number=1).update(offset=4), r"rank-00001\.bin: damaged, checksum differs"),
        (lambda d: piece(d).update(nbytes=8), "bytes"),
        (lambda d: piece(d).update(box=[[0, 41]]), "a piece lies outside it"),
        (lambda d: piece(d).update(box=[[0, 40], [0, 1]]), "a piece lies outside it"),
        (lambda d: piece(d).update(flat=[32, 0]), "a piece lies outside it"),
        (lambda d: piece(d).update(flat=[8, 40]), "overlap or leave gaps"),
        (lambda d: piece(d).update(box=[[0, 32]]), "overlap or leave gaps"),
        (lambda d: piece(d, number=1).update(box=[[10, 18]], flat=[0, 8]), "overlap or leave gaps"),
        (lambda d: piece(d).update(checksum="0" * 63), "checksum: "),
        (lambda d: piece(d).update(checksum="0" * 64), r"rank-00000\.bin: damaged"),
        (lambda d: d["tensors"]["params/weight"]["pieces"].pop(), "values, not 40"),
        (lambda d: d["tensors"]["params/weight"]["pieces"].append(piece(d)), "values, not 40"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_true_is_refused(path, change, says):
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=says):
        load(path)


def test_boxes_that_overlap_though_their_sizes_add_up_are_refused(path):
    def change(document):
        one, two = document["tensors"]["params/weight"]["pieces"]
        one.update(box=[[0, 32]], flat=[0, 32])
        two.update(box=[[30, 38]], flat=[0, 8])

    rewrite(path, change)
    with pytest.raises(CheckpointError, match="overlap"):
        load(path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000, b"1" * 10_000, b'{"version": 1, "version": 1}']
)
def test_a_manifest_that_is_no_manifest_is_refused(path, text):
    (path / "manifest.json").write_bytes(text)
    refused(path, "manifest.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest_is_taken_or_refused_cleanly(run, data):
    document = json.loads((run[0] / "manifest.json").read_bytes())
    del document["checksum"]
    node, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(JSON)
    with suppress(CheckpointError):
        unseal(seal(document))
