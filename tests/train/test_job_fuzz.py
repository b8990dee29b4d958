from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mpitrain._errors import JobError
from mpitrain.train.job import Job
from mpitrain.train.job.section import Section, choices, kind_of

VALID: dict[str, Any] = {
    "data": {"source": "digits"},
    "model": {"kind": "cnn"},
    "optimizer": {"kind": "adam"},
    "train": {"epochs": 2},
}


def keys(section: type[Section]) -> set[str]:
    names = set(section.model_fields)
    return names.union(*(keys(held) for field in section.model_fields.values() for held in choices(field.annotation)))


def kinds(section: type[Section]) -> set[str]:
    held = [each for field in section.model_fields.values() for each in choices(field.annotation)]
    own = {kind_of(each) for each in held if "kind" in each.model_fields}
    return own.union(*(kinds(each) for each in held))


NAMES = st.sampled_from(sorted(keys(Job))) | st.text(max_size=5)
WORDS = sorted(kinds(Job) | {"digits", "csv", "text", "full", "by_feature", "weighted", "importance", "a.py:b", "bce"})
SCALARS = (
    st.booleans()
    | st.integers()
    | st.integers(-2, 5)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=10)
    | st.dates()
    | st.times()
    | st.datetimes()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6),
    max_leaves=25,
)
PATHS = st.lists(NAMES.filter(lambda name: "." not in name and "=" not in name), min_size=1, max_size=3)


def attempt(make: Callable[[], Job]) -> Job | str:
    try:
        return make()
    except JobError as error:
        return str(error)


def gives_a_job_or_a_job_error(make: Callable[[], Job]) -> None:
    found = attempt(make)
    if isinstance(found, Job):
        assert Job.from_toml(found.to_toml(), "/elsewhere/other.toml") == found
    else:
        assert found
        assert "pydantic" not in found
        assert "cannot be used" not in found  # what is said of an error that has no words of its own


@given(st.dictionaries(NAMES, VALUES, max_size=8))
def test_any_tables_give_a_job_or_a_job_error(tables: dict[str, Any]):
    gives_a_job_or_a_job_error(lambda: Job.from_dict(tables))


def put(tables: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    inner = tables.get(name)
    return {**tables, name: put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


@settings(max_examples=300)
@given(
    st.sampled_from(["", "data", "model", "optimizer", "method", "train", "data.options", "train.stop"]), NAMES, VALUES
)
def test_a_valid_job_with_one_key_changed(section: str, name: str, value: Any):
    path = [*filter(None, section.split(".")), name]
    gives_a_job_or_a_job_error(lambda: Job.from_dict(put(VALID, path, value)))


@given(st.binary(max_size=200) | st.text(string.printable, max_size=200).map(str.encode))
def test_any_bytes_give_a_job_or_a_job_error(tmp_path_factory: Any, content: bytes):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    gives_a_job_or_a_job_error(lambda: Job.load(path))


@given(st.lists(st.text(max_size=20) | st.tuples(PATHS.map(".".join), st.text(max_size=10)).map("=".join), max_size=3))
def test_any_settings_give_a_job_or_a_job_error(overrides: list[str]):
    text = Job.from_dict(VALID).to_toml()
    gives_a_job_or_a_job_error(lambda: Job.from_toml(text, "a.toml", overrides))
