"""A collective or message under way; it keeps the buffers alive until they are no longer in use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mpitrain.comm.calls import Handle
from mpitrain.comm.watchdog import Watch

if TYPE_CHECKING:
    from mpitrain.comm.debug import Meeting


class Request:
    """What a nonblocking method returns.

    The arrays handed to that method must not be changed, and ``out`` not be read, before `wait` has returned.  One that
    is dropped before it was waited for warns (`ResourceWarning`): its result and its errors are lost.

    Parameters
    ----------
    handles : list of Handle
        What the backend has begun.
    finish : callable
        Makes the result once they are complete.
    what : object
        What was begun; its ``str`` is shown.
    watch : Watch, optional
        Where the watchdog sees that a rank waits for this.
    meetings : sequence of Meeting
        In debug mode: where the ranks find out whether they began the same.
    """

    def __init__(
        self,
        handles: list[Handle],
        finish: Callable[[], Any],
        what: object = "request",
        watch: Watch | None = None,
        meetings: Sequence[Meeting] = (),
    ) -> None:
        self._handles = handles
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None
        self._what = what
        self._watch = watch or Watch("request")
        self._meetings = meetings
        self._seen_through = False

    def wait(self) -> Any:
        """Block until complete and return what the blocking method would have; again the same when called again."""
        self._seen_through = True
        if self._finish is not None:
            watch = self._watch
            outer, watch.current = watch.current, self._what
            try:
                for meeting in self._meetings:
                    meeting.wait()
                for handle in self._handles:
                    handle.wait()
            finally:
                watch.current = outer
                watch.count += 1
            self._result, self._finish = self._finish(), None
        return self._result

    def test(self) -> bool:
        """Tell, without blocking, whether `wait` would return at once; moves the operation on."""
        done = self._finish is None or (
            all(meeting.test() for meeting in self._meetings) and all(handle.test() for handle in self._handles)
        )
        self._seen_through |= done
        return done

    def __del__(self) -> None:
        if not getattr(self, "_seen_through", True):
            site = f", begun at {self._meetings[0].site}" if self._meetings else ""
            warnings.warn(
                f"{self._what} was dropped without wait(){site}: its result and its errors are lost",
                ResourceWarning, stacklevel=2, source=self,
            )  # fmt: skip
