"""What a search for causes compares: engine models, each with the causes that lead to it."""

from __future__ import annotations

from dataclasses import dataclass

from trueup.parity.evidence import EngineModel
from trueup.parity.hypotheses import Hypothesis


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One cause on the way to a candidate, and the engine model after it."""

    hypothesis: Hypothesis
    detail: str
    after: EngineModel
    title: str = ""
    fix: str = ""
    side: str = ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine model, the causes that lead to it, and its loss on the fitting half."""

    model: EngineModel
    path: tuple[Edit, ...]
    fit_loss: float
