"""From gap to cause: compute what each kind of broken engine would have reported, keep what the tokens support.

Candidates are fitted on one half of the sequences and judged on the other. The smallest set of edits (none, one, two)
that brings the held-back residual to the floor wins; what stays is printed, never spread over the causes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from trueup.parity.compare import Residual, clearly_better, loss, residual, separation
from trueup.parity.evidence import EngineModel, Evidence
from trueup.parity.floor import Floor, Judgement, Limits, judge
from trueup.parity.hypotheses import Hypothesis

BEAM = 3
PARTIAL_SHARE = 0.5
"""A cause that leaves more than the floor is named only if it explains at least this share on held-back tokens."""
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
class _Candidate:
    model: EngineModel
    path: tuple[tuple[Hypothesis, str], ...]
    fit_loss: float


class Attributor:
    """Searches engine models for one setting. `fit` and `held` are disjoint halves of its evidence.

    `floor_of(model)` predicts the floor under a model's distribution.
    """

    def __init__(
        self, *, fit: Evidence, held: Evidence, hypotheses: Sequence[Hypothesis],
        floor_of: Callable[[EngineModel], Floor], limits: Limits,
    ) -> None:  # fmt: skip
        self.fit, self.held, self.floor_of, self.limits = fit, held, floor_of, limits
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
        verdict = judge(res.residual_T.masked_fill(~res.usable_T, float("nan")), res.row_T, self.floor_of(model), self.limits)
        if res.edge_share > self.limits.edge_share:
            reason = f"{res.edge_share:.1%} of tokens lie outside the kept set this predicts"
            verdict = replace(verdict, reasons=(*verdict.reasons, reason))
        return verdict

    def _expand(self, start: _Candidate, hypotheses: Sequence[Hypothesis]) -> list[_Candidate]:
        """Best variant of each hypothesis on top of `start`, judged on the fitting half, best first."""
        used = {h.id for h, _ in start.path}
        offers = {h: h.variants(self.fit, start.model) for h in hypotheses if h.id not in used}
        for source in {v.model.source for vs in offers.values() for v in vs}:
            dists = [v.model.dist for vs in offers.values() for v in vs if v.model.source == source]
            self.fit.prefetch(source, dists)
        seen = {start.model}
        found = []
        for hypothesis, variants in offers.items():
            ranked = []
            for variant in variants:
                if variant.model not in seen:
                    seen.add(variant.model)
                    value = loss(residual(self.fit, variant.model), EDGE_ALLOWANCE)
                    path = (*start.path, (hypothesis, variant.detail))
                    ranked.append(_Candidate(model=variant.model, path=path, fit_loss=value))
            if ranked:
                found.append(min(ranked, key=lambda c: c.fit_loss))
        return sorted(found, key=lambda c: c.fit_loss)

    def run(self, *, mismatch: bool) -> Attribution:
        """Search; with `mismatch` false only say what is ruled out."""
        start = _Candidate(model=self.base, path=(), fit_loss=loss(residual(self.fit, self.base), EDGE_ALLOWANCE))
        singles = self._expand(start, self.cheap)
        if not mismatch:
            return self._conclude(start, singles)
        improving = [c for c in singles if c.fit_loss < 0.95 * start.fit_loss][:BEAM]
        best = self._choose(improving)
        if best is None:
            pairs = [p for c in improving for p in self._expand(c, self.cheap) if p.fit_loss < 0.9 * c.fit_loss]
            best = self._choose(sorted(pairs, key=lambda c: c.fit_loss)[:BEAM])
        if best is None:
            best = self._partial(start, improving)
        return self._conclude(best, singles)

    def _choose(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """Best candidate whose held-back residual is at the floor."""
        consistent = [c for c in candidates if self.held_judgement(c.model).within and self._explains(c)]
        return min(consistent, key=lambda c: self.held_loss(c.model), default=None)

    def _explains(self, candidate: _Candidate) -> bool:
        return self.held_loss(candidate.model) < (1 - PARTIAL_SHARE / 2) * self.held_loss(self.base)

    def _partial(self, start: _Candidate, improving: Sequence[_Candidate]) -> _Candidate:
        """Best incomplete explanation, then further forward passes on top of it."""
        enough = [c for c in improving if self._share(start.model, c.model) >= PARTIAL_SHARE]
        best = min(enough, key=lambda c: self.held_loss(c.model), default=start)
        if self.held_judgement(best.model).rms > 30 * self.floor_of(best.model).rms:
            return best
        simulated = [c for c in self._expand(best, self.simulated) if self._share(best.model, c.model) >= PARTIAL_SHARE]
        return min(simulated, key=lambda c: self.held_loss(c.model), default=best)

    def _share(self, before: EngineModel, after: EngineModel) -> float:
        return 1 - self.held_loss(after) / max(self.held_loss(before), 1e-300)

    def _conclude(self, best: _Candidate, singles: Sequence[_Candidate]) -> Attribution:
        floor, verdict = self.floor_of(best.model), self.held_judgement(best.model)
        rivals, ruled_out, unseeable = [], [], dict(self.unseeable)
        chosen = {h.id for h, _ in best.path}
        for candidate in singles:
            hypothesis = candidate.path[-1][0]
            if hypothesis.id in chosen:
                continue
            ours, theirs = self.held_residual(best.model), self.held_residual(candidate.model)
            if clearly_better(ours, theirs, EDGE_ALLOWANCE):
                ruled_out.append(hypothesis.id)
            elif separation(ours, theirs) < floor.rms:
                unseeable[hypothesis.id] = "its effect here would be smaller than the noise floor"
            elif best.path and self.held_judgement(candidate.model).within:
                rivals.append(hypothesis.id)
        ambiguous = ((*(h.id for h, _ in best.path), *rivals),) if rivals else ()
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
        total = self.held_loss(self.base)
        model, before = self.base, total
        found = []
        for hypothesis, detail in best.path:
            model = next(v.model for v in hypothesis.variants(self.fit, model) if v.detail == detail)
            after = self.held_loss(model)
            confidence = "low" if ambiguous else "high" if complete else "medium"
            share = (before - after) / max(total, 1e-300)
            found.append(Finding(hypothesis=hypothesis, detail=detail, explained=share, confidence=confidence))
            before = after
        return tuple(sorted(found, key=lambda f: -f.explained))

