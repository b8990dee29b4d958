"""Taking nested arrays apart and putting them together."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from mpitrain._errors import InputError
from mpitrain.comm import trees


class Pair(NamedTuple):
    left: object
    right: object


def test_leaves_come_in_the_order_of_sorted_keys() -> None:
    assert list(trees.leaves({"b": 1, "a": [2, (3,)], "c": {}})) == [2, 3, 1]
    assert list(trees.leaves({10: "x", 9: "y", "9": "z"})) == ["y", "x", "z"]


def test_rebuild_keeps_types_and_order() -> None:
    tree = {"b": 1, "a": Pair([2], (3, {}))}
    built = trees.rebuild(tree, iter("xyz"))
    assert built == {"b": "z", "a": Pair(["x"], ("y", {}))}
    assert list(built) == ["b", "a"]
    assert isinstance(built["a"], Pair)


def test_another_structure_is_refused() -> None:
    assert trees.leaves_like("op", [1, 2], None) == [None, None]
    with pytest.raises(InputError, match=r"op: out has another structure.*'b'.*'a'"):
        trees.leaves_like("op", {"a": 1}, {"b": 1})
