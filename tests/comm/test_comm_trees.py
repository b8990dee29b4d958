"""Taking nested arrays apart and putting them together."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from types import MappingProxyType
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


def test_containers_keep_their_types_and_attributes() -> None:
    state = OrderedDict(b=1, a=2)
    state.version = 7  # type: ignore[attr-defined]  # as a state_dict of PyTorch's has
    built = trees.rebuild(
        {"state": state, "more": defaultdict(list, c=3), "frozen": MappingProxyType({"d": 4})}, "wxyz"
    )
    assert built["state"] == OrderedDict(b="z", a="y")
    assert type(built["state"]) is OrderedDict
    assert built["state"].version == 7
    assert built["more"] == {"c": "x"}
    assert built["more"]["new"] == []
    assert built["frozen"] == {"d": "w"}
    assert type(built["frozen"]) is MappingProxyType
    assert state == OrderedDict(b=1, a=2)


def test_none_in_a_container_is_no_leaf() -> None:
    tree = {"a": None, "b": [1, None, (None,)]}
    assert list(trees.leaves(tree)) == [1]
    assert trees.rebuild(tree, "x") == {"a": None, "b": ["x", None, (None,)]}
    assert list(trees.leaves(None)) == [None]
    with pytest.raises(InputError, match="another structure"):
        trees.leaves_like("op", [1, None], [1, 2])


def test_structures_are_alike_in_any_order_of_keys() -> None:
    assert trees.alike(OrderedDict(a=1, b=2), OrderedDict(b=3, a=4))
    assert trees.alike(OrderedDict(a=1), {"a": [1]}) is False
    assert not trees.alike([1, 2], (1, 2))
