"""The conformance suite on threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conformance import CHECKS, REFUSED, refuses

from mpitrain.comm import Communicator, LocalWorld

pytestmark = pytest.mark.filterwarnings("ignore:.* was dropped without wait:ResourceWarning")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms(check: Callable[[Communicator], None], size: int) -> None:
    LocalWorld(size, timeout_s=20).run(check)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conforms_on_two_nodes_with_rendezvous(check: Callable[[Communicator], None]) -> None:
    LocalWorld(3, ranks_per_node=2, rendezvous=True, timeout_s=20).run(check)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("call", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refuses(call: Callable[[Communicator], Any], words: list[str], size: int) -> None:
    LocalWorld(size, timeout_s=20).run(refuses, call, words)
