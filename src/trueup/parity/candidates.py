"""What a search for causes compares: engine models, each with the causes that lead to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trueup.parity.evidence import EngineModel, Evidence
from trueup.parity.findings import Finding
from trueup.parity.hypotheses import Hypothesis, Variant


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One cause on the way to a candidate, and the engine model after it."""

    hypothesis: Hypothesis
    detail: str
    after: EngineModel
    title: str = ""
    fix: str = ""
    side: str = ""
    only_reported: bool = False

    @classmethod
    def of(cls, hypothesis: Hypothesis, variant: Variant) -> Edit:
        """The edit that a variant of a hypothesis makes."""
        return cls(
            hypothesis=hypothesis, detail=variant.detail, after=variant.model, title=variant.title, fix=variant.fix,
            side=variant.side, only_reported=variant.only_reported,
        )  # fmt: skip

    @classmethod
    def again(cls, found: Finding, after: EngineModel) -> Edit:
        """What another setting has found, in this one."""
        return cls(
            hypothesis=found.hypothesis, detail=found.detail, after=after, title=found.title, fix=found.fix,
            side=found.side, only_reported=found.hypothesis.redraws and not found.redraws,
        )  # fmt: skip

    def finding(self, *, explained: float, confidence: str) -> Finding:
        """This edit as something found."""
        return Finding(
            hypothesis=self.hypothesis, detail=self.detail, explained=explained, confidence=confidence,
            title=self.title or self.hypothesis.title, fix=self.fix or self.hypothesis.fix,
            side=self.side or self.hypothesis.side, redraws=self.redraws,
        )  # fmt: skip

    def neighbours(self, evidence: Evidence, step: float) -> Sequence[Variant]:
        """Return variants with another number, closer to it for a smaller step; none if the cause has no number."""
        refine = self.hypothesis.refine
        return () if refine is None else refine(evidence, Variant(model=self.after, detail=self.detail), step)

    @property
    def redraws(self) -> bool:
        """Whether the tokens, too, are drawn from what is reported."""
        return self.hypothesis.redraws and not self.only_reported


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An engine model, the causes that lead to it, and its loss on the fitting half."""

    model: EngineModel
    path: tuple[Edit, ...]
    fit_loss: float

    @property
    def redraws(self) -> bool:
        """Whether tokens are drawn as this says, too."""
        return any(edit.redraws for edit in self.path)

    @property
    def grows(self) -> bool:
        """Whether this is an error of the model without a fitted number: it may grow along the completion."""
        return all(edit.hypothesis.simulates and not edit.hypothesis.refine for edit in self.path)
