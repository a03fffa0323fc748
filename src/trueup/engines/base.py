"""What every rollout engine offers, and how each one says what it cannot do.

An engine's methods block and may be called from several threads: a generation runs in one while another pauses,
updates and resumes. What an engine does not declare in its `EngineCapabilities` it refuses with UnsupportedByEngine;
tests/contract tries each declared capability on each engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from trueup.errors import EngineError, UnsupportedByEngine
from trueup.model.scoring import ScoredRow
from trueup.types import SAMPLING_FIELDS, LogprobKind, Prompt, Rollout, SamplingParams

DEFAULT_TIMEOUT_S = 600.0


class PauseMode(StrEnum):
    """What a pause does with the requests that are running."""

    KEEP = "keep"
    """Frozen where they are; they go on after resume, under the new weights if there was an update."""
    WAIT = "wait"
    """Run to their end first; requests that are still queued wait for resume."""
    ABORT = "abort"
    """End at once with finish_reason "abort" and the tokens they have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCapabilities:
    """What an engine can do. A field at its default is something it cannot do, or does not tell."""

    logprob_kinds: frozenset[LogprobKind]
    """Which distribution its behaviour logprobs may be of."""
    sampling_fields: frozenset[str] = frozenset(SAMPLING_FIELDS)
    """Fields of SamplingParams that it honours."""
    raw_logprobs: bool = False
    """Reports the raw logprob beside the behaviour logprob."""
    kept_mass: bool = False
    """Reports the mass of the kept set."""
    seeds: bool = False
    """The same seed and weights give the same tokens."""
    scores: bool = False
    """Scores given tokens, raw at T=1."""
    pause_modes: frozenset[PauseMode] = frozenset()
    updates: bool = False
    """Takes new weights while it runs."""
    clears_cache: bool = False
    """An update can clear the cache: everything is computed again under the new weights."""
    keeps_cache: bool = False
    """An update can keep the cache."""
    weight_versions: bool = False
    """Stamps every token with the version that made it."""
    cache_lives: bool = False
    """Tells which version wrote each position of the cache."""
    bitwise: bool = False
    """Computes what the trainer computes, to the last bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """`n` completions of a prompt. Without `ignore_eos` an end token of the model ends a completion.

    Requests share cached prompts only with requests of the same `cache_salt`.
    """

    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    ignore_eos: bool = False
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise EngineError(f"n must be at least 1, not {self.n}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFailure:
    """A completion that came to nothing: data for the caller, not an exception."""

    prompt_id: str
    reason: str


Result = Rollout | RolloutFailure


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Raw logprobs [T] at T=1 of a row's completion tokens, all under one weight version (None: not told)."""

    logprobs: tuple[float, ...]
    version: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReceipt:
    """What an update did. `verified_by`: file_digest (what was read is what was published), shadow (loaded beside the
    serving weights and checked there), canary (scored afterwards). `kv` is "kept" or "cleared"."""

    engine: str
    version: int
    previous_version: int
    verified_by: tuple[str, ...]
    paused_s: float
    load_s: float
    in_flight: int
    kv: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """What an engine says of itself now. `precision` names body and head; `arithmetic` is set in bitwise mode only."""

    engine: str
    version: int | None
    model_digest: str | None
    precision: Mapping[str, str]
    paused: bool
    running: int
    waiting: int
    generated_tokens: int
    arithmetic: Mapping[str, object] | None = None
    details: Mapping[str, object] = field(default_factory=dict)


class Engine(Protocol):
    """A rollout engine; see the top of this file for threads and refusals."""

    name: str
    capabilities: EngineCapabilities

    def generate(
        self, requests: Sequence[GenerationRequest], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[list[Result]]:
        """Return the n completions of each request, in order.

        Raises EngineError for a request that can never run (too long, ids outside the vocabulary) before any is
        started, UnsupportedByEngine for a sampling field it does not honour, and EngineError when the time is over.
        """
        ...

    def score(self, rows: Sequence[ScoredRow], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Scores]:
        """Score given tokens in the engine's own arithmetic, raw at T=1. Raises like `generate`."""
        ...

    def pause(self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Stop taking steps; returns once the engine stands still. Raises EngineError when the time is over."""
        ...

    def resume(self) -> None:
        """Take steps again; harmless if it was not paused."""
        ...

    def update_weights(self, path: Path, *, clear_cache: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> UpdateReceipt:
        """Load and verify a published version (weights/store.py), then swap it in between two steps.

        A paused engine stays paused. Raises WeightError when the version is not complete, not this model's or not
        what its manifest says: the old version goes on serving.
        """
        ...

    def status(self) -> EngineStatus:
        """Return the engine's state. Raises EngineError when it cannot be reached."""
        ...

    def close(self) -> None:
        """Give up everything held; running requests end with finish_reason "abort"."""
        ...


def require(capabilities: EngineCapabilities, name: str, engine: str) -> None:
    """Raise UnsupportedByEngine unless the named capability is declared."""
    if not getattr(capabilities, name):
        raise UnsupportedByEngine(f"{engine} cannot do this: it does not declare {name}")


def require_sampling(capabilities: EngineCapabilities, sampling: SamplingParams, engine: str) -> None:
    """Raise UnsupportedByEngine for a sampling field that is set and that the engine does not honour."""
    defaults = SamplingParams()
    for name in SAMPLING_FIELDS:
        if getattr(sampling, name) != getattr(defaults, name) and name not in capabilities.sampling_fields:
            raise UnsupportedByEngine(f"{engine} does not honour {name}; leave it out or use another engine")
