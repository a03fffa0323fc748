"""One sampling setting: is its gap within the floor, and if not, what explains it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trueup.knobs import LimitsConfig
from trueup.parity.attribution import Attributor
from trueup.parity.compare import Residual, residual
from trueup.parity.evidence import ENGINE, REFERENCE, TRAINER, EngineModel, Evidence
from trueup.parity.findings import Attribution
from trueup.parity.floor import Floor, Judgement, judge, predict
from trueup.parity.grouping import Setting, halves
from trueup.parity.hypotheses import all_hypotheses
from trueup.parity.invariants import INVARIANTS, broken_invariants, positive_logprobs, well_formed
from trueup.parity.logged_trainer import describe, rows_with_trainer
from trueup.parity.replicas import divide
from trueup.parity.report import TRIED, Cause, Points, SettingReport
from trueup.parity.scorer import Scorer
from trueup.policy.diagnostics import diagnose
from trueup.trace import TraceRow

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


class SettingJudge:
    """Judges settings against one scorer."""

    def __init__(self, scorer: Scorer, limits: LimitsConfig, *, deadline: float = float("inf")) -> None:
        self.scorer, self.limits, self.deadline = scorer, limits, deadline

    def floor(self, setting: Setting, model: EngineModel) -> Floor:
        """The floor under a model's distribution, from the setting's own tokens."""
        scorer = self.scorer
        rows = reference_rows(scorer, usable_rows(setting))
        evidence = scorer.evidence(setting.case, rows)
        trainer, engine, reference = (evidence.scores(s, model.dist).logprobs_T for s in (TRAINER, ENGINE, REFERENCE))
        basis = (
            f"trainer ({scorer.trainer.title()}) and engine ({scorer.engine.title()}) against "
            f"{scorer.reference.title()}, taken as independent"
        )
        return predict(trainer, engine, reference, basis=basis, min_floor=self.limits.min_floor)

    def judge(
        self, setting: Setting, *, given: Attribution | None = None, excluded: frozenset[str] = frozenset()
    ) -> Judged:
        """Compare, judge, attribute.

        `given` is what another setting has shown of the engine's weights and arithmetic; causes in `excluded` were
        shown not to be there.
        """
        scorer = self.scorer
        broken = [
            Cause(
                id=b.id, layer=b.layer, title=b.title, confidence="high", explained=None, fix=b.fix, evidence=b.detail
            )
            for b in broken_invariants(setting.rows)
        ]
        rows = usable_rows(setting)
        if not rows:
            verdict_now = "mismatch" if broken else "inconclusive"
            return Judged(report=_empty(setting, verdict_now, "no row could be compared", tuple(broken)), found=None)
        evidence = scorer.evidence(setting.case, rows)
        base = EngineModel(dist=setting.case.trainer_distribution)
        now = residual(evidence, base)
        floors: dict[object, Floor] = {}

        def floor_of(model: EngineModel) -> Floor:
            if model.dist not in floors:
                floors[model.dist] = self.floor(setting, model)
            return floors[model.dist]

        verdict = judge(now.residual_T.masked_fill(~now.usable_T, torch.nan), now.row_T, floor_of(base), self.limits)
        wrong_edges = now.edge_share > self.limits.edge_share
        positive = positive_logprobs(rows)
        judged = verdict.tokens + int(now.edge_T.sum())
        enough = verdict.enough or (wrong_edges and judged >= self.limits.min_tokens)
        mismatch = enough and (bool(verdict.reasons) or wrong_edges or positive > 0)
        logged = rows_with_trainer(rows)
        note = describe(scorer.evidence(setting.case, logged), logged, floor_of(base).rms) if logged else None
        divided = divide(rows, now, floor_of(base), self.limits) if mismatch else None
        if divided is not None:  # the good replicas have nothing to explain
            broken = [divided.cause(), *broken]
            odd = [r for r in rows if r.replica in divided.bad]
        first, second = halves(rows if divided is None else odd)
        small = scorer.evidence(setting.case, screen(first, evidence, now))
        fit = replace(scorer.evidence(setting.case, first), whole=evidence, screen=replace(small, whole=evidence))
        held = replace(scorer.evidence(setting.case, second), whole=evidence) if len(rows) > 1 else fit
        if not mismatch:  # nothing to explain: what would have shown is tried on a part
            fit = held = replace(small, whole=evidence)
        hypotheses = [h for h in all_hypotheses() if h.id not in excluded]
        found = Attributor(
            fit=fit, held=held, hypotheses=hypotheses, floor_of=floor_of, limits=self.limits, deadline=self.deadline
        ).run(mismatch=mismatch, given=given)
        causes = [*broken, *_causes(found)] if mismatch else broken
        reasons = [*verdict.reasons]
        if wrong_edges:
            reasons.append(f"{now.edge_share:.1%} of tokens lie outside the trainer's kept set")
        if positive:
            reasons.append(f"{positive} logprobs are above 0")
        report = self._report(setting, evidence, base, verdict, floor_of(base), found, causes, reasons, enough)
        return Judged(report=report, found=found, note=note)

    def _report(
        self, setting: Setting, evidence: Evidence, base: EngineModel, verdict: Judgement,
        floor: Floor, found: Attribution, causes: list[Cause], reasons: list[str], enough: bool,
    ) -> SettingReport:  # fmt: skip
        now = residual(evidence, base)
        outcome = "mismatch" if causes or (reasons and enough) else "agree"
        why = "; ".join(reasons) or "within the predicted floor"
        if outcome == "agree" and not enough:
            outcome, why = (
                "inconclusive",
                f"{verdict.tokens} tokens are too few ({self.limits.min_tokens} needed)",
            )
        unmodelled = setting.case.unmodelled
        untested = dict(found.unseeable)
        if unmodelled:
            untested["S6"] = f"{', '.join(unmodelled)} changes the distribution and is not modelled"
            if outcome == "mismatch" and not causes:
                outcome, why = "inconclusive", f"{untested['S6']}: {why}"
        ruled_out = [*found.ruled_out, *(i for i in INVARIANTS if i not in {c.id for c in causes})]
        if outcome == "inconclusive":
            ruled_out = []
        elif outcome == "mismatch" and not causes:  # a weak or a combined form of any of them may be behind it
            untested |= dict.fromkeys(found.ruled_out, TRIED)
            ruled_out = list(INVARIANTS)
        label = setting.case.label()
        scores = evidence.scores(TRAINER, setting.case.processed)
        fixed, unexplained = None, None
        if outcome == "mismatch":
            left = residual(evidence, found.model)
            if found.findings:
                fixed = _gap(left.residual_T, left.usable_T, evidence) | {"floor_rms": found.floor.rms}
            unexplained = _unexplained(found)
        return SettingReport(
            label=label,
            verdict=outcome,
            why=why,
            rows=len(setting.rows),
            tokens=verdict.tokens,
            edge_tokens=_edges(evidence, now.edge_T),
            singleton_tokens=int((scores.kept_T == 1).sum()),
            gap=_gap(now.residual_T, now.usable_T, evidence),
            fixed=fixed,
            noise_floor=floor.as_dict()
            | {"batch_shape_rms": self.scorer.batch_shape_noise(usable_rows(setting)[:NOISE_ROWS], setting.case)},
            judgement={n: getattr(verdict, n) for n in verdict.__dataclass_fields__},
            causes=tuple(replace(c, settings=(label,)) for c in causes),
            unexplained=unexplained,
            ambiguous=found.ambiguous if outcome == "mismatch" else (),
            ruled_out=tuple(ruled_out),
            untested=untested,
            kept_mass=float(scores.log_kept_mass_T.double().exp().mean()) if setting.case.processed.truncates else None,
            points=_points(evidence, now),
        )


def _gap(residual_T: torch.Tensor, usable_T: torch.Tensor, evidence: Evidence) -> dict[str, object]:
    """Diagnostics of a residual over its usable tokens."""
    if not bool(usable_T.any()):
        return {}
    engine_T = evidence.tokens.engine_T[usable_T]
    return diagnose(engine_T + residual_T[usable_T], engine_T, evidence.tokens.row_T[usable_T]).as_dict()


def _edges(evidence: Evidence, edge_T: torch.Tensor) -> tuple[dict[str, int], ...]:
    tokens = evidence.tokens
    return tuple(
        {"line": tokens.lines[int(tokens.row_T[t])], "token": int(tokens.position_T[t]), "id": int(tokens.targets_T[t])}
        for t in edge_T.nonzero()[:, 0].tolist()
    )


def _causes(found: Attribution) -> list[Cause]:
    return [
        Cause(
            id=f.hypothesis.id, layer=f.hypothesis.layer, title=f.hypothesis.title, confidence=f.confidence,
            explained=f.explained, fix=f.hypothesis.fix, evidence=f.detail,
        )
        for f in found.findings
    ]  # fmt: skip


def _unexplained(found: Attribution) -> dict[str, object] | None:
    """What is left after the causes, and in whose layer it must be looked for."""
    left = found.judgement
    if not left.reasons:
        return None
    numeric = left.rms < 10 * found.floor.rms
    return {
        "layer": "inference" if numeric else "unknown",
        "text": "numeric, unexplained" if numeric else "unexplained: too large for rounding; weights or inputs differ",
        "rms": left.rms,
        "floor_rms": found.floor.rms,
        "reasons": list(left.reasons),
    }


def _points(evidence: Evidence, now: Residual) -> Points:
    """What the figures are drawn from."""
    tokens, usable_T = evidence.tokens, now.usable_T
    return Points(
        engine=tuple(tokens.engine_T[usable_T].tolist()),
        trainer=tuple((tokens.engine_T + now.residual_T)[usable_T].tolist()),
        position=tuple(tokens.position_T[usable_T].tolist()),
        line=tuple(tokens.lines[int(r)] for r in tokens.row_T[usable_T]),
    )


def _empty(setting: Setting, verdict: str, why: str, causes: tuple[Cause, ...]) -> SettingReport:
    label = setting.case.label()
    return SettingReport(
        label=label, verdict=verdict, why=why, rows=len(setting.rows), tokens=0, edge_tokens=(), singleton_tokens=0,
        gap={}, fixed=None, noise_floor={}, judgement={}, causes=tuple(replace(c, settings=(label,)) for c in causes),
        unexplained=None, ambiguous=(), ruled_out=(), untested={}, kept_mass=None,
    )  # fmt: skip
