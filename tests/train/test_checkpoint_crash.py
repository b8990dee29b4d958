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

PHASES = ["created", "piece", "data", "manifest", "replaced", "renamed", "recorded", "discarded", "pruned"]


def crash(directory, phase, occurrence, mode):
    command = [sys.executable, "-c", WRITER, str(directory), phase, str(occurrence), mode]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def assert_whole(path, value):
    verify(path)
    opened = load(path)
    assert opened.scalars == {"value": value}
    np.testing.assert_array_equal(opened.read("params/weight"), np.full(100, value, np.float32))
    np.testing.assert_array_equal(opened.read("params/bias"), np.full(10, value, np.float32))


@pytest.mark.parametrize("mode", ["new", "replace"])
@pytest.mark.parametrize(
    ("phase", "occurrence"), [*((phase, 1) for phase in PHASES), ("created", 2), ("piece", 2), ("piece", 3)]
)
def test_killed_at(tmp_path, phase, occurrence, mode):
    done = crash(tmp_path, phase, occurrence, mode)
    happens = not ((phase == "replaced" and mode == "new") or (phase == "discarded" and mode == "replace"))
    assert done.returncode == (-signal.SIGKILL if happens else 0), done.stderr
    visible = PHASES.index(phase) >= PHASES.index("renamed") or not happens
    newest = latest(tmp_path)  # as a reader sees it that changes nothing
    if mode == "new":
        assert newest.name == ("step-00000004" if visible else "step-00000003")
    clean_up(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    found = {path.name: path for path in checkpoints(tmp_path)}
    expected = {"step-00000001": 1, "step-00000002": 2, "step-00000003": 3}  # 1 is the best, 2 and 3 the newest
    if visible:
        expected |= {"step-00000004" if mode == "new" else "step-00000003": 4}
    if mode == "new" and phase in ("discarded", "pruned"):
        del expected["step-00000002"]
    if mode == "new" and not happens:
        del expected["step-00000002"]
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert_whole(found[name], value)


@pytest.mark.parametrize("phase", ["piece", "manifest", "replaced", "discarded"])
def test_the_next_checkpoint_cleans_up(tmp_path, phase):
    mode = "replace" if phase == "replaced" else "new"
    assert crash(tmp_path, phase, 1, mode).returncode == -signal.SIGKILL
    assert crash(tmp_path, "never", 1, "new").returncode == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000003", "step-00000004", "best.json"}
    assert_whole(tmp_path / "step-00000004", 4)
