"""Who may enter an engine now: at most so many requests and tokens inside, nobody while it stands still.

Kept outside the engine, the queue of waiting requests is known: whatever is inside is running, none of it waits for an
update without a first token, and none is ever preempted for want of cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from trueup.errors import EngineError


class Aborted(Exception):
    """The request was waiting outside when everything was aborted."""


class Admission:
    """First come, first served; may be used from many threads."""

    def __init__(self, *, slots: int, capacity_tokens: int) -> None:
        self.slots, self.capacity_tokens = slots, capacity_tokens
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._open, self._dead = True, ""
        self._inside, self._tokens = 0, 0
        self.aborts = 0
        """How often everything was aborted; a request from before the last time does not enter."""

    @property
    def inside(self) -> int:
        """Requests in the engine."""
        return self._inside

    @property
    def waiting(self) -> int:
        """Requests that wait outside."""
        return len(self._queue)

    @contextmanager
    def enter(self, tokens: int, *, aborts: int, deadline: float) -> Iterator[None]:
        """Be inside, once there is room for `tokens`. `aborts`: what the count was when the caller began.

        Raises Aborted, and EngineError when the time is over or the engine is dead.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                may = self._changed.wait_for(
                    lambda: self._dead or self.aborts != aborts or self._fits(ticket, tokens),
                    max(0.0, deadline - monotonic()),
                )
                if self._dead:
                    raise EngineError(self._dead)
                if self.aborts != aborts:
                    raise Aborted
                if not may:
                    raise EngineError("waiting for a place in the engine took longer than allowed")
                self._inside += 1
                self._tokens += tokens
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._tokens -= tokens
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in until `open`."""
        with self._changed:
            self._open = False

    def open(self) -> None:
        """Let requests in again, also after `kill`."""
        with self._changed:
            self._open, self._dead = True, ""
            self._changed.notify_all()

    def abort(self) -> None:
        """Send everybody away who waits outside."""
        with self._changed:
            self.aborts += 1
            self._changed.notify_all()

    def kill(self, reason: str) -> None:
        """Send everybody away, now and later, with this reason."""
        with self._changed:
            self._dead = reason
            self._changed.notify_all()

    def wait_empty(self, deadline: float) -> bool:
        """Wait until nobody is inside; False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, max(0.0, deadline - monotonic()))

    def _fits(self, ticket: object, tokens: int) -> bool:
        room = self._inside == 0 or self._tokens + tokens <= self.capacity_tokens
        return self._open and self._queue[0] is ticket and self._inside < self.slots and room
