"""``mpitrain doctor --probe-gpu`` over a stand-in for CuPy, with libraries that crash, hang or move nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin_cupy

import mpitrain.comm
from mpitrain._errors import InputError
from mpitrain.cli.checks import devices, start, survey
from mpitrain.comm import Communicator, LocalWorld, probing
from mpitrain.comm.launch import library
from mpitrain.comm.machine import gpus
from mpitrain.comm.probing import program
from mpitrain.comm.transports import device_choice

RIGHT = {"ipc": "refused", "cuda_aware": ""}
TESTS = Path(__file__).resolve().parent.parent

RANK = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
import standin_cupy
sys.modules.update(standin_cupy.modules())
from mpitrain.comm.mpi import MpiCommunicator
from mpitrain.comm.probing import program
fault, step = {fault!r}, sys.argv[1]
begin = MpiCommunicator._begin

def faulty(comm, call):
    handle = begin(comm, call)
    if isinstance(call.recv, standin_cupy.ndarray) and comm.rank == 1:
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(60)
        if fault == "zeros":
            wait, handle.wait = handle.wait, lambda: (wait(), call.recv.memory.fill(0))
    return handle

def unreachable(*arguments):
    raise standin_cupy.CUDARuntimeError("cudaErrorPeerAccessUnsupported")

MpiCommunicator._begin = faulty
if fault == "unreachable":
    sys.modules["cupy"].cuda.runtime.ipcOpenMemHandle = unreachable
    sys.modules["cupy"].cuda.nccl.available = False
    if os.environ["MPITRAIN_DEVICE_TRANSPORT"] == "cuda_aware":
        sys.exit("error: no such transport here")
program.main(step, float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MPITRAIN_DEVICE_TRANSPORT", raising=False)
    return tmp_path / "mpitrain" / "devices"


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Any]:
    monkeypatch.setattr(start.tempfile, "tempdir", str(tmp_path))

    def judge(fault: str, limit_s: float = 60) -> Any:
        script = tmp_path / "rank.py"
        script.write_text(RANK.format(tests=str(TESTS), fault=fault))
        return devices.judge([sys.executable, str(script)], limit_s)

    return judge


def test_what_does_it_right_is_used(judged: Callable[..., Any], cache: Path) -> None:
    finding = judged("none")
    assert finding.status == "ok"
    assert finding.found.startswith("probed on 20")
    assert finding.found.endswith(f": nccl: right; ipc: right; cuda_aware: right; kept in {next(cache.glob('*.json'))}")
    way = device_choice.choose(library().version)
    assert way.names == ("nccl", "ipc", "cuda_aware")
    assert way.between_nodes().names == ("cuda_aware",)
    assert "memory of GPUs nccl (probed on 20" in devices.transport().found


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("segfault", "send: exit code 139"),
        pytest.param("zeros", "send: rank 1: 1 of 1 values are wrong: [0] is 0.0, not 1.0", marks=pytest.mark.slow),
        pytest.param("hang", "send: exit code 1: Timeout (0:00:03)", marks=pytest.mark.slow),
    ],
)
def test_a_library_that_does_not_is_not(judged: Callable[..., Any], cache: Path, fault: str, words: str) -> None:
    finding = judged(fault, 6 if fault == "hang" else 60)
    assert finding.status == "ok"  # ranks can still read each other's memory
    assert f"nccl: right; ipc: right; cuda_aware: {words}" in finding.found
    assert Path(finding.found.rpartition(" ")[2]).read_text()
    assert json.loads(next(cache.glob("*.json")).read_text())["problems"]["cuda_aware"].startswith(words)
    way = device_choice.choose(library().version)
    assert way.names == ("nccl", "ipc", "staged")
    assert words in way.why


def test_memory_that_cannot_be_reached_is_staged(judged: Callable[..., Any], cache: Path) -> None:
    finding = judged("unreachable")
    assert finding.status == "warn"
    assert "docs/gpu.md" in finding.remedy
    assert finding.found.startswith("memory of GPUs is staged: probed on 20")
    for name in ("nccl: broadcast", "ipc: broadcast", "cuda_aware: send"):
        assert f"{name}: exit code " in finding.found
    assert device_choice.choose(library().version).names == ("staged",)


@pytest.mark.parametrize("step", program.STEPS)
def test_wrong_values_on_one_rank_are_found(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", standin_cupy.module())
    perform, expected = program.STEPS[step]

    def forgetful(comm: Communicator, x: Any) -> Any:
        found = perform(comm, x)
        if comm.rank == 1 and x.size == 1000:
            found[7:] = standin_cupy.asarray(np.zeros(993, "float32"))
        return found

    assert LocalWorld(2).run(program.examine, step) == ["", ""]
    monkeypatch.setitem(program.STEPS, step, (forgetful, expected))
    right, wrong = LocalWorld(2).run(program.examine, step)
    assert right == ""
    assert wrong == f"993 of 1000 values are wrong: [7] is 0.0, not {8.0 * expected(1, 2)}"


def test_ranks_that_end_without_a_word_have_not_passed() -> None:
    for output in ("", '{"step": "send", "transport": "staged", "problem": ""}'):
        assert devices._problem(devices.Ended(0, 1.0, output), "ipc", "send") == "the ranks formed no world"
    assert "no end after 9 s" in devices._problem(devices.Ended(None, 9.0, ""), "ipc", "send")


def test_nothing_is_probed_or_kept_without_a_gpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "judge", None)
    alone = survey.Survey([])
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert devices.probe(alone).found == "not probed, and nothing kept: CuPy is not installed"
    module = standin_cupy.module()
    module.cuda.runtime.getDeviceCount = lambda: 0
    monkeypatch.setitem(sys.modules, "cupy", module)
    assert devices.probe(alone).found == "not probed, and nothing kept: CuPy 14.0.0 sees no GPU"
    in_a_launch: Any = survey.Survey([], comm=object())  # type: ignore[arg-type]
    assert devices.probe(in_a_launch).found == "not probed: ranks start no ranks"
    assert not cache.exists()


def test_only_the_same_setting_is_trusted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = probing.setting("Some MPI 1")
    path = probing.save(probing.Verdict.now(here, RIGHT))
    assert probing.known("Some MPI 1").verdict == probing.Verdict.from_json(path.read_text())
    assert device_choice.choose("Some MPI 1").name == "cuda_aware"
    assert device_choice.choose("Some MPI 2") == (("staged",), probing.known("Some MPI 2").note, False, False)
    for damage in ("", "{}", path.read_text().replace("Some MPI 1", "Some MPI 3"), path.read_text()[:-3]):
        path.write_text(damage)
        way = device_choice.choose("Some MPI 1")
        assert way.name == "staged"
        assert "counts as not probed" in way.why
    path.write_bytes(b"\xff")
    assert device_choice.choose("Some MPI 1").name == "staged"
    probing.save(probing.Verdict.now(here, RIGHT))
    monkeypatch.setattr(probing.verdict, "_cupy", lambda: "cupy-cuda13x 99")
    assert device_choice.choose("Some MPI 1").name == "staged"
    monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "staged")
    assert device_choice.choose("Some MPI 1").why == "MPITRAIN_DEVICE_TRANSPORT=staged"


def test_gpus_are_named_without_cuda(tmp_path: Path) -> None:
    for number, model in enumerate(("NVIDIA B", "NVIDIA A", "NVIDIA B")):
        (tmp_path / f"0000:0{number}").mkdir()
        (tmp_path / f"0000:0{number}" / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n")
    assert gpus(tmp_path) == "1 x NVIDIA A, 2 x NVIDIA B"
    assert gpus(tmp_path / "nowhere") == ""


def test_a_verdict_of_another_form_is_refused() -> None:
    with pytest.raises(InputError, match="verdict on device memory: of another version"):
        probing.Verdict.from_json('{"version": 1, "setting": {}, "problems": {}, "date": ""}')


@pytest.mark.mpi
def test_ranks_do_as_rank_0_knows(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    if world.rank == 0:
        probing.save(probing.Verdict.now(probing.setting(world.library), RIGHT))
    else:
        monkeypatch.setenv("MPITRAIN_DEVICE_TRANSPORT", "staged")  # which is for rank 0 to say
    with mpitrain.comm.Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        assert comm.device_transport == ("cuda_aware" if world.size > 1 else "alone")
    if world.rank == world.size - 1 and world.size > 1:
        monkeypatch.setattr(probing, "setting", lambda library: probing.Setting("another", library, "none"))
    with mpitrain.comm.Communicator.from_mpi(MPI.COMM_WORLD) as comm:
        assert comm.device_transport == ("staged" if world.size > 1 else "alone")
        assert ("several kinds" in comm.device_transport_reason) == (world.size > 1)
