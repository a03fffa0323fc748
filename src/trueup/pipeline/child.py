"""A process of the run's own, spoken to in JSON lines over its pipes; big things go through the run folder.

The child prints one `{"ready": true, ...}`, then one answer to each request, in order; `{"error": ...}` and it ends. It
ends by itself when its standard input is closed, so that it never outlives whoever started it.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trueup.errors import TrainingError, TrueupError

ANSWER = "TRUEUP "
"""Before each line of ours, whatever else a library prints there."""
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0


class ChildGone(TrainingError):
    """The process ended; whoever needs it starts another."""


class ChildProcess:
    """The parent's side of `python -m MODULE RUN`."""

    def __init__(self, module: str, run: Path, *, name: str) -> None:
        """Start it, and go on while it starts."""
        self.name = name
        self._log = (run / "logs" / f"{name}.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(run)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""
        self._ready: dict[str, Any] | None = None

    def wait_until_ready(self) -> dict[str, Any]:
        """What it said when it was ready. Raises TrainingError with its own words, ChildGone."""
        if self._ready is None:
            self._ready = self.answer(START_TIMEOUT_S)
        if self._ready is None:
            self.stop()
            raise TrainingError(f"the {self.name} was not ready within {START_TIMEOUT_S:.0f} s; see {self._log.name}")
        return self._ready

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask for something. Raises ChildGone when the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """The next answer, or None if there is none yet. Raises TrainingError for an error, ChildGone without it."""
        content = self._line(time.monotonic() + timeout_s)
        if content is not None and "error" in content:
            raise TrainingError(content["error"])
        return content

    def _line(self, deadline: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        while True:
            line, end, rest = self._buffer.partition(b"\n")
            if end:
                self._buffer = rest
                if line.startswith(ANSWER.encode()):
                    content: dict[str, Any] = json.loads(line.removeprefix(ANSWER.encode()))
                    return content
                continue
            wait = deadline - time.monotonic()
            if not select.select([self._process.stdout], [], [], max(0.0, wait))[0]:
                return None
            chunk = self._process.stdout.read1(2**16)  # type: ignore[attr-defined]
            if not chunk:
                raise self._gone()
            self._buffer += chunk

    def _gone(self) -> ChildGone:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        return ChildGone(f"the {self.name} process ended (exit code {self._process.poll()}); see {self._log.name}")

    def kill(self) -> None:
        """End the process at once; who asks it for an answer learns that it is gone."""
        self._process.kill()

    def stop(self) -> None:
        """End the process: it may finish what it is at, for a while."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was not sent to a process that is gone
                self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()


def serve_parent(
    run: Path, start: Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]],
    finish: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """The child's side: `start` returns what is said when ready, and the function that answers a request."""

    def say(content: dict[str, Any]) -> None:
        print(ANSWER + json.dumps(content), flush=True)

    try:
        ready, respond = start()
        say({"ready": True} | ready)
        for line in sys.stdin:
            say(respond(json.loads(line)))
        finish()
    except BrokenPipeError:  # the parent was killed while we worked: nobody is there to be told
        os._exit(1)
    except TrueupError as error:
        with suppress(BrokenPipeError):
            say({"error": str(error)})
        raise SystemExit(2) from None
