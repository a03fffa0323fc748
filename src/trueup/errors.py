"""Errors a person can act on. Broken invariants are `assert`s, never these."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrueupError(ValueError):
    """Base of every error caused by input or surroundings; its text says what to do."""


class ConfigError(TrueupError):
    """A configuration file, a `--set` or a command-line value is wrong."""


class RecordError(TrueupError):
    """A record (rollout, sampling parameters, ...) was refused when it was created."""


class TraceError(TrueupError):
    """A trace file cannot be read at all; single bad rows are reported, not raised."""


class ModelError(TrueupError):
    """A checkpoint is missing, damaged, of another kind, or does not fit the tokens given."""


class NumericsError(TrueupError):
    """Non-finite or empty input where a number was asked for."""


class WeightError(TrueupError):
    """A weight snapshot is incomplete, damaged, of another model, or outside the allowed folder."""


class TrainingError(TrueupError):
    """An optimiser step was refused or could not be kept; weights and optimiser are as they were before it."""


class NothingToLearn(TrainingError):
    """A batch without a gradient: every advantage is zero, or a filter left no sequence."""


class EngineError(TrueupError):
    """A rollout engine refused a request, is not reachable, or cannot be set up."""


class EngineBusy(EngineError):
    """The server has too much to do (429, or 503 with Retry-After); `retry_after_s` is what it asks for, or None."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnsupportedByEngine(EngineError):
    """The engine does not declare the capability that was asked for."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class MismatchError(TrueupError):
    """The engine does not agree with the trainer; a report, or a line of alarms.jsonl, says why."""
