"""Rewards in processes of their own: a scorer that raises, hangs or dies costs its completion and nothing else."""

from __future__ import annotations

import math
import multiprocessing
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from trueup.errors import ConfigError
from trueup.tasks.base import Task

START_TIMEOUT_S = 120.0
MAX_REPORTED = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class NotScored:
    """Why a completion has no reward."""

    reason: str


def _work(pipe: Connection, task: Task) -> None:
    """Score what comes until the pipe is closed. Anything that a scorer raises is an answer."""
    pipe.send("ready")
    while True:
        try:
            answer, completion = pipe.recv()
        except EOFError:
            return
        try:
            reward = float(task.score(answer, completion))
            result: float | str = reward if math.isfinite(reward) else f"the reward is {reward}"
        except Exception as error:  # noqa: BLE001  (a scorer may raise anything; it is reported and counted)
            result = f"{type(error).__name__}: {error}"[:MAX_REPORTED]
        pipe.send(result)


class _Worker:
    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, task), daemon=True, name="scorer")
        self.process.start()
        theirs.close()
        if not self.pipe.poll(START_TIMEOUT_S) or self.pipe.recv() != "ready":
            self.stop()
            raise ConfigError(f"a process to score {task.name} did not start within {START_TIMEOUT_S:.0f} s")

    def stop(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


class ScoringPool:
    """Scores completions of one task, several at a time; may be called from several threads."""

    def __init__(self, task: Task, *, workers: int, timeout_s: float) -> None:
        """Start the processes. `task` is pickled to them. Raises ConfigError when they do not start."""
        self.task, self.timeout_s = task, timeout_s
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        for _ in range(workers):
            self._idle.put(self._start())

    def _start(self) -> _Worker:
        worker = _Worker(self.task)
        with self._lock:
            self._all.add(worker)
        return worker

    def score(self, pairs: Sequence[tuple[str | None, str]]) -> list[float | NotScored]:
        """The reward of each (answer, completion), or why it has none."""
        return [self._score_one(pair) for pair in pairs]

    def _score_one(self, pair: tuple[str | None, str]) -> float | NotScored:
        worker = self._idle.get()
        broken = False
        try:
            worker.pipe.send(pair)
            if not worker.pipe.poll(self.timeout_s):
                broken = True
                return NotScored(reason=f"{self.task.name} took longer than {self.timeout_s:g} s to score")
            result: Any = worker.pipe.recv()
        except (EOFError, OSError) as error:
            broken = True
            return NotScored(reason=f"the process scoring {self.task.name} ended: {type(error).__name__}")
        finally:
            self._idle.put(self._replace(worker) if broken and not self._closed else worker)
        return NotScored(reason=result) if isinstance(result, str) else result

    def _replace(self, worker: _Worker) -> _Worker:
        worker.stop()
        with self._lock:
            self._all.discard(worker)
        return self._start()

    def close(self) -> None:
        """End the processes."""
        self._closed = True
        with self._lock:
            workers, self._all = self._all, set()
        for worker in workers:
            worker.stop()
