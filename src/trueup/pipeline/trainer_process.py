"""The trainer in a process of its own: it reads batches from the rollout log by number and publishes weights.

Two teams of threads in one process halve each other, and a trainer that dies must not take the run with it. The parent
sends one JSON object a line and gets one back; big things go through the run folder. A trainer is a function of the
log and of the batches taken so far, so a new process that is given the same batches from its last checkpoint on has
the same weights to the last bit.

    parent                                trainer
    (start)                     ->        {"ready": true, "batches": 10, "version": 10}
    {"groups": [41, 38]}        ->        {"batches": 11, "version": 11, "metrics": {...}, "weights": PATH, ...}
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trueup.errors import NothingToLearn, TrainingError, TrueupError
from trueup.monitor.metric_log import append_line, read_lines

ANSWER = "TRUEUP "
ANSWERS = "trainer.jsonl"
"""Every answer is written down before the checkpoint that makes it one of the past."""
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0


class TrainerProcess:
    """The parent's side. `batches` and `version` are where the trainer stands."""

    def __init__(self, run: Path) -> None:
        """Start it on a run folder. Raises TrainingError with its own words when it does not become ready."""
        self.run, self.batches, self.version = run, 0, 0
        self._log = (run / "logs" / "trainer.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trueup.pipeline.trainer_process", str(run)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        self._buffer = b""
        self._take(self._read(START_TIMEOUT_S))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, groups: Sequence[int]) -> None:
        """Ask for a batch. Raises TrainingError when the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"groups": list(groups)}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """What it did, or None if it is not done yet. Raises TrainingError for a refused step or a dead process."""
        deadline = time.monotonic() + timeout_s
        content = self._line(deadline)
        return None if content is None else self._take(content)

    def _take(self, content: dict[str, Any]) -> dict[str, Any]:
        if "error" in content:
            raise TrainingError(content["error"])
        self.batches, self.version = content["batches"], content["version"]
        return content

    def _read(self, timeout_s: float) -> dict[str, Any]:
        content = self._line(time.monotonic() + timeout_s)
        if content is None:
            self.stop()
            raise TrainingError(f"the trainer was not ready within {timeout_s:.0f} s; see {self._log.name}")
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

    def _gone(self) -> TrainingError:
        code = self._process.wait(STOP_TIMEOUT_S)
        return TrainerGone(f"the trainer process ended (exit code {code}); see {self._log.name}")

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was not sent to a process that is gone
                self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._log.close()


class TrainerGone(TrainingError):
    """The trainer's process ended; a new one goes on from the last checkpoint."""


class _Child:
    """The trainer's side."""

    def __init__(self, run: Path) -> None:
        import torch

        from trueup.config import build_config, without_none
        from trueup.model.load import checkpoint_digest
        from trueup.pipeline.checkpoint import Checkpoints
        from trueup.pipeline.trainer import Trainer
        from trueup.weights.store import WeightStore

        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        content.pop("recipe")
        config = build_config(without_none(content), where=str(run / "config.json"))
        train = config.train
        assert train.model is not None
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        self.run, self.train = run, train
        read_lines(run / ANSWERS)  # for its side effect: a line that was cut off is removed
        self.trainer = Trainer(config)
        self.checkpoints = Checkpoints(run / "checkpoints", keep=train.keep_checkpoints)
        self.store = WeightStore(run / "weights")
        digest = checkpoint_digest(train.model)
        self.state = self.checkpoints.load(self.trainer, model_digest=digest)

    def where(self) -> dict[str, Any]:
        """How far it is."""
        return {"batches": self.state.batches, "version": self.state.version}

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Train on groups of the log and publish; a batch without a gradient leaves version and weights as they are."""
        from trueup.pipeline.checkpoint import publish
        from trueup.pipeline.rollout_log import read_some

        groups = read_some(self.run / "rollouts", numbers)
        found: dict[str, Any]
        try:
            report = self.trainer.step(groups)
        except NothingToLearn as error:
            found = {"skipped": str(error)}
        else:
            snapshot = publish(self.trainer, self.store)
            found = {"metrics": report.metrics, "phase_s": report.phase_s, "weights": str(snapshot.path)}
        self.state = self.state.after(self.trainer, skipped="skipped" in found)
        answer = found | self.where()
        append_line(self.run / ANSWERS, answer)
        if self.state.batches % self.train.checkpoint_every == 0:
            self.checkpoints.save(self.trainer, self.state)
        return answer


def main() -> None:
    """Answer the parent until it closes the pipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run

    def say(content: dict[str, Any]) -> None:
        print(ANSWER + json.dumps(content), flush=True)

    try:
        child = _Child(run)
        say({"ready": True} | child.where())
        for line in sys.stdin:
            say(child.batch(json.loads(line)["groups"]))
        if child.state.version > 0:
            child.checkpoints.save(child.trainer, child.state)
    except TrueupError as error:
        say({"error": str(error)})
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
