"""The canary of a run: after every update each engine scores the same few tokens, and they must follow the weights.

Shapes: T canary tokens, raw logprobs at T=1 in nats. A version scan over the versions so far tells at once which
weights an engine computes with; whether its numbers are right otherwise is the audit's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trueup.engines.canary import SMALLEST_TOLERANCE, START_LIMIT, TOLERANCE_FACTOR, canary_rows, rms
from trueup.model.packed import packed_hidden_states
from trueup.pipeline.components import Bench
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores

MOVED_SHARE = 0.5
"""Of the tokens that must move in the trainer before an engine in which none moves is called frozen."""
FITS_BETTER = 0.5
"""An older version fits an engine if its distance is this share of the served one's."""
HELD_VERSIONS = 512
OLDER_VERSIONS = 8
"""How many of the stored versions a first look compares with."""
REACHES = "check that the update reaches the model that generates, under the version it is labelled with"


@dataclass(frozen=True, kw_only=True)
class CanaryFinding:
    """What one engine's scores say after an update: W1 (it did not move), W2 (it fits an older version), or None: it
    fits nothing."""

    id: str | None
    title: str
    fix: str
    evidence: str
    fits: int
    """Version that the engine computes with."""


@dataclass
class _Engine:
    scores_T: Tensor
    tolerance: float


@dataclass
class Canary:
    """Expected scores of every version, and what each engine said last.

    `memory` is a file that keeps each engine's tolerance, so that an engine is measured once in the life of a run.
    `stored()` gives the versions whose weights are at hand.
    """

    bench: Bench
    memory: Path
    stored: Callable[[], Sequence[int]] = tuple
    _expected: dict[int, Tensor] = field(default_factory=dict)
    _engines: dict[int, _Engine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limit = self.bench.model.max_positions or 2**20
        self.rows = canary_rows(self.bench.model.vocab_size, limit)
        self._tolerances: dict[int, float] = {}
        if self.memory.is_file():
            content = json.loads(self.memory.read_text(encoding="utf-8"))
            self._tolerances = {int(engine): float(tolerance) for engine, tolerance in content.items()}

    @torch.no_grad()
    def expected(self, version: int) -> Tensor:
        """The trainer's scores [T] under a version."""
        if version not in self._expected:
            self.bench.put(version)
            hidden_TD = packed_hidden_states(self.bench.model, self.rows)
            head = Head.of(self.bench.model, self.bench.head_dtype)
            targets_T = torch.tensor([i for row in self.rows for i in row.completion_ids])
            self._expected[version] = token_scores(hidden_TD, head, targets_T).logprobs_T.double()
            while len(self._expected) > HELD_VERSIONS:
                del self._expected[next(iter(self._expected))]
        return self._expected[version]

    def judge(self, engine: int, version: int, scores_T: Tensor) -> CanaryFinding | None:
        """Judge an engine's scores under a version that it is said to serve.

        The first scores in the life of a run are the engine's measure, unless they are further off than any rounding,
        or fit an older version.
        """
        new_T = self.expected(version)
        distance = rms(scores_T - new_T)
        known = self._engines.get(engine)
        if known is None:
            return self._first_look(engine, version, scores_T, distance)
        before_T, known.scores_T = known.scores_T, scores_T
        others = {v: rms(scores_T - old_T) for v, old_T in self._expected.items() if v < version}
        fits = min(others, key=lambda v: (others[v], -v), default=version)
        unmoved = bool((scores_T == before_T).all()) and self._moved(version) >= MOVED_SHARE
        behind = distance > known.tolerance and others and others[fits] < FITS_BETTER * distance
        if not unmoved and not behind:
            return None
        frozen = unmoved or rms(scores_T - before_T) <= known.tolerance
        return CanaryFinding(
            id="W1" if frozen else "W2",
            title="the engine's weights do not move" if frozen else f"the engine is {version - fits} versions behind",
            fix=REACHES,
            evidence=f"after the update to version {version} its canary fits version {fits} ({others[fits]:.2g} nats "
            f"rms; {distance:.2g} from version {version})"
            + ("" if not frozen else ", and scores as before the update"),
            fits=fits,
        )  # fmt: skip

    def _first_look(self, engine: int, version: int, scores_T: Tensor, distance: float) -> CanaryFinding | None:
        """Measure an engine, or compare it with what was measured before a restart."""
        for older in sorted(v for v in self.stored() if v < version)[-OLDER_VERSIONS:]:
            self.expected(older)
        measured = self._tolerances.get(engine)
        limit = START_LIMIT[self.bench.model.dtype] if measured is None else measured
        others = {v: rms(scores_T - old_T) for v, old_T in self._expected.items() if v < version}
        fits = min(others, key=lambda v: (others[v], -v), default=version)
        behind = distance > SMALLEST_TOLERANCE and bool(others) and others[fits] < FITS_BETTER * distance
        tolerance = measured or max(SMALLEST_TOLERANCE, TOLERANCE_FACTOR * distance)
        if distance <= limit and not behind:
            self._tolerances[engine] = tolerance
            self.memory.parent.mkdir(exist_ok=True)
            self.memory.write_text(json.dumps(self._tolerances), encoding="utf-8")
        self._engines[engine] = _Engine(scores_T=scores_T, tolerance=min(tolerance, limit))
        if behind:
            return CanaryFinding(
                id="W2", title=f"the engine is {version - fits} versions behind", fix=REACHES,
                evidence=f"at the first look its canary fits version {fits} ({others[fits]:.2g} nats rms; "
                f"{distance:.2g} from version {version}, which it is said to serve)",
                fits=fits,
            )  # fmt: skip
        if distance <= limit:
            return None
        return CanaryFinding(
            id=None, title="the engine's scores are not those of the weights that it is said to serve", fix=REACHES,
            evidence=f"at the first look its canary is {distance:.2g} nats rms from version {version}, {limit:.2g} at "
            "most were expected, and no older version fits",
            fits=version,
        )  # fmt: skip

    def _moved(self, version: int) -> float:
        """Share of the canary's tokens that this version scores otherwise than the one before it."""
        before = max((v for v in self._expected if v < version), default=None)
        if before is None:
            return 0.0
        return float((self._expected[version] != self._expected[before]).double().mean())
