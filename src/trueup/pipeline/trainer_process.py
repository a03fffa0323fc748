"""The trainer in a process of its own: it reads batches from the rollout log by number and publishes weights.

Two teams of threads in one process halve each other, and a trainer that dies must not take the run with it. A trainer
is a function of the log and of the batches taken so far, so a new process that is given the same batches from its last
checkpoint on has the same weights to the last bit.

    parent                                trainer
    (start)                     ->        {"ready": true, "batches": 10, "version": 10, "arithmetic": null}
    {"groups": [41, 38]}        ->        {"batches": 11, "version": 11, "metrics": {...}, "weights": PATH, ...}
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueup.errors import NothingToLearn
from trueup.monitor.metric_log import append_line, read_lines
from trueup.monitor.rundir import config_of
from trueup.pipeline.child import ChildProcess, serve_parent

ANSWERS = "trainer.jsonl"
"""Every answer is written down before the checkpoint that makes it one of the past."""


class TrainerProcess(ChildProcess):
    """The parent's side. `batches` and `version` are where the trainer stands; `arithmetic` is its, in bitwise mode."""

    arithmetic: dict[str, object] | None = None

    def __init__(self, run: Path) -> None:
        """Start it on a run folder."""
        self.batches = self.version = 0
        super().__init__("trueup.pipeline.trainer_process", run, name="trainer")

    def wait_until_ready(self) -> dict[str, Any]:
        """See ChildProcess.wait_until_ready."""
        ready = super().wait_until_ready()
        self.arithmetic = ready["arithmetic"]
        return ready

    def train(self, groups: Sequence[int]) -> None:
        """Ask for a batch. Raises ChildGone."""
        self.send({"groups": list(groups)})

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """What it did, or None if it is not done yet. Raises TrainingError for a refused step, ChildGone."""
        content = super().answer(timeout_s)
        if content is not None:
            self.batches, self.version = content["batches"], content["version"]
        return content


class _Child:
    """The trainer's side."""

    def __init__(self, run: Path) -> None:
        import torch

        from trueup.model.load import checkpoint_digest
        from trueup.pipeline.checkpoint import Checkpoints
        from trueup.pipeline.rollout_log import reader_of
        from trueup.pipeline.trainer import Trainer
        from trueup.weights.store import WeightStore

        config = config_of(run)
        train = config.train
        assert train.model is not None
        if train.threads is not None:
            torch.set_num_threads(train.threads)
        self.run, self.train = run, train
        read_lines(run / ANSWERS)  # for its side effect: a line that was cut off is removed
        self.trainer = Trainer(config)
        self.checkpoints = Checkpoints(run / "checkpoints", keep=train.keep_checkpoints)
        self.store = WeightStore(run / "weights")
        self.log = reader_of(run)
        digest = checkpoint_digest(train.model)
        self.state = self.checkpoints.load(self.trainer, model_digest=digest)

    def arithmetic(self) -> dict[str, object] | None:
        """In bitwise mode, what an engine must share with this process for their bits to be equal."""
        from trueup.model.bitwise import arithmetic

        return arithmetic() if self.train.bitwise else None

    def where(self) -> dict[str, Any]:
        """How far it is."""
        return {"batches": self.state.batches, "version": self.state.version}

    def batch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train on groups of the log and publish; a batch without a gradient leaves version and weights as they are."""
        from trueup.pipeline.checkpoint import publish

        groups = self.log.read(request["groups"])
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

    def finish(self) -> None:
        """Leave a checkpoint of where the run ended."""
        if self.state.version > 0:
            self.checkpoints.save(self.trainer, self.state)


def main() -> None:
    """Answer the parent until it closes the pipe."""
    run, held = Path(sys.argv[1]), []

    def start() -> tuple[dict[str, Any], Any]:
        child = _Child(run)
        held.append(child)
        return child.where() | {"arithmetic": child.arithmetic()}, child.batch

    serve_parent(run, start, lambda: held[0].finish())


if __name__ == "__main__":
    main()
