"""Checkpoints: masters, moments and where the run was, complete or absent; a resumed run goes on bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trueup.errors import TrainingError
from trueup.model.load import companion_files
from trueup.pipeline.trainer import Trainer
from trueup.weights.snapshot import WeightSnapshot, manifest_of
from trueup.weights.store import WeightStore, load_tensors

SCHEMA = "trueup.checkpoint/1"
STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """How far a run is: batches taken from the log (skipped ones too), steps of the optimiser, weight version, and the
    digest of the checkpoint it started from."""

    batches: int
    skipped: int
    version: int
    optimizer_steps: int
    model_digest: str

    def after(self, trainer: Trainer, *, skipped: bool) -> RunState:
        """The state once the trainer has taken another batch, or skipped it."""
        return RunState(
            batches=self.batches + 1,
            skipped=self.skipped + skipped,
            version=trainer.version,
            optimizer_steps=trainer.weights.steps,
            model_digest=self.model_digest,
        )


class Checkpoints:
    """The checkpoints of one run, numbered by batches taken; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._store, self._keep = WeightStore(folder), keep

    def newest(self) -> int | None:
        """Number of the last complete checkpoint."""
        return max(self._store.versions(), default=None)

    def save(self, trainer: Trainer, state: RunState) -> None:
        """Write a checkpoint, then delete those that are too old.

        Raises TrainingError when it cannot be written (disk full): the older ones are untouched.
        """
        content = json.dumps({"schema": SCHEMA} | asdict(state))
        try:
            if state.batches not in self._store.versions():
                self._store.publish(state.batches, trainer.weights.state(), files={STATE_FILE: content.encode()})
        except OSError as error:
            raise TrainingError(
                f"the checkpoint after batch {state.batches} cannot be written ({error}); the last complete one is "
                f"that after batch {self.newest() or 0}: make room and resume"
            ) from None
        self._store.keep_newest(self._keep, "run")

    def load(self, trainer: Trainer, *, model_digest: str) -> RunState:
        """Give the trainer the newest checkpoint; without one the run is at its beginning.

        Raises TrainingError for one of another model, WeightError for a damaged one; the trainer is unchanged then.
        """
        number = self.newest()
        if number is None:
            return RunState(batches=0, skipped=0, version=0, optimizer_steps=0, model_digest=model_digest)
        snapshot = self._store.open(number)
        try:
            content = json.loads((snapshot.path / STATE_FILE).read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            state = RunState(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"{snapshot.path / STATE_FILE} is damaged: {error}") from None
        if state.model_digest != model_digest:
            raise TrainingError(
                f"{snapshot.path} continues a run from another model: its digest is {state.model_digest[:12]}, that of "
                f"the model given {model_digest[:12]}; name the one the run began with"
            )
        trainer.weights.restore(load_tensors(snapshot), steps=state.optimizer_steps)
        trainer.version = state.version
        return state


def publish(trainer: Trainer, store: WeightStore) -> WeightSnapshot:
    """Publish the trainer's weights as a checkpoint of its own, unless a run that was killed right after did.

    Raises TrainingError when they cannot be written (disk full), or the version is there with other weights.
    """
    tensors, version = trainer.weights.published(), trainer.version
    if version in store.versions():
        snapshot = store.open(version)
        if snapshot.manifest.digest != manifest_of(version, tensors).digest:
            raise TrainingError(f"{snapshot.path} holds other weights than this run has at version {version}")
        return snapshot
    try:
        return store.publish(version, tensors, files=companion_files(trainer.model.path, trainer.model.dtype))
    except OSError as error:
        raise TrainingError(
            f"version {version} cannot be published ({error}); the last checkpoint is complete: make room and resume"
        ) from None
