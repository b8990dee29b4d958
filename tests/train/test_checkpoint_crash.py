"""A process killed in any phase of writing leaves the earlier checkpoints, and the new one whole or not to be seen."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mpitrain.train.checkpoint import checkpoints, clean_up, latest, load, verify

WRITER = textwrap.dedent("""
    import os, signal, sys, threading
    from pathlib import Path
    import numpy as np
    from mpitrain.arrays import Layout, Segment
    from mpitrain.comm import LocalWorld
    from mpitrain.method.state import State, pieces_of
    from mpitrain.train.checkpoint import Score, save

    directory, fatal, occurrence, replace = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "replace"
    layout = Layout.build([Segment("weight", (100,)), Segment("bias", (10,), group="no_decay")])
    lock, told = threading.Lock(), []

    def on_phase(phase):
        with lock:
            told.append(phase)
            if told.count(fatal) == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    def write(comm, step, value, tell=None):
        shard = layout.shards(2)[comm.rank]
        pieces = pieces_of("params", np.full(shard.size, value, np.float32), shard)
        score = Score("loss", float(step), False)
        save(directory, step, State(pieces, {"value": value}), comm, layout, score=score, keep=2, on_phase=tell)

    def run(comm):
        for step in (1, 2, 3):
            write(comm, step, step)
        write(comm, 3 if replace else 4, 4, on_phase)

    LocalWorld(2).run(run)
""")


def crash(directory, phase, occurrence, mode):
    command = [sys.executable, "-c", WRITER, str(directory), phase, str(occurrence), mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def assert_whole(path, value):
    verify(path)
    opened = load(path)
    assert opened.scalars == {"value": value}
    np.testing.assert_array_equal(opened.read("params/weight"), np.full(100, value, np.float32))
    np.testing.assert_array_equal(opened.read("params/bias"), np.full(10, value, np.float32))


@pytest.mark.parametrize(
    ("phase", "occurrence", "visible"),
    [
        ("created", 1, False),
        ("created", 2, False),
        ("piece", 1, False),
        ("piece", 2, False),
        ("piece", 3, False),
        ("data", 1, False),
        ("manifest", 1, False),
        ("renamed", 1, True),
        ("recorded", 1, True),
        ("discarded", 1, True),
        ("pruned", 1, True),
    ],
)
def test_killed_while_writing_a_new_one(tmp_path, phase, occurrence, visible):
    done = crash(tmp_path, phase, occurrence, "new")
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = latest(tmp_path)  # as a reader sees it that changes nothing
    assert_whole(newest, 4 if visible else 3)
    clean_up(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    expected = {1, 2, 3} | ({4} if visible else set())  # 1 is the best, 2 and 3 were the newest
    if phase in ("discarded", "pruned"):
        expected -= {2}
    assert {path.name for path in checkpoints(tmp_path)} == {f"step-0000000{step}" for step in expected}
    for step in expected:
        assert_whole(tmp_path / f"step-0000000{step}", step)


@pytest.mark.parametrize(("phase", "value"), [("piece", 3), ("manifest", 3), ("replaced", 3), ("renamed", 4)])
def test_killed_while_replacing(tmp_path, phase, value):
    done = crash(tmp_path, phase, 1, "replace")
    assert done.returncode == -signal.SIGKILL, done.stderr
    clean_up(tmp_path)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000001", "step-00000002", "step-00000003"]
    assert_whole(tmp_path / "step-00000003", value)


@pytest.mark.parametrize("phase", ["piece", "discarded"])
def test_the_next_checkpoint_cleans_up(tmp_path, phase):
    assert crash(tmp_path, phase, 1, "new").returncode == -signal.SIGKILL
    assert crash(tmp_path, "never", 1, "new").returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000003", "step-00000004", "best.json"}
    assert_whole(tmp_path / "step-00000004", 4)
