"""How many requests are sent at once: as many as allowed, and fewer once the server says that it is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from trueup.errors import EngineBusy

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
Answer = TypeVar("Answer")


class Pace:
    """A limit on requests under way to one server. After a "busy" the limit is halved and the request sent again.

    Example: `Pace(64).run(lambda: http.post(path, body, timeout_s=60), timeout_s=60)`.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._running = limit, 0
        self._free = threading.Condition()

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return self._limit

    def run(self, request: Callable[[], Answer], *, timeout_s: float) -> Answer:
        """Send a request when there is room, and again while the server is busy.

        Raises EngineBusy when no answer came within `timeout_s`, and whatever the request raises.
        """
        deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
        while True:
            self._enter(deadline)
            try:
                return request()
            except EngineBusy as busy:
                pause_s = min(LONGEST_PAUSE_S, busy.retry_after_s or pause_s)
                if time.monotonic() + pause_s > deadline:
                    raise
                self._slow_down()
            finally:
                self._leave()
            time.sleep(pause_s)
            pause_s *= 2

    def _enter(self, deadline: float) -> None:
        with self._free:
            if not self._free.wait_for(lambda: self._running < self._limit, timeout=deadline - time.monotonic()):
                raise EngineBusy(f"the server is busy: no request could be sent, {self._limit} at once")
            self._running += 1

    def _leave(self) -> None:
        with self._free:
            self._running -= 1
            self._free.notify_all()

    def _slow_down(self) -> None:
        with self._free:
            self._limit = max(1, min(self._limit, self._running) // 2)
