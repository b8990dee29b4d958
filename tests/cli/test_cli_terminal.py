"""What a person at a terminal sees: a bar that moves, evaluations above it, and the result below."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
from commands import MPITRAIN, settings, write_job

COLUMNS = 90
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def at_a_terminal(cwd, *arguments, stdout_too=True):
    """Run the command line at a terminal; return (exit code, what the terminal got, standard output if elsewhere)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    env = dict(os.environ, TERM="xterm-256color", OMPI_MCA_btl="^ofi", OMP_NUM_THREADS="1")
    out = cwd / "stdout"
    with out.open("wb") as elsewhere:
        process = subprocess.Popen(
            [*MPITRAIN, *map(str, arguments)], cwd=cwd, env=env, stdin=theirs, stderr=theirs,
            stdout=theirs if stdout_too else elsewhere, start_new_session=True,
        )  # fmt: skip
    os.close(theirs)
    seen = b""
    while chunk := _read(ours):
        seen += chunk
    os.close(ours)
    return process.wait(60), seen.decode(), out.read_text()


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # all that wrote to it have closed it
        return b""


def shown(seen):
    """Return the lines that stay on the terminal: of what overwrites itself, the last."""
    plain = _CONTROLS.sub("", seen)
    return [line.rpartition("\r")[2].rstrip() for line in plain.replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bar(tmp_path, ranks):
    job = write_job(tmp_path)
    more = settings(train__steps=300, train__evaluate_every_steps=100)
    code, seen, _ = at_a_terminal(tmp_path, "run", "-n", ranks, job, *more)
    assert code == 0, seen
    lines = shown(seen)
    assert lines[0].startswith("job: ")
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["100/300", "200/300", "300/300"]
    (bar,) = [line for line in lines if "━" in line]  # one line, drawn over and over
    assert re.search(r"━ 300/300 steps +[\d,]+ samples/s ETA 0:00:00 loss 0\.\d+$", bar)
    assert len(bar) <= COLUMNS
    assert _CONTROLS.sub("", seen).count("ETA") > 2
    assert any(line.startswith("report ") for line in lines[-3:])
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # the cursor is back


def test_json_is_alone_on_standard_output(tmp_path):
    code, seen, out = at_a_terminal(tmp_path, "run", "-n", 2, write_job(tmp_path), "--json", stdout_too=False)
    assert code == 0, seen
    assert json.loads(out)["steps"] == 24
    assert "━" in seen


def test_quiet(tmp_path):
    code, seen, _ = at_a_terminal(tmp_path, "run", write_job(tmp_path), "--quiet")
    assert code == 0
    assert [line.split()[0] for line in shown(seen) if line] == ["job:", "test_loss", "weights", "report"]


def test_the_cursor_comes_back_when_a_rank_fails(tmp_path):
    """Rank 0, which draws the bar, is killed while the cursor is hidden."""
    (tmp_path / "model.py").write_text(
        "import mpitrain\n"
        "from mpitrain import nn\n"
        "class Fails(nn.Network):\n"
        "    def loss_and_gradients(self, *arguments):\n"
        "        if mpitrain.world().rank == 1:\n"
        "            raise RuntimeError('on purpose')\n"
        "        return super().loss_and_gradients(*arguments)\n"
        "def build():\n"
        "    return Fails(nn.Linear(5, 3), nn.CrossEntropy())\n"
    )
    job = write_job(tmp_path)
    text = job.read_text()
    job.write_text(re.sub(r"kind = \"mlp\"\n(.*\n){3}", 'build = "model.py:build"\n', text))
    code, seen, _ = at_a_terminal(tmp_path, "run", "-n", 2, job)
    assert code == 1
    assert "[rank 1 of 2] RuntimeError: on purpose" in seen
    assert "\x1b[?25l" in seen
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")


def test_verify_says_which_run_goes_on(tmp_path):
    code, seen, out = at_a_terminal(tmp_path, "verify", write_job(tmp_path), "--steps", 1, "--json", stdout_too=False)
    assert code == 0, seen
    assert [line for line in shown(seen) if line] == ["2 ranks: 1 step …", "serial: 1 step …"]
    assert json.loads(out)["equal"]
