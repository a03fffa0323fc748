"""Training on a rollout log alone: no engine, no clock, no random number.

The same log, model and configuration give the same weights, however often the run was killed on the way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from trueup.errors import ConfigError, NothingToLearn, TrainingError, TrueupError
from trueup.knobs import Config
from trueup.model.load import checkpoint_digest
from trueup.monitor.metric_log import MetricLog
from trueup.monitor.progress import TrainProgress
from trueup.monitor.rundir import RunFolder
from trueup.pipeline.checkpoint import Checkpoints, publish
from trueup.pipeline.recipe import recipe_of
from trueup.pipeline.rollout_log import read_groups
from trueup.pipeline.trainer import Trainer
from trueup.types import RolloutGroup
from trueup.weights.store import WeightStore


def train_from_log(config: Config, *, resume: bool, console: Console) -> dict[str, Any]:
    """Train on the groups of `train.from_log` in their order, `train.groups` a batch; returns the summary.

    A last batch that is not full is not trained on. A batch without a gradient is counted and skipped. Ends with a
    checkpoint, and with the weights published as a loadable checkpoint. Raises TrueupError; the run can then be resumed
    from its last checkpoint.
    """
    train = config.train
    if train.from_log is None or train.model is None or train.run is None:
        missing = [n for n in ("from_log", "model", "run") if getattr(train, n) is None]
        raise ConfigError(f"train.{missing[0]} is missing")
    recipe = recipe_of(config)
    if next(_batches(train.from_log, size=train.groups, skip=0), None) is None:
        raise TrainingError(f"{train.from_log} holds fewer than {train.groups} groups, one batch (train.groups)")
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    digest = checkpoint_digest(train.model)
    trainer = Trainer(config)  # before a run folder is made, so that a model that cannot be used leaves none behind
    run = RunFolder.resume(train.run, config) if resume else RunFolder.create(train.run, config, recipe.as_dict())
    try:
        return _Run(trainer, run, digest).go(console)
    finally:
        run.close()


def _batches(log: Path, *, size: int, skip: int) -> Iterator[list[RolloutGroup]]:
    """Full batches, after the first `skip` of them."""
    groups = (group for _, group in read_groups(log, start=skip * size))
    while len(batch := list(islice(groups, size))) == size:
        yield batch


class _Run:
    def __init__(self, trainer: Trainer, run: RunFolder, digest: str) -> None:
        train = trainer.config.train
        assert train.from_log is not None
        self.train, self.run, self.log = train, run, train.from_log
        self.trainer = trainer
        self.checkpoints = Checkpoints(run.path / "checkpoints", keep=train.keep_checkpoints)
        self.state = self.checkpoints.load(self.trainer, model_digest=digest)
        self.metrics = MetricLog(run.path / "metrics.jsonl", batches=self.state.batches)
        self.tokens = 0

    def go(self, console: Console) -> dict[str, Any]:
        start, resumed_after = time.perf_counter(), self.state.batches
        batches = _batches(self.log, size=self.train.groups, skip=self.state.batches)
        left = None if self.train.steps is None else max(0, self.train.steps - self.state.batches)
        with TrainProgress(console, total=self.train.steps, done=self.state.batches) as progress:
            for batch in islice(batches, left):
                progress.batch(self._batch(batch))
                if self.state.batches % self.train.checkpoint_every == 0:
                    self.checkpoints.save(self.trainer, self.state)
        if self.state.version == 0:
            raise NothingToLearn(f"none of {self.state.batches} batches had a gradient; the weights are the model's")
        self.checkpoints.save(self.trainer, self.state)
        published = publish(self.trainer, WeightStore(self.run.path / "weights"))
        summary = {
            "batches": self.state.batches,
            "skipped_batches": self.state.skipped,
            "resumed_after_batch": resumed_after,
            "version": self.state.version,
            "optimizer_steps": self.state.optimizer_steps,
            "tokens": self.tokens,
            "seconds": time.perf_counter() - start,
            "weights": str(published.path.relative_to(self.run.path.resolve())),
        }
        self.run.write("summary.json", summary)
        return summary

    def _batch(self, groups: list[RolloutGroup]) -> dict[str, float]:
        number, skipped = self.state.batches + 1, False
        try:
            report = self.trainer.step(groups)
        except NothingToLearn as error:
            skipped = True
            record: dict[str, Any] = {"version": self.trainer.version, "skipped": str(error)}
            metrics: dict[str, float] = {}
        except TrueupError as error:
            raise TrainingError(f"batch {number}: {error}") from None
        else:
            metrics = report.metrics
            self.tokens += int(metrics["tokens/trained/count"])
            record = {"version": report.version} | metrics
            record |= {f"time/{phase}_s": seconds for phase, seconds in report.phase_s.items()}
        self.state = self.state.after(self.trainer, skipped=skipped)
        self.metrics.append(number, record)
        return metrics
