"""One sampling setting: is its gap within the floor, and if not, what explains it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.errors import ModelError, NumericsError
from trueup.knobs import LimitsConfig
from trueup.parity.attribution import Attributor
from trueup.parity.budget import Budget
from trueup.parity.compare import Residual, residual
from trueup.parity.draw_origins import CHANGE_DRAWS, origin_of
from trueup.parity.draws import Draws, is_top, judge_draws, not_judged
from trueup.parity.evidence import ENGINE, EXACT, REFERENCE, TRAINER, EngineModel, Evidence
from trueup.parity.findings import Attribution
from trueup.parity.floor import Floor, Judgement, judge, predict, rows_beyond
from trueup.parity.grouping import Setting, halves
from trueup.parity.hypotheses import all_hypotheses
from trueup.parity.hypotheses.versions import versions_apart
from trueup.parity.invariants import INVARIANTS, positive_logprobs, well_formed
from trueup.parity.logged_trainer import describe, rows_with_trainer
from trueup.parity.marks import EDGE_FLOORS, at_edge, fillers, without
from trueup.parity.replicas import Divided, divide
from trueup.parity.report import NOT_TRIED, TRIED, Cause, SettingReport
from trueup.parity.scorer import Scorer
from trueup.parity.write_up import (
    broken_causes,
    causes_of,
    edges_of,
    empty_report,
    gap_of,
    in_rows,
    of_sequences,
    points_of,
    unexplained_part,
)  # fmt: skip
from trueup.trace import TraceRow

FITTING_ROWS = 0.25
"""Share of the rows that must fit before those that do not are looked at by themselves."""
NOISE_ROWS = 2
"""Rows a setting that are also scored one at a time, for the trainer's batch-shape noise."""
FP64_TOKENS = 384
"""Tokens a setting, at least, that a float32 check also scores in float64."""
SCREEN_TOKENS = 96
"""Tokens on which costly candidates are compared first: of the rows that are farthest off, and of the nearest one."""


def usable_rows(setting: Setting) -> list[TraceRow]:
    """Rows whose logprobs can be compared at all."""
    return [r for r in setting.rows if well_formed(r)]


