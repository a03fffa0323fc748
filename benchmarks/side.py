"""One side of a comparison: a process that stays up, is warmed, and is asked round by round. Standard library only."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from typing import Any

ANSWER = "ANSWER "
START_TIMEOUT_S = 900


def answer(content: Any) -> None:
    """Hand a result to the parent, past whatever the libraries print."""
    print(ANSWER + json.dumps(content), flush=True)


class Side:
    """A worker process."""

    def __init__(self, name: str, command: list[str], variables: dict[str, str]) -> None:
        """Start it and wait for its first answer, that it is ready."""
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            env=dict(os.environ) | variables,
        )  # fmt: skip
        self.read(START_TIMEOUT_S)

    def read(self, timeout_s: float) -> Any:
        """Return the next answer, past other output."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not select.select([self.process.stdout], [], [], 1.0)[0]:
                if self.process.poll() is not None:
                    break
                continue
            line = self.process.stdout.readline()
            if not line:
                break
            if ANSWER in line:
                return json.loads(line.split(ANSWER, 1)[1])
        raise SystemExit(f"{self.name}: no answer (exit {self.process.poll()})")

    def ask(self, question: Any, timeout_s: float) -> Any:
        """Send one line and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.read(timeout_s)

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=30)
