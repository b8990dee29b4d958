"""A collective or message under way; it keeps the buffers alive until they are no longer in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpitrain.comm.calls import Handle


class Request:
    """What a nonblocking method returns.

    The arrays handed to that method must not be changed, and ``out`` not be read, before `wait` has returned.
    """

    def __init__(self, handles: list[Handle], finish: Callable[[], Any]) -> None:
        self._handles = handles
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def wait(self) -> Any:
        """Block until complete and return what the blocking method would have; again the same when called again."""
        if self._finish is not None:
            for handle in self._handles:
                handle.wait()
            self._result, self._finish = self._finish(), None
        return self._result

    def test(self) -> bool:
        """Tell, without blocking, whether `wait` would return at once; moves the operation on."""
        return self._finish is None or all(handle.test() for handle in self._handles)