def reference_rows(scorer: Scorer, rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows the floor is predicted on: all, or for a float64 reference evenly spread ones up to a token budget."""
    if scorer.reference.body != torch.float64:
        return list(rows)
    tokens = sum(len(r.completion_token_ids) for r in rows)
    return list(rows[:: max(1, tokens // FP64_TOKENS)])


def screen(rows: Sequence[TraceRow], evidence: Evidence, now: Residual) -> list[TraceRow]:
    """The rows that are farthest off, up to SCREEN_TOKENS, and the one that is nearest."""
    off = now.residual_T.abs().nan_to_num(0.0, posinf=10.0, neginf=10.0)
    mean = {
        line: float(off[evidence.tokens.row_T == row].mean()) for row, line in enumerate(evidence.tokens.lines)
    }  # fmt: skip
    order = sorted(rows, key=lambda r: -mean.get(r.line, 0.0))
    chosen: list[TraceRow] = []
    for row in order:
        if sum(len(r.completion_token_ids) for r in chosen) < SCREEN_TOKENS:
            chosen.append(row)
    return chosen if order[-1] in chosen else [*chosen, order[-1]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The report of a setting, what was found behind it (None: nothing could be compared), and a note on the user's
    own trainer if the rows carry its logprobs."""

    report: SettingReport
    found: Attribution | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Rows next to the trainer's numbers: what is off, before anybody asks why.

    `outside` counts tokens outside any kept set that rounding allows, `positive` logprobs above 0; `edge_T` marks
    tokens that are not scored because rounding at the edge of a kept set decides them. `divided`: some replicas are off
    by themselves.
    """

    rows: tuple[TraceRow, ...]
    evidence: Evidence
    base: EngineModel
    now: Residual
    floor: Floor
    verdict: Judgement
    outside: int
    edge_T: Tensor
    positive: int
    enough: bool
    divided: Divided | None

    @property
    def reasons(self) -> list[str]:
        """Everything that is beyond its limit."""
        found = [*self.verdict.reasons]
        if self.outside:
            found.append(
                f"{self.outside} tokens lie outside the trainer's kept set, farther than rounding moves its edge"
            )
        if self.positive:
            found.append(f"{self.positive} logprobs are above 0")
        if self.divided is not None:
            found += self.divided.reasons
        return found

    @property
    def mismatch(self) -> bool:
        """Whether there is a gap to explain, on enough tokens."""
        return self.enough and bool(self.reasons)


class SettingJudge:
    """Judges settings against one scorer."""

    def __init__(self, scorer: Scorer, limits: LimitsConfig, *, budget: Budget | None = None) -> None:
        self.scorer, self.limits, self.budget = scorer, limits, budget

    def floor(self, setting: Setting, model: EngineModel, on: Evidence | None = None) -> Floor:
        """The floor under a model, from the setting's tokens (`on`, if at hand): its distribution and its rounding."""
        scorer = self.scorer
        evidence = on or scorer.evidence(setting.case, reference_rows(scorer, usable_rows(setting)))
        sources = [replace(model.source, precision=s.precision) for s in (TRAINER, ENGINE, REFERENCE)]
        try:
            trainer, engine, reference = (evidence.scores(source, model.dist).logprobs_T for source in sources)
        except (ModelError, NumericsError):
            if model.source.plain:
                raise
            return self.floor(setting, replace(model, source=TRAINER), on)  # an imitated rounding has float32 only
        basis = (
            f"trainer ({scorer.trainer.title()}) and engine ({scorer.engine.title()}) against "
            f"{scorer.reference.title()}, taken as independent"
        )
        return predict(
            trainer, engine, reference, row_T=evidence.tokens.row_T, basis=basis, min_floor=self.limits.min_floor,
            lines=evidence.tokens.lines,
        )  # fmt: skip

    def judge(
        self, setting: Setting, *, given: Attribution | None = None, excluded: frozenset[str] = frozenset()
    ) -> Judged:
        """Compare, judge, attribute.

        `given` is what another setting has shown of the engine's weights and arithmetic; causes in `excluded` were
        shown not to be there.
        """
        broken = broken_causes(setting.rows, setting.case)
        excluded |= {"S6"} if setting.case.unmodelled else set()  # what it was told may change logits as S6 does
        rows = usable_rows(setting)
        if not rows:
            outcome, why = "mismatch" if broken else "inconclusive", "no row could be compared"
            return Judged(report=empty_report(setting, outcome, why, tuple(broken)), found=None)
        floors: dict[object, Floor] = {}
        whole = self.scorer.evidence(setting.case, rows)
        on = whole if reference_rows(self.scorer, rows) == rows else None

        def floor_of(model: EngineModel) -> Floor:
            key = (model.dist, model.source)
            if key not in floors:
                floors[key] = self.floor(setting, model, on)
            return floors[key]

        seen, filler, nothing_else = self._look_past_fillers(whole, rows, floor_of)
        broken += [filler] if filler is not None else []
        logged = rows_with_trainer(rows)
        note = describe(self.scorer.evidence(setting.case, logged), logged, seen.floor.rms) if logged else None
        if nothing_else:
            why = "every logprob is a filler: none was recorded"
            return Judged(report=empty_report(setting, "mismatch", why, tuple(broken)), found=None, note=note)
        divided = seen.divided
        if divided is not None:  # the good replicas have nothing to explain
            broken = [divided.cause(), *broken]
        odd = [r for r in seen.rows if divided is None or r.replica in divided.bad]
        found = self._search(setting, seen, odd, floor_of, given=given, excluded=excluded)
        where, inside_T = "", None
        if divided is not None:
            odd_rows = [i for i, r in enumerate(seen.rows) if r.replica in divided.bad]
            inside_T = torch.isin(seen.now.row_T, torch.tensor(odd_rows))
        if seen.mismatch and not (found.findings and found.judgement.within) and (some := self._odd_rows(seen)):
            other = self._search(setting, seen, [seen.rows[i] for i in some], floor_of, given=None, excluded=excluded)
            if other.findings and other.judgement.within:
                found, where = other, in_rows(seen.rows, some)
                inside_T = torch.isin(seen.now.row_T, torch.tensor(some))
        causes = [*broken, *causes_of(found, setting.case, where)] if seen.mismatch else broken
        draws, drawn_wrong = self._draws(seen, found, inside_T)
        causes += [drawn_wrong] if drawn_wrong is not None else []
        return Judged(report=self._report(setting, seen, found, causes, draws, inside_T), found=found, note=note)

    def _look(self, evidence: Evidence, rows: Sequence[TraceRow], floor_of: Callable[[EngineModel], Floor]) -> Seen:
        """Compare rows with the trainer; tokens at the edge of a kept set are counted and left out."""
        base = EngineModel(dist=evidence.case.trainer_distribution)
        now, floor = residual(evidence, base), floor_of(base)

        def judged(excused_T: Tensor) -> Judgement:
            r_T = now.residual_T.masked_fill(~now.usable_T | excused_T, torch.nan)
            return judge(r_T, now.row_T, floor, self.limits, lines=evidence.tokens.lines)

        verdict = judged(torch.zeros_like(now.usable_T))
        noise_rms = floor.rms
        if base.dist.truncates and (
            bool(now.edge_T.any()) or verdict.far_tokens
        ):  # logprobs within a kept set of one token have no noise, its edge has
            whole = replace(base, dist=replace(base.dist, top_p=1.0, top_k=0, min_p=0.0))
            noise_rms = max(noise_rms, floor_of(whole).rms)
        excused_T = at_edge(evidence, now, noise_rms=noise_rms, token_limit=verdict.token_limit)
        if float(excused_T.double().mean()) > self.limits.edge_share:
            excused_T = torch.zeros_like(excused_T)
        elif bool(excused_T.any()):
            verdict = judged(excused_T)
        far_T = now.usable_T & ~excused_T & (now.residual_T.abs() > verdict.token_limit)
        outside = int((now.edge_T & ~excused_T).sum())
        scored = replace(now, usable_T=now.usable_T & ~excused_T)
        return Seen(
            divided=divide(rows, scored, floor, self.limits),
            rows=tuple(rows), evidence=replace(evidence, suspects_T=far_T), base=base, now=now, floor=floor,
            verdict=verdict, outside=outside, edge_T=now.edge_T | excused_T, positive=positive_logprobs(rows),
            enough=verdict.tokens + int(now.edge_T.sum()) >= self.limits.min_tokens,
        )  # fmt: skip

    def _look_past_fillers(
        self, evidence: Evidence, rows: Sequence[TraceRow], floor_of: Callable[[EngineModel], Floor]
    ) -> tuple[Seen, Cause | None, bool]:
        """Compare; where numbers were filled in, name that, and compare what is left, if anything is.

        A value that could be a logprob counts as a filler only if everything else then fits.
        """
        seen = self._look(evidence, rows, floor_of)
        assert seen.evidence.suspects_T is not None
        found = fillers(seen.evidence, seen.now, seen.evidence.suspects_T)
        if found is None:
            return seen, None, False
        left = without(rows, seen.evidence, found.at_T)
        rest = self._look(self.scorer.evidence(evidence.case, left), left, floor_of)
        whole = set(seen.evidence.tokens.engine_T.tolist()) <= set(found.counts)
        near = EDGE_FLOORS * seen.floor.rms  # near equals change places in 16 bits
        if whole and bool(is_top(seen.evidence.scores(EXACT, seen.base.dist), near).all()):
            return seen, None, False  # a greedy engine's own numbers are all 0: its draws are what is wrong
        if not (whole or found.certain or not rest.reasons):
            return seen, None, False
        return rest, found.cause(seen.evidence, seen.now), whole

    def _search(
        self, setting: Setting, seen: Seen, odd: Sequence[TraceRow], floor_of: Callable[[EngineModel], Floor], *,
        given: Attribution | None, excluded: frozenset[str],
    ) -> Attribution:  # fmt: skip
        """Look for causes on one half of the rows that are off, and judge them on the other."""
        scorer, whole = self.scorer, seen.evidence
        first, second = halves(odd)
        small = scorer.evidence(setting.case, screen(first, whole, seen.now))
        if len(odd) < len(seen.rows):  # marks such as grids and constants are looked for among these rows
            whole = scorer.evidence(setting.case, odd)
        fit = replace(scorer.evidence(setting.case, first), whole=whole, screen=replace(small, whole=whole))
        held = replace(scorer.evidence(setting.case, second), whole=whole) if len(seen.rows) > 1 else fit
        if not seen.mismatch:  # nothing to explain: what would have shown is tried on a part
            fit = held = replace(small, whole=whole)
        hypotheses = [h for h in all_hypotheses() if h.id not in excluded]
        return Attributor(
            fit=fit, held=held, hypotheses=hypotheses, floor_of=floor_of, limits=self.limits, budget=self.budget
        ).run(mismatch=seen.mismatch, given=given)

    def _odd_rows(self, seen: Seen) -> list[int]:
        """Rows that are off by themselves, if others fit: what is wrong with some only shows among themselves."""
        r_T = seen.now.residual_T.masked_fill(~seen.now.usable_T, torch.nan)
        far = rows_beyond(r_T, seen.now.row_T, seen.floor, self.limits, lines=seen.evidence.tokens.lines)
        return far if 1 < len(far) <= (1 - FITTING_ROWS) * len(seen.rows) else []

    def _draws(self, seen: Seen, found: Attribution, inside_T: Tensor | None) -> tuple[Draws, Cause | None]:
        """Judge tokens as draws from what explains their numbers; if that is about some rows (`inside_T`), others."""
        case, evidence = seen.evidence.case, seen.evidence
        if not case.drawn:
            return not_judged("these tokens are judged as draws elsewhere"), None
        if case.unmodelled and seen.mismatch:
            return not_judged(f"{', '.join(case.unmodelled)} changes the distribution and is not modelled"), None
        if found.model.bias is not None or found.model.allowed:
            return not_judged("the engine changes single logits"), None
        source = EXACT if found.model.source.plain or inside_T is not None else found.model.source
        redrawn = any(f.redraws for f in found.findings) and inside_T is None
        if inside_T is not None:
            odd = set(seen.now.row_T[inside_T].tolist())
            evidence = self.scorer.evidence(case, [r for i, r in enumerate(seen.rows) if i not in odd])
        skip = found.model.skip if inside_T is None else None
        model = EngineModel(dist=found.model.dist if redrawn else case.processed, source=source, skip=skip)

        def judged(by: EngineModel) -> Draws:
            return judge_draws(
                evidence, by, self.limits, noise_rms=seen.floor.rms, token_limit=seen.verdict.token_limit
            )

        draws = judged(model)
        others = [replace(model, dist=found.model.dist)] if any(f.hypothesis.may_redraw for f in found.findings) else []
        others += [replace(model, skip="unreported")] if skip is None else []  # a tool's tokens without a mask, say
        if draws.verdict == "mismatch":
            draws = next((again for other in others if (again := judged(other)).verdict == "agree"), draws)
        if seen.mismatch and not (found.findings and found.judgement.within):
            said = "fit the declared distribution" if draws.verdict == "agree" else "do not fit it either"
            return replace(draws, verdict="not judged", why=f"the numbers are unexplained; the draws {said}"), None
        return draws, origin_of(evidence, draws, model, judged) if draws.verdict == "mismatch" else None

    def _report(
        self, setting: Setting, seen: Seen, found: Attribution, causes: list[Cause], draws: Draws,
        inside_T: Tensor | None,
    ) -> SettingReport:  # fmt: skip
        """`inside_T` marks the tokens that the causes are about, None for all of them."""
        evidence, verdict, now, limits = seen.evidence, seen.verdict, seen.now, self.limits
        outcome = "mismatch" if causes or seen.mismatch else "agree"
        reasons = [*seen.reasons, *([draws.why] if draws.verdict == "mismatch" else [])]
        why = "; ".join(reasons) or "within the predicted floor"
        if outcome == "agree" and not seen.enough:
            outcome, why = "inconclusive", f"{verdict.tokens} tokens are too few ({limits.min_tokens} needed)"
        untested = dict(found.unseeable)
        if setting.case.unmodelled:
            untested["S6"] = f"{', '.join(setting.case.unmodelled)} changes the distribution and is not modelled"
            if outcome == "mismatch" and not causes:
                outcome, why = "inconclusive", f"{untested['S6']}: {why}"
        named = {c.id for c in causes}
        ruled_out = [i for i in (*found.ruled_out, *INVARIANTS) if i not in named]
        if outcome == "inconclusive":
            ruled_out = []
        elif outcome == "mismatch" and not causes:  # a weak or a combined form of any of them may be behind it
            untested |= {i: TRIED for i in (*found.ruled_out, *found.tried) if untested.get(i) != NOT_TRIED}
            ruled_out = list(INVARIANTS)
        unseen = list(found.not_seen) if outcome == "agree" or (outcome == "mismatch" and causes) else []
        visible_rms = (found.judgement if seen.mismatch else verdict).visible_rms
        if draws.verdict == "agree" and outcome != "inconclusive":
            if draws.blind:
                untested |= dict.fromkeys(("S3", "S13"), draws.blind)
                ruled_out = [i for i in ruled_out if i != "S3"]
            else:
                ruled_out.append("S13")
        elif draws.verdict == "mismatch":  # whatever their numbers say of how tokens were drawn
            ruled_out, unseen = ([i for i in ids if i not in CHANGE_DRAWS] for ids in (ruled_out, unseen))
        elif draws.verdict == "not judged" and setting.case.drawn:
            untested["S13"] = draws.why
        label = setting.case.label()
        scores = evidence.scores(TRAINER, setting.case.processed)
        fixed, unexplained = None, None
        if outcome == "mismatch" and seen.mismatch:
            left = residual(evidence, found.model)
            if inside_T is not None:
                r_T = torch.where(inside_T, left.residual_T, now.residual_T)
                left = replace(left, residual_T=r_T, usable_T=torch.where(inside_T, left.usable_T, now.usable_T))
            if found.findings:
                fixed = gap_of(left.residual_T, left.usable_T, evidence) | {"floor_rms": found.floor.rms}
            beyond = self._left(setting, left, found, evidence) if found.findings else verdict
            unexplained = unexplained_part(found, beyond)
            if unexplained is not None and (said := versions_apart(evidence, left.residual_T)) is not None:
                unexplained["text"] = said
        noise = self.scorer.batch_shape_noise(usable_rows(setting)[:NOISE_ROWS], setting.case)
        return SettingReport(
            label=label,
            verdict=outcome,
            why=why,
            rows=len(setting.rows),
            tokens=verdict.tokens,
            edge_tokens=edges_of(evidence, seen.edge_T),
            singleton_tokens=int((scores.kept_T == 1).sum()),
            gap=gap_of(now.residual_T, now.usable_T, evidence),
            fixed=fixed,
            noise_floor=seen.floor.as_dict() | {"batch_shape_rms": noise},
            judgement={n: getattr(verdict, n) for n in verdict.__dataclass_fields__},
            causes=tuple(replace(c, settings=(label,)) for c in causes),
            unexplained=unexplained,
            ambiguous=found.ambiguous if outcome == "mismatch" else (),
            ruled_out=tuple(ruled_out),
            untested=untested,
            not_seen=dict.fromkeys(unseen, visible_rms),
            visible_rms=visible_rms,
            kept_mass=float(scores.log_kept_mass_T.double().exp().mean()) if setting.case.processed.truncates else None,
            draws=draws.as_dict(),
            sequence=of_sequences(verdict, now.row_T[now.usable_T]),
            unfinished=found.unfinished if outcome == "mismatch" and not found.judgement.within else (),
            points=points_of(evidence, now),
        )

    def _left(self, setting: Setting, left: Residual, found: Attribution, evidence: Evidence) -> Judgement:
        """What the causes leave, over all rows: a gap in the fitting half counts as well."""
        r_T = left.residual_T.masked_fill(~left.usable_T, torch.nan)
        verdict = judge(r_T, left.row_T, found.floor, self.limits, lines=evidence.tokens.lines)
        if verdict.within or not found.model.source.one_model:
            return verdict
        own = self.floor(setting, found.model)
        return judge(r_T, left.row_T, own, self.limits, lines=evidence.tokens.lines)
