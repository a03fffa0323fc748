"""From gap to cause: compute what each kind of broken engine would have reported, keep what the tokens support.

Candidates are fitted on one half of the sequences and judged on the other. The smallest set of edits (none, one, two)
that brings the held-back residual to the floor wins; what stays is printed, never spread over the causes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from trueup.errors import ModelError, NumericsError
from trueup.knobs import LimitsConfig
from trueup.parity import compare
from trueup.parity.budget import Budget, unlimited
from trueup.parity.candidates import Candidate, Edit
from trueup.parity.compare import Residual, clearly_better, log_likelihood, loss, residual, separation, would_show
from trueup.parity.evidence import TRAINER, EngineModel, Evidence, Source
from trueup.parity.findings import Attribution, Finding
from trueup.parity.floor import Floor, Judgement, judge
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.report import NOT_TRIED
from trueup.policy.processing import Distribution

BEAM = 3
PARTIAL_SHARE = 0.5
"""A cause that leaves more than the floor is named only if it explains at least this share on held-back tokens."""
COMPLETE_SHARE = 0.25
"""A cause that brings the gap to the floor must still take away this share (a small bias hides in a wide floor)."""
COSTLY_SHARE = 0.9
"""The same for a cause with a number that is fitted: many a smooth error looks like half of another."""
NUMERIC_NATS = 1.0
"""Beyond this rms a gap is not rounding, and no rounding is simulated for it."""
EDGE_ALLOWANCE = 0.02
TWINS = ("S4", "S6")
"""At T=1 an engine that ignores truncation or penalties reports what a raw one does; which of them it is shows at any
other temperature."""
LIKELIER_NATS = 7.0
"""Of two causes that predict the same numbers one is dropped if it makes the tokens a thousand times less likely."""
REFINED = 3
"""Costly candidates that are refined, of all that look promising."""
NO_SIMULATION = "it cannot be simulated for this kind of model"
REFINE_ROUNDS = 24
FINEST_STEP = 1 / 256
REFINE_GAIN = 0.002
"""A round of refinement that takes away less than this share of the loss is followed by one with half the step."""
PROMISING = 0.95
"""A costly candidate is looked at more closely once it leaves at most this share of the loss on the screen."""


class Attributor:
    """Searches engine models for one setting. `fit` and `held` are disjoint halves of its evidence.

    `floor_of(model)` predicts the floor under a model: its distribution, and the rounding of its source. Once `budget`
    is over no costly cause is tried any more: those left are listed as not finished.
    """

    def __init__(
        self, *, fit: Evidence, held: Evidence, hypotheses: Sequence[Hypothesis],
        floor_of: Callable[[EngineModel], Floor], limits: LimitsConfig, budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.fit, self.held, self.floor_of, self.limits = fit, held, floor_of, limits
        self.budget = budget or unlimited()
        self.unfinished: set[str] = set()
        self.unseeable = {h.id: why for h in hypotheses if (why := h.unseeable(fit))}
        seeable = [h for h in hypotheses if h.id not in self.unseeable]
        self.cheap = [h for h in seeable if not h.simulates]
        self.simulated = [h for h in seeable if h.simulates]
        self.base = EngineModel(dist=fit.case.trainer_distribution)
        self._held: dict[EngineModel, Residual] = {}
        self._own_floors: dict[EngineModel, Floor] = {}
        self.impossible: set[Source] = set()
        self.seen: set[EngineModel] = set()
        self.hopeless: set[str] = set()
        self.twins: dict[EngineModel, set[str]] = {}
        self.searched = False

    def held_residual(self, model: EngineModel) -> Residual:
        """Residual of a model on the held-back half, computed once."""
        if model not in self._held:
            self._held[model] = residual(self.held, model)
        return self._held[model]

    def held_loss(self, model: EngineModel) -> float:
        """Mean |residual| on the held-back half."""
        return loss(self.held_residual(model), EDGE_ALLOWANCE)

    def held_judgement(self, model: EngineModel) -> Judgement:
        """Judge the held-back residual of a model; ruled-out tokens beyond the allowance are a reason of their own.

        A change of the model can make it round more coarsely than the trainer does (a window of a few tokens does): one
        that takes away nearly all of the gap is judged against its own rounding.
        """
        verdict = self._judged(model, self.floor(model))
        if verdict.within or not model.source.one_model or model in self._own_floors:
            return verdict
        if self.held_loss(model) >= (1 - COSTLY_SHARE) * self.held_loss(self.base):
            return verdict
        self._own_floors[model] = self.floor_of(model)
        return self._judged(model, self.floor(model))

    def floor(self, model: EngineModel) -> Floor:
        """The floor that a model is judged against: the trainer's rounding under its distribution, or its own."""
        return self._own_floors.get(model) or self.floor_of(EngineModel(dist=model.dist))

    def _judged(self, model: EngineModel, floor: Floor) -> Judgement:
        res = self.held_residual(model)
        limits = self.limits.model_copy(update={"min_tokens": max(1, self.limits.min_tokens // 4)})
        left_T = res.residual_T.masked_fill(~res.usable_T, float("nan"))
        verdict = judge(left_T, res.row_T, floor, limits, lines=self.held.tokens.lines, left=True)
        if res.edge_share > self.limits.edge_share:
            outside = f"{res.edge_share:.1%} of tokens lie outside the kept set this predicts"
            return replace(verdict, reasons=(*verdict.reasons, outside))
        return verdict

    def _expand(self, start: Candidate, hypotheses: Sequence[Hypothesis]) -> list[Candidate]:
        """Best variant of each hypothesis on top of `start`, judged on the fitting half, best first.

        Costly ones are compared on the screen of the fitting half; only the best of each is run on all of it.
        """
        used = {e.hypothesis.id for e in start.path}
        self.seen = {start.model}
        cheap = [h for h in hypotheses if not h.simulates and h.id not in used]
        found = [c for h in cheap if (c := self._refined(self.fit, self._coarse(self.fit, start, h), h)) is not None]
        costly = [h for h in hypotheses if h.simulates and h.id not in used]
        return sorted([*found, *self._expand_costly(start, costly)], key=lambda c: c.fit_loss)

    def _expand_costly(self, start: Candidate, hypotheses: Sequence[Hypothesis]) -> list[Candidate]:
        """Coarse variants of all on the screen; the few best are refined there until one accounts for all of the gap,
        and run on the whole fitting half."""
        screen = self.fit.screen or self.fit
        coarse: list[Candidate] = []
        for hypothesis in hypotheses:
            if self.budget.over:
                self.unseeable[hypothesis.id] = NOT_TRIED
                self.unfinished.add(hypothesis.id)
                continue
            part = screen if hypothesis.screened else self.fit
            best = self._coarse(part, start, hypothesis)
            offered = {v.model.source for v in hypothesis.variants(self.fit, start.model)}
            if best is None and offered and offered <= self.impossible:
                self.unseeable[hypothesis.id] = NO_SIMULATION
            elif best is None or best.fit_loss > PROMISING * loss(residual(part, start.model), EDGE_ALLOWANCE):
                self.hopeless.add(hypothesis.id)
            else:
                coarse.append(best)
        found, whole = [], False
        for rank, candidate in enumerate(sorted(coarse, key=lambda c: c.fit_loss)):
            if rank < REFINED and not whole:
                candidate = self._refined(screen, candidate, candidate.path[-1].hypothesis) or candidate
                whole = candidate.fit_loss <= self.floor(candidate.model).rms
            found.append(replace(candidate, fit_loss=self._fit_loss(candidate.model)))
        return [c for c in found if c.fit_loss < float("inf")]

    def _coarse(self, evidence: Evidence, start: Candidate, hypothesis: Hypothesis) -> Candidate | None:
        """The variant that fits the evidence best."""
        variants = list(hypothesis.variants(self.fit, start.model))
        self._prefetch(evidence, variants)
        ranked = [c for v in variants if (c := self._candidate(evidence, start, hypothesis, v)) is not None]
        return min(ranked, key=lambda c: c.fit_loss, default=None)

    def _refined(self, evidence: Evidence, best: Candidate | None, hypothesis: Hypothesis) -> Candidate | None:
        """The same with its number, if it has one, brought closer by halving steps."""
        if best is None or hypothesis.refine is None or best.fit_loss > PROMISING * self.start.fit_loss:
            return best
        start, step = replace(best, path=best.path[:-1]), 1.0
        for _ in range(REFINE_ROUNDS):
            if self.budget.over:
                self.unfinished.add(hypothesis.id)
                break
            closer = list(best.path[-1].neighbours(evidence, step))
            self._prefetch(evidence, closer)
            ranked = [c for v in closer if (c := self._candidate(evidence, start, hypothesis, v)) is not None]
            following = min(ranked, key=lambda c: c.fit_loss, default=None)
            if following is not None and following.fit_loss < (1 - REFINE_GAIN) * best.fit_loss:
                best = following
            elif step > FINEST_STEP:
                step /= 2
            else:
                break
        return best

    def _candidate(
        self, evidence: Evidence, start: Candidate, hypothesis: Hypothesis, variant: Variant
    ) -> Candidate | None:
        if variant.model in self.seen and hypothesis.id in TWINS:
            self.twins.setdefault(variant.model, set()).add(hypothesis.id)
        known = variant.model in self.seen and not hypothesis.redraws  # the tokens may tell one that redraws apart
        if known or variant.model.source in self.impossible:
            return None
        self.seen.add(variant.model)
        value = loss(residual(evidence, variant.model), EDGE_ALLOWANCE)
        edit = Edit.of(hypothesis, variant)
        return Candidate(model=variant.model, path=(*start.path, edit), fit_loss=value)

    def _fit_loss(self, model: EngineModel) -> float:
        try:
            return loss(residual(self.fit, model), EDGE_ALLOWANCE)
        except (ModelError, NumericsError):
            return float("inf")

    def _prefetch(self, evidence: Evidence, variants: Sequence[Variant]) -> None:
        """Ask for everything the variants need, one pass a source; a source that cannot be simulated is noted."""
        for source in dict.fromkeys(v.model.source for v in variants):
            try:
                evidence.prefetch(source, [v.model.dist for v in variants if v.model.source == source])
            except (ModelError, NumericsError):
                if source.plain:
                    raise
                self.impossible.add(source)

    def run(self, *, mismatch: bool, given: Attribution | None = None) -> Attribution:
        """Search; with `mismatch` false only say what is ruled out.

        `given` is what another setting has shown of the same engine's weights and arithmetic; where that fits here too,
        the search starts from it.
        """
        self.start = Candidate(model=self.base, path=(), fit_loss=loss(residual(self.fit, self.base), EDGE_ALLOWANCE))
        singles = self._expand(self.start, self.cheap)
        self.held.prefetch(TRAINER, [self.base.dist, *(c.model.dist for c in singles)])
        if not mismatch:
            return self._conclude(self.start, singles)
        if given is not None and (best := self._from(given)) is not None:
            return self._conclude(best, singles)
        improving = [c for c in singles if c.fit_loss < 0.95 * self.start.fit_loss][:BEAM]
        best = self._choose(improving, complete=True)
        pairs: list[Candidate] = []
        if best is None:
            pairs = sorted((p for c in improving for p in self._expand(c, self.cheap)), key=lambda c: c.fit_loss)[:BEAM]
            best = self._choose(pairs, complete=True)
        if best is None:
            best, simulated = self._search_costly(improving, pairs)
            singles = [*singles, *(c for c in simulated if len(c.path) == 1)]
        return self._conclude(best, singles)

    def _from(self, given: Attribution) -> Candidate | None:
        """The findings of another setting, carried over to this one, and the best cheap cause on top of them."""
        if given.model.source.plain or not given.findings:
            return None
        model = replace(self.base, source=given.model.source)
        edits = tuple(Edit.again(f, model) for f in given.findings)
        carried = Candidate(model=model, path=edits, fit_loss=self._fit_loss(model))
        if self.held_judgement(model).within:
            return carried
        enough = (1 - COMPLETE_SHARE) * self.held_loss(model)
        on_top = [c for c in self._expand(carried, self.cheap)[:BEAM] if self.held_loss(c.model) < enough]
        return self._choose([carried, *on_top], complete=True) or self._choose([carried, *on_top], complete=False)

    def _search_costly(
        self, improving: Sequence[Candidate], pairs: Sequence[Candidate]
    ) -> tuple[Candidate, list[Candidate]]:
        """Simulate: first on the trainer as it is, then on top of the best cheap cause."""
        self.searched = True
        found: list[Candidate] = []
        for ground in (self.start, *improving):
            like_rounding = self.held_judgement(ground.model).rms < NUMERIC_NATS
            kinds = [h for h in self.simulated if like_rounding or not h.numeric]
            if ground is not self.start:
                kinds = [h for h in kinds if h.numeric or ground is improving[0]]
            found += self._expand(ground, kinds)
            best = self._choose([*improving, *pairs, *found], complete=True)
            if best is not None:
                return best, found
        return self._choose([*improving, *pairs, *found], complete=False) or self.start, found

    def _choose(self, candidates: Sequence[Candidate], *, complete: bool) -> Candidate | None:
        """Best candidate that explains enough of the gap, each of whose edits is needed.

        With `complete` its held-back residual must be at the floor; without, it must explain PARTIAL_SHARE.
        """
        before = self.held_loss(self.base)

        def share(candidate: Candidate) -> float:
            fitted = any(e.hypothesis.simulates and e.hypothesis.refine for e in candidate.path)
            return COMPLETE_SHARE if complete else COSTLY_SHARE if fitted else PARTIAL_SHARE

        kept = [
            c
            for c in candidates
            if (self.held_loss(c.model) < (1 - share(c)) * before or (complete and self._clearly_worse(self.start, c)))
            and (self.held_judgement(c.model).within if complete else self._follows(c))
            and not self._speaks_against(c)
            and self._needed(c)
        ]
        if not kept:
            return None
        alone = [c for c in kept if len(c.path) == 1 and self.held_loss(c.model) < (1 - COSTLY_SHARE) * before]
        kept = alone or kept
        best = min(kept, key=lambda c: self.held_loss(c.model))
        tied = [c for c in kept if not self._clearly_worse(c, best)]
        drawn = [c for c in tied if not any(self._less_likely(c, other) for other in tied)] or tied
        return min(drawn, key=lambda c: (len(c.path), [e.hypothesis.rank for e in c.path]))

    def _less_likely(self, candidate: Candidate, other: Candidate) -> bool:
        """Whether the tokens, drawn as each of them says, speak against the first: numbers alone cannot tell an engine
        that reports raw logprobs from one that also draws at T=1."""

        def drawn_from(c: Candidate) -> Distribution:
            return c.model.dist if c.redraws else self.held.case.processed

        first, second = (log_likelihood(self.held, drawn_from(c)) for c in (candidate, other))
        return second - first > LIKELIER_NATS

    def _as_declared(self, candidate: Candidate, floor: Floor) -> bool:
        """Whether a cause says of the engine what is declared: then it is the trainer that differs."""
        declared = replace(self.base, dist=self.held.case.processed)
        return candidate.redraws and separation(*map(self.held_residual, (declared, candidate.model))) < floor.rms

    def _speaks_against(self, candidate: Candidate) -> bool:
        """Whether the drawn tokens rule out that they were drawn as a candidate says."""
        if not candidate.redraws or not candidate.model.source.plain:
            return False
        declared, redrawn = (
            log_likelihood(self.held, dist) for dist in (self.held.case.processed, candidate.model.dist)
        )
        return declared - redrawn > LIKELIER_NATS

    def _clearly_worse(self, candidate: Candidate, best: Candidate) -> bool:
        theirs = self.held_residual(candidate.model)
        return candidate is not best and clearly_better(self.held_residual(best.model), theirs, EDGE_ALLOWANCE)

    def _follows(self, candidate: Candidate) -> bool:
        """Whether an incomplete explanation follows the engine token by token, and is not the average of something that
        changes as it goes: what that leaves depends on the position."""
        res = self.held_residual(candidate.model)
        most = self.held_loss(candidate.model) < (1 - COSTLY_SHARE) * self.held_loss(self.base)
        drifts = compare.drifts(self.held, self.held_residual(self.base), res, grows=candidate.grows)
        return compare.tracks(self.held, res) and (most or not (drifts or self._moves(candidate.path[-1])))

    def _moves(self, edit: Edit) -> bool:
        """Whether the number in a cause that costs no forward passes changes as completions go on."""
        near = () if edit.hypothesis.simulates else edit.neighbours(self.held, 1.0)
        return len(near) == 2 and compare.number_moves(self.held, *(residual(self.held, v.model) for v in near))

    def _needed(self, candidate: Candidate) -> bool:
        """Whether leaving out either edit of a pair fits clearly worse on the held-back half."""
        if len(candidate.path) < 2:
            return True
        first, last = candidate.path[0], candidate.path[-1]
        without = [first.after, *(c.model for c in self._expand(self.start, [last.hypothesis]))]
        ours = self.held_residual(candidate.model)
        return all(clearly_better(ours, self.held_residual(model), EDGE_ALLOWANCE) for model in without)

    def _conclude(self, best: Candidate, singles: Sequence[Candidate]) -> Attribution:
        verdict = self.held_judgement(best.model)
        floor = self.floor(best.model)
        rivals: list[str] = []
        named = tuple(e.hypothesis.id for e in best.path)
        tried = {*named, *(c.path[-1].hypothesis.id for c in singles)}
        ruled_out = [h.id for h in self.cheap if h.id not in tried] + sorted(self.hopeless - tried)
        for candidate in singles:
            hypothesis = candidate.path[-1].hypothesis
            if hypothesis.id in named:
                continue
            ours, theirs = self.held_residual(best.model), self.held_residual(candidate.model)
            no_effect = separation(self.held_residual(self.base), theirs) < floor.rms
            if no_effect or clearly_better(ours, theirs, EDGE_ALLOWANCE):
                ruled_out.append(hypothesis.id)
            elif best.path and self.held_judgement(candidate.model).within and not self._as_declared(candidate, floor):
                (ruled_out if self._less_likely(candidate, best) else rivals).append(hypothesis.id)
        ruled_out = [i for i in ruled_out if self._would_show(i, floor, verdict)]
        twins = sorted(self.twins.get(best.model, set()) - set(named)) if named else []
        ambiguous = ((*named, *rivals, *twins),) if rivals or twins else ()
        elsewhere = {*named, *rivals, *twins, *ruled_out, *self.unseeable}
        return Attribution(
            findings=self._findings(best, complete=verdict.within, ambiguous=bool(rivals)),
            model=best.model,
            floor=floor,
            judgement=verdict,
            ambiguous=ambiguous,
            ruled_out=tuple(ruled_out),
            not_seen=tuple(h.id for h in (*self.cheap, *self.simulated) if h.id not in elsewhere),
            unseeable=dict(self.unseeable),
            tried=tuple(h.id for h in (*self.cheap, *(self.simulated if self.searched else ()))),
            searched=self.searched,
            unfinished=tuple(sorted(self.unfinished.difference(named))),
        )

    def _would_show(self, cause_id: str, floor: Floor, left: Judgement) -> bool:
        """Whether a cause would show here at its smallest size, above the floor and above what was left unexplained."""
        hypothesis = next(h for h in (*self.cheap, *self.simulated) if h.id == cause_id)
        evidence = self.fit.screen or self.fit if hypothesis.simulates and hypothesis.screened else self.fit
        variants = (hypothesis.smallest or hypothesis.variants)(self.fit, self.base)
        models = [v.model for v in variants if v.model.source not in self.impossible]
        if not models:
            return hypothesis.marked
        least = floor if left.within else replace(floor, rms=max(floor.rms, left.rms), rows={})
        return would_show(evidence, self.base, models, least, self.limits)

    def _findings(self, best: Candidate, *, complete: bool, ambiguous: bool) -> tuple[Finding, ...]:
        """One finding an edit, with the share of mean |r| it takes away on top of the edits before it."""
        total = before = self.held_loss(self.base)
        confidence = "low" if ambiguous else "high" if complete and self.fit is not self.held else "medium"
        found = []
        for edit in best.path:
            after = self.held_loss(edit.after)
            found.append(edit.finding(explained=(before - after) / max(total, 1e-300), confidence=confidence))
            before = after
        return tuple(sorted(found, key=lambda f: -f.explained))
