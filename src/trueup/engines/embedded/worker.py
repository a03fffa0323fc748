"""A thread that owns a state: it takes steps, and between two of them what other threads hand in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, Protocol, TypeVar

from trueup.errors import EngineError

IDLE_POLL_S = 0.5
CLOSE_TIMEOUT_S = 30.0
BETWEEN_STEPS_S = 60.0
"""What a call that has begun may take: it stands between two steps."""
CLOSED = "the engine is closed"
T = TypeVar("T")


class Owned(Protocol):
    """What the thread works on."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def step(self) -> None:
        """Take one step."""
        ...

    def stop(self, reason: str, *, failed: bool) -> None:
        """Nobody may wait for anything any longer."""
        ...


def promise() -> Future[Any]:
    """A future that nobody can cancel: the thread will keep it, whoever has stopped waiting."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def wait(future: Future[T], timeout_s: float, what: str) -> T:
    """Return a future's result. Raises EngineError when the time is over, and whatever the future holds."""
    try:
        return future.result(timeout=max(timeout_s, 0.0))
    except FutureTimeout:
        raise EngineError(f"{what} took longer than allowed") from None


class Worker:
    """Runs `make()` in a thread of its own, then its steps, until it is closed or a step fails."""

    def __init__(self, make: Callable[[], Owned], *, name: str) -> None:
        """Returns once `make` has; raises what it raises."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._accepting = True
        self._closing = False
        self.failure: str | None = None
        made = promise()
        self._thread = threading.Thread(target=self._run, args=(make, made), name=name, daemon=True)
        self._thread.start()
        made.result()

    def check_open(self) -> None:
        """Raise EngineError when the thread takes no more calls."""
        if not self._accepting or self._closing:
            raise EngineError(self.failure or CLOSED)

    def post(self, function: Callable[[], None]) -> None:
        """Hand in a function that cannot fail. Raises EngineError when the thread takes no more calls."""
        with self._gate:
            self.check_open()
            self._inbox.put(function)

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Run a function between two steps and return its result.

        Raises what it raises, and EngineError when it has not begun in time: it will not run any more then.
        """
        future: Future[T] = promise()
        claim = threading.Lock()

        def run() -> None:
            if not claim.acquire(blocking=False):
                return
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001  (handed to the thread that waits for it)
                future.set_exception(error)

        self.post(run)
        try:
            return future.result(timeout=max(timeout_s, 0.0))
        except FutureTimeout:
            if claim.acquire(blocking=False):
                raise EngineError("the engine's answer took longer than allowed") from None
            return wait(future, BETWEEN_STEPS_S, "the engine's answer")

    def close(self) -> None:
        """End the thread; what is under way ends as the owned state's `stop` says."""
        self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self, make: Callable[[], Owned], made: Future[None]) -> None:
        try:
            owned = make()
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits for it)
            made.set_exception(error)
            return
        made.set_result(None)
        try:
            while not self._closing:
                self._take_calls(wait=not owned.has_work)
                if owned.has_work and not self._closing:
                    owned.step()
        except Exception as error:  # noqa: BLE001  (whatever broke, nobody may wait for this thread any longer)
            self.failure = f"the engine stopped: {type(error).__name__}: {error}"
        finally:
            with self._gate:
                self._accepting = False
            self._take_calls(wait=False)
            owned.stop(self.failure or CLOSED, failed=self.failure is not None)

    def _take_calls(self, *, wait: bool) -> None:
        while True:
            try:
                function = self._inbox.get(timeout=IDLE_POLL_S) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            function()
            wait = False
