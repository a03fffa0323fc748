"""From gap to cause: compute what each kind of broken engine would have reported, keep what the tokens support.

Candidates are fitted on one half of the sequences and judged on the other. The smallest set of edits (none, one, two)
that brings the held-back residual to the floor wins; what stays is printed, never spread over the causes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trueup.config import LimitsConfig
from trueup.errors import ModelError, NumericsError
from trueup.parity.compare import Residual, clearly_better, loss, residual, separation
from trueup.parity.evidence import TRAINER, EngineModel, Evidence
from trueup.parity.floor import Floor, Judgement, judge
from trueup.parity.hypotheses import Hypothesis

BEAM = 3
PARTIAL_SHARE = 0.5
"""A cause that leaves more than the floor is named only if it explains at least this share on held-back tokens."""
COMPLETE_SHARE = 0.25
"""A cause that brings the gap to the floor must still take away this share (a small bias hides in a wide floor)."""
TRACKING_CORRELATION = 0.95
"""Correlation of predicted and reported logprobs below which an incomplete explanation explains nothing."""
NUMERIC_FACTOR = 30.0
"""Beyond this many floors a gap is not rounding, and no arithmetic is simulated for it."""
EDGE_ALLOWANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A supported cause. `explained` is the share of mean |r| on held-back tokens that this edit takes away."""

    hypothesis: Hypothesis
    detail: str
    explained: float
    confidence: str


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The outcome for one setting.

    `model` is the fitted engine, `judgement` its held-back residual against `floor`. `ambiguous` lists groups of ids
    the tokens cannot separate; `ruled_out` ids that were tried and fit clearly worse; `unseeable` id to reason.
    """

    findings: tuple[Finding, ...]
    model: EngineModel
    floor: Floor
    judgement: Judgement
    ambiguous: tuple[tuple[str, ...], ...]
    ruled_out: tuple[str, ...]
    unseeable: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Edit:
    hypothesis: Hypothesis
    detail: str
    after: EngineModel


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    model: EngineModel
    path: tuple[_Edit, ...]
    fit_loss: float


class Attributor:
    """Searches engine models for one setting. `fit` and `held` are disjoint halves of its evidence.

    `floor_of(model)` predicts the floor under a model's distribution.
    """

    def __init__(
        self, *, fit: Evidence, held: Evidence, hypotheses: Sequence[Hypothesis],
        floor_of: Callable[[EngineModel], Floor], limits: LimitsConfig,
    ) -> None:  # fmt: skip
        self.fit, self.held, self.floor_of, self.limits = fit, held, floor_of, limits
        self.order = [h.id for h in hypotheses]
        self.unseeable = {h.id: why for h in hypotheses if (why := h.unseeable(fit))}
        seeable = [h for h in hypotheses if h.id not in self.unseeable]
        self.cheap = [h for h in seeable if not h.simulates]
        self.simulated = [h for h in seeable if h.simulates]
        self.base = EngineModel(dist=fit.case.trainer_distribution)
        self._held: dict[EngineModel, Residual] = {}

    def held_residual(self, model: EngineModel) -> Residual:
        """Residual of a model on the held-back half, computed once."""
        if model not in self._held:
            self._held[model] = residual(self.held, model)
        return self._held[model]

    def held_loss(self, model: EngineModel) -> float:
        """Mean |residual| on the held-back half."""
        return loss(self.held_residual(model), EDGE_ALLOWANCE)

    def held_judgement(self, model: EngineModel) -> Judgement:
        """Judge the held-back residual of a model; ruled-out tokens beyond the allowance are a reason of their own."""
        res = self.held_residual(model)
        limits = self.limits.model_copy(update={"min_tokens": max(1, self.limits.min_tokens // 4)})
        verdict = judge(
            res.residual_T.masked_fill(~res.usable_T, float("nan")), res.row_T, self.floor_of(model), limits
        )
        if res.edge_share > self.limits.edge_share:
            reason = f"{res.edge_share:.1%} of tokens lie outside the kept set this predicts"
            verdict = replace(verdict, reasons=(*verdict.reasons, reason))
        return verdict

    def _expand(self, start: _Candidate, hypotheses: Sequence[Hypothesis]) -> list[_Candidate]:
        """Best variant of each hypothesis on top of `start`, judged on the fitting half, best first."""
        used = {e.hypothesis.id for e in start.path}
        offers = {h: list(h.variants(self.fit, start.model)) for h in hypotheses if h.id not in used}
        for source in {v.model.source for vs in offers.values() for v in vs}:
            dists = [v.model.dist for vs in offers.values() for v in vs if v.model.source == source]
            try:
                self.fit.prefetch(source, dists)
            except (ModelError, NumericsError):  # a simulation this architecture does not allow is not tried
                if source == TRAINER:
                    raise
                offers = {h: [v for v in vs if v.model.source != source] for h, vs in offers.items()}
        seen = {start.model}
        found = []
        for hypothesis, variants in offers.items():
            ranked = []
            for variant in variants:
                if variant.model not in seen:
                    seen.add(variant.model)
                    value = loss(residual(self.fit, variant.model), EDGE_ALLOWANCE)
                    path = (*start.path, _Edit(hypothesis=hypothesis, detail=variant.detail, after=variant.model))
                    ranked.append(_Candidate(model=variant.model, path=path, fit_loss=value))
            if ranked:
                found.append(min(ranked, key=lambda c: c.fit_loss))
        return sorted(found, key=lambda c: c.fit_loss)

    def run(self, *, mismatch: bool) -> Attribution:
        """Search; with `mismatch` false only say what is ruled out."""
        self.start = _Candidate(model=self.base, path=(), fit_loss=loss(residual(self.fit, self.base), EDGE_ALLOWANCE))
        singles = self._expand(self.start, self.cheap)
        self.held.prefetch(TRAINER, [self.base.dist, *(c.model.dist for c in singles)])
        if not mismatch:
            return self._conclude(self.start, singles)
        improving = [c for c in singles if c.fit_loss < 0.95 * self.start.fit_loss][:BEAM]
        best = self._choose(improving, complete=True)
        if best is None:
            pairs = sorted((p for c in improving for p in self._expand(c, self.cheap)), key=lambda c: c.fit_loss)[:BEAM]
            best = self._choose(pairs, complete=True)
        if best is None:
            grounds = [g for g in (self.start, *improving) if self._numeric(g)]
            simulated = [c for g in grounds for c in self._expand(g, self.simulated)]
            pool = [*improving, *pairs, *simulated]
            best = self._choose(pool, complete=True) or self._choose(pool, complete=False) or self.start
        return self._conclude(best, singles)

    def _numeric(self, candidate: _Candidate) -> bool:
        """Whether what a candidate leaves is small enough for rounding to be worth simulating."""
        return self.held_judgement(candidate.model).rms < NUMERIC_FACTOR * self.floor_of(candidate.model).rms

    def _choose(self, candidates: Sequence[_Candidate], *, complete: bool) -> _Candidate | None:
        """Best candidate that explains enough of the gap, each of whose edits is needed.

        With `complete` its held-back residual must be at the floor; without, it must explain PARTIAL_SHARE.
        """
        before = self.held_loss(self.base)
        share = COMPLETE_SHARE if complete else PARTIAL_SHARE
        kept = [
            c
            for c in candidates
            if self.held_loss(c.model) < (1 - share) * before
            and (self.held_judgement(c.model).within if complete else self._tracks(c))
            and self._needed(c)
        ]
        if not kept:
            return None
        best = min(kept, key=lambda c: self.held_loss(c.model))
        tied = [c for c in kept if not self._clearly_worse(c, best)]
        return min(tied, key=lambda c: (len(c.path), [self.order.index(e.hypothesis.id) for e in c.path]))

    def _clearly_worse(self, candidate: _Candidate, best: _Candidate) -> bool:
        ours, theirs = self.held_residual(best.model), self.held_residual(candidate.model)
        return candidate is not best and clearly_better(ours, theirs, EDGE_ALLOWANCE)

    def _tracks(self, candidate: _Candidate) -> bool:
        """Whether the prediction follows the engine token by token.

        Flattening a wrong model's prediction also shrinks |r|; it does not correlate with what the engine reported.
        """
        res = self.held_residual(candidate.model)
        engine_T = self.held.tokens.engine_T[res.usable_T]
        pair = torch.stack([engine_T, engine_T + res.residual_T[res.usable_T]])
        return pair.shape[1] > 2 and float(torch.corrcoef(pair)[0, 1]) > TRACKING_CORRELATION

    def _needed(self, candidate: _Candidate) -> bool:
        """Whether leaving out either edit of a pair fits clearly worse on the held-back half."""
        if len(candidate.path) < 2:
            return True
        first, last = candidate.path[0], candidate.path[-1]
        without = [first.after, *(c.model for c in self._expand(self.start, [last.hypothesis]))]
        ours = self.held_residual(candidate.model)
        return all(clearly_better(ours, self.held_residual(model), EDGE_ALLOWANCE) for model in without)

    def _conclude(self, best: _Candidate, singles: Sequence[_Candidate]) -> Attribution:
        floor, verdict = self.floor_of(best.model), self.held_judgement(best.model)
        rivals, unseeable = [], dict(self.unseeable)
        ruled_out = [h.id for h in self.cheap if not h.variants(self.fit, self.base)]
        chosen = {e.hypothesis.id for e in best.path}
        for candidate in singles:
            hypothesis = candidate.path[-1].hypothesis
            if hypothesis.id in chosen:
                continue
            ours, theirs = self.held_residual(best.model), self.held_residual(candidate.model)
            if clearly_better(ours, theirs, EDGE_ALLOWANCE):
                ruled_out.append(hypothesis.id)
            elif separation(self.held_residual(self.base), theirs) < floor.rms:
                unseeable[hypothesis.id] = "its effect here would be smaller than the noise floor"
            elif best.path and self.held_judgement(candidate.model).within:
                rivals.append(hypothesis.id)
        ambiguous = ((*(e.hypothesis.id for e in best.path), *rivals),) if rivals else ()
        return Attribution(
            findings=self._findings(best, complete=verdict.within, ambiguous=bool(rivals)),
            model=best.model,
            floor=floor,
            judgement=verdict,
            ambiguous=ambiguous,
            ruled_out=tuple(ruled_out),
            unseeable=unseeable,
        )

    def _findings(self, best: _Candidate, *, complete: bool, ambiguous: bool) -> tuple[Finding, ...]:
        """One finding an edit, with the share of mean |r| it takes away on top of the edits before it."""
        total = before = self.held_loss(self.base)
        confidence = "low" if ambiguous else "high" if complete and self.fit is not self.held else "medium"
        found = []
        for edit in best.path:
            after = self.held_loss(edit.after)
            share = (before - after) / max(total, 1e-300)
            found.append(
                Finding(hypothesis=edit.hypothesis, detail=edit.detail, explained=share, confidence=confidence)
            )
            before = after
        return tuple(sorted(found, key=lambda f: -f.explained))
