from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from mpitrain._errors import JobError
from mpitrain.train.job.userfile import load_object


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        del sys.modules[name]


def failure(folder: Path, source: str, name: str = "build") -> str:
    (folder / "my_model.py").write_text(source)
    with pytest.raises(JobError) as caught:
        load_object(f"{folder}/my_model.py:{name}")
    found = str(caught.value)
    assert "\n" not in found
    assert found.startswith(f"{folder}/my_model.py")
    return found.removeprefix(f"{folder}/my_model.py")


def test_an_object_of_a_file_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_model.py").write_text("def build(width): return 2 * width\n")
    assert load_object(f"{tmp_path}/my_model.py:build")(3) == 6
    monkeypatch.chdir(tmp_path)
    assert load_object("my_model.py:build")(3) == 6


def test_a_file_may_import_its_neighbour_and_hold_dataclasses(tmp_path: Path):
    (tmp_path / "a_neighbour_of_mine.py").write_text("WIDTH = 5\n")
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport a_neighbour_of_mine as n\n"
    (tmp_path / "m.py").write_text(f"{source}@dataclass\nclass Net:\n    width: int = n.WIDTH\n")
    net = load_object(f"{tmp_path}/m.py:Net")
    assert is_dataclass(net)
    assert net().width == 5


def test_a_file_is_run_once_until_it_changes(tmp_path: Path):
    file = tmp_path / "m.py"
    file.write_text("class Net: pass\nLoss = Net\n")
    assert load_object(f"{tmp_path}/m.py:Net") is load_object(f"{tmp_path}/m.py:Loss")
    file.write_text("class Net: pass\nLoss = None\n")
    assert load_object(f"{tmp_path}/m.py:Loss") is None


def test_a_name_that_is_not_there(tmp_path: Path):
    found = failure(tmp_path, "def build(): pass\ndef other(): pass\n", "biuld")
    assert found == ': there is no "biuld"; expected build, other; did you mean "build"?'


def test_a_file_that_is_not_there(tmp_path: Path):
    (tmp_path / "my_model.py").touch()
    with pytest.raises(JobError, match=r'mymodel.py: no such file; .*; did you mean "my_model.py"\?'):
        load_object(f"{tmp_path}/mymodel.py:build")
    with pytest.raises(JobError, match="cannot be read"):
        load_object(f"{tmp_path}:build")


def test_an_exception_is_named_with_the_line_of_the_file(tmp_path: Path):
    assert failure(tmp_path, "import json\n\njson.loads('{')\n").startswith(", line 3: ended by JSONDecodeError: ")
    assert failure(tmp_path, "def f():\n    raise ValueError('a\\nb')\nf()\n") == ", line 2: ended by ValueError: a b"
    assert failure(tmp_path, "raise SystemExit\n") == ", line 1: ended by SystemExit"
    assert failure(tmp_path, "import no_such_thing\n").startswith(", line 1: ended by ModuleNotFoundError: No module")


@pytest.mark.parametrize(
    ("line", "extra"),
    [("import torch.nn as nn", "torch"), ("from jax import numpy", "jax"), ("import sklearn", "datasets")],
)
def test_a_library_that_an_extra_brings_is_told_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, extra: str
):
    library = line.split()[1].partition(".")[0]
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # which Python takes for a library that is not there
    found = failure(tmp_path, f"{line}\n")
    assert found.startswith(", line 1: ended by ModuleNotFoundError: ")
    assert found.endswith(f"; pip install 'mpitrain[{extra}]'")


def test_a_file_that_is_not_python(tmp_path: Path):
    assert failure(tmp_path, "x = 1\ndef build(:\n").startswith(", line 2: is not Python: ")
    assert failure(tmp_path, "x = '\0'").startswith(": is not Python: ")


def test_a_failed_file_can_be_mended(tmp_path: Path):
    for _ in range(2):
        assert failure(tmp_path, "1 / 0\n") == ", line 1: ended by ZeroDivisionError: division by zero"
    (tmp_path / "my_model.py").write_text("build = 1\n")
    assert load_object(f"{tmp_path}/my_model.py:build") == 1


@pytest.mark.parametrize("spec", ["", "build", "m.py:", ":build", "m.py:a b"])
def test_a_specification_that_names_nothing(spec: str):
    with pytest.raises(JobError, match=r'expected "file\.py:name"'):
        load_object(spec)
