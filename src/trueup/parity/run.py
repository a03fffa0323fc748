"""`trueup check --trace`: from a log and a checkpoint to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trueup import env
from trueup.config import CheckConfig
from trueup.errors import ConfigError, ModelError, RecordError, TraceError
from trueup.parity.against import compare_against
from trueup.parity.attribution import Attribution, Attributor
from trueup.parity.compare import residual
from trueup.parity.evidence import ENGINE, REFERENCE, TRAINER, EngineModel, Evidence
from trueup.parity.floor import Floor, Judgement, judge, predict
from trueup.parity.grouping import Setting, arithmetic, group, halves
from trueup.parity.hypotheses import all_hypotheses
from trueup.parity.invariants import INVARIANTS, broken_invariants, positive_logprobs, well_formed
from trueup.parity.logged_trainer import describe, rows_with_trainer
from trueup.parity.recipe import TRAINERS, lint, recipe_of_engine
from trueup.parity.report import Cause, ParityReport, SettingReport
from trueup.parity.scorer import Arithmetic, Scorer
from trueup.policy.diagnostics import diagnose
from trueup.trace import Trace, TraceRow, read_trace

NOISE_ROWS = 2
"""Rows a setting that are also scored one at a time, for the trainer's batch-shape noise."""
FP64_TOKENS = 384
"""Tokens a setting, at least, that a float32 check also scores in float64."""
LIMITS_VOCABULARY = 49_152
"""Vocabulary the smallest floor and bias were measured with; a plain log_softmax errs in proportion to its length."""

NOT_IN_A_LOG = "a log cannot show it"
LOG_CANNOT_SHOW = dict.fromkeys(("W1", "W3", "W12", "I3", "I4", "I5", "I15"), NOT_IN_A_LOG) | {
    "I2": "needs the engine's own A/B of head precision",
    "R1": "the trainer is run in evaluation mode here",
}


class TraceChecker:
    """Runs one check; `announce` receives a line whenever something that takes seconds starts."""

    def __init__(self, check: CheckConfig, *, announce: Callable[[str], None] = lambda message: None) -> None:
        self.check, self.announce = check, announce
        self.problems: list[str] = []
        self.notes: list[str] = []

    def run(self) -> ParityReport:
        """Read, score, judge, attribute. Raises TrueupError when nothing can be tested."""
        started = time.monotonic()
        check = self.check
        assert check.trace is not None and check.model is not None
        self.announce(f"reading {check.trace}")
        trace = read_trace(check.trace)
        self.problems += [
            f"line {p.line}: {p.message}" + ("; row left out" if p.dropped else "") for p in trace.problems
        ]
        settings = group(trace, TRAINERS[check.trainer], self.problems)
        if not settings:
            raise RecordError(f"no row of {check.trace} has readable sampling parameters: {self.problems[0]}")
        if check.max_rows:
            settings = [replace(s, rows=s.rows[: check.max_rows]) for s in settings]
        scorer = Scorer(
            path=check.model, trainer=Arithmetic(body=torch.float32, head=torch.float32),
            engine=Arithmetic(body=torch.float32, head=torch.float32), batch_rows=check.batch_rows,
            device=check.device, announce=self.announce,
        )  # fmt: skip
        scorer.trainer, scorer.engine = arithmetic(check, trace.rows, scorer.dtype())
        digest = scorer.digest()
        settings = self._drop_unfit(scorer, settings)
        scale = max(1.0, scorer.model(scorer.trainer.body).vocab_size / LIMITS_VOCABULARY)
        smallest = {name: scale * getattr(check.limits, name) for name in ("min_floor", "min_bias")}
        self.limits = check.limits.model_copy(update=smallest)
        settings = [replace(s, case=replace(s.case, trainer_digest=digest)) for s in settings]
        self._prefetch(scorer, settings)
        reports = [self._setting(scorer, s) for s in settings]
        return self._assemble(trace, scorer, settings, reports, digest, started)

    def _usable(self, setting: Setting) -> list[TraceRow]:
        return [r for r in setting.rows if well_formed(r)]

    def _reference_rows(self, scorer: Scorer, rows: list[TraceRow]) -> list[TraceRow]:
        """Rows the floor is predicted on: all, or for a float64 reference evenly spread ones up to a token budget."""
        if scorer.reference.body != torch.float64:
            return rows
        tokens = sum(len(r.completion_token_ids) for r in rows)
        step = max(1, tokens // FP64_TOKENS)
        return rows[::step]

    def _drop_unfit(self, scorer: Scorer, settings: Sequence[Setting]) -> list[Setting]:
        """Leave out, and report, rows the model cannot score. Raises ModelError when none is left."""
        kept = []
        for setting in settings:
            reasons = {r.line: why for r in self._usable(setting) if (why := scorer.unfit(r))}
            self.problems += [f"line {line}: {why}; row left out" for line, why in reasons.items()]
            rows = tuple(r for r in setting.rows if r.line not in reasons)
            if rows:
                kept.append(replace(setting, rows=rows))
        if not kept:
            raise ModelError(self.problems[-1].removesuffix("; row left out"))
        return kept

    def _prefetch(self, scorer: Scorer, settings: Sequence[Setting]) -> None:
        """Run the forward passes of all settings precision by precision, so that each model is loaded once."""
        rows = [r for s in settings for r in self._usable(s)]
        if not rows:
            return
        noise = [r for s in settings for r in self._usable(s)[:NOISE_ROWS]]
        for source in (TRAINER, ENGINE):
            scorer.states(source, rows)
            scorer.head(source)
        scorer.states(TRAINER, noise, batch_rows=1)
        scorer.states(REFERENCE, [r for s in settings for r in self._reference_rows(scorer, self._usable(s))])
        scorer.head(REFERENCE)

    def _floor(self, scorer: Scorer, setting: Setting, model: EngineModel) -> Floor:
        rows = self._reference_rows(scorer, self._usable(setting))
        evidence = scorer.evidence(setting.case, rows)
        trainer, engine, reference = (evidence.scores(s, model.dist).logprobs_T for s in (TRAINER, ENGINE, REFERENCE))
        basis = (
            f"trainer ({scorer.trainer.title()}) and engine ({scorer.engine.title()}) against "
            f"{scorer.reference.title()}, taken as independent"
        )
        return predict(trainer, engine, reference, basis=basis, min_floor=self.limits.min_floor)

    def _setting(self, scorer: Scorer, setting: Setting) -> SettingReport:
        self.announce(f"judging {setting.case.label()}")
        broken = [
            Cause(
                id=b.id, layer=b.layer, title=b.title, confidence="high", explained=None, fix=b.fix, evidence=b.detail
            )
            for b in broken_invariants(setting.rows)
        ]
        rows = self._usable(setting)
        if not rows:
            return _empty(setting, "mismatch" if broken else "inconclusive", "no row could be compared", tuple(broken))
        evidence = scorer.evidence(setting.case, rows)
        base = EngineModel(dist=setting.case.trainer_distribution)
        now = residual(evidence, base)
        floors: dict[object, Floor] = {}

        def floor_of(model: EngineModel) -> Floor:
            if model.dist not in floors:
                floors[model.dist] = self._floor(scorer, setting, model)
            return floors[model.dist]

        verdict = judge(now.residual_T.masked_fill(~now.usable_T, torch.nan), now.row_T, floor_of(base), self.limits)
        wrong_edges = now.edge_share > self.limits.edge_share
        positive = positive_logprobs(rows)
        judged = verdict.tokens + int(now.edge_T.sum())
        enough = verdict.enough or (wrong_edges and judged >= self.limits.min_tokens)
        mismatch = enough and (bool(verdict.reasons) or wrong_edges or positive > 0)
        logged = rows_with_trainer(rows)
        if logged and (note := describe(scorer.evidence(setting.case, logged), logged, floor_of(base).rms)):
            self.notes.append(note)
        fit, held = (replace(scorer.evidence(setting.case, half), whole=evidence) for half in halves(rows))
        held = held if len(rows) > 1 else fit
        found = Attributor(fit=fit, held=held, hypotheses=all_hypotheses(), floor_of=floor_of, limits=self.limits).run(
            mismatch=mismatch
        )
        causes = [*broken, *_causes(found)] if mismatch else broken
        reasons = [*verdict.reasons]
        if wrong_edges:
            reasons.append(f"{now.edge_share:.1%} of tokens lie outside the trainer's kept set")
        if positive:
            reasons.append(f"{positive} logprobs are above 0")
        return self._report(scorer, setting, evidence, base, verdict, floor_of(base), found, causes, reasons, enough)

    def _report(
        self, scorer: Scorer, setting: Setting, evidence: Evidence, base: EngineModel, verdict: Judgement,
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
            | {"batch_shape_rms": scorer.batch_shape_noise(self._usable(setting)[:NOISE_ROWS], setting.case)},
            judgement={n: getattr(verdict, n) for n in verdict.__dataclass_fields__},
            causes=tuple(replace(c, settings=(label,)) for c in causes),
            unexplained=unexplained,
            ambiguous=found.ambiguous if outcome == "mismatch" else (),
            ruled_out=(*found.ruled_out, *(i for i in INVARIANTS if i not in {c.id for c in causes})),
            untested=untested,
            kept_mass=float(scores.log_kept_mass_T.double().exp().mean()) if setting.case.processed.truncates else None,
        )

    def _assemble(
        self, trace: Trace, scorer: Scorer, settings: Sequence[Setting], reports: list[SettingReport],
        digest: str, started: float,
    ) -> ParityReport:  # fmt: skip
        causes = _merge(reports)
        declared = {s.case.declared_digest for s in settings} - {None, digest}
        if declared and any(r.unexplained for r in reports):
            causes = [_wrong_weights(str(next(iter(declared))), digest), *causes]
        elif declared:
            self.notes.append(
                "the trace declares another weight digest than the checkpoint's, yet the numbers fit (re-saved?)"
            )
        if any(r.sampling.get("temperature") == 0 for r in trace.rows):
            self.notes.append(
                "greedy rows are compared at T=1, before the argmax: a processed logprob at T=0 is not defined"
            )
        ruled_out = sorted(set.intersection(*(set(r.ruled_out) for r in reports)) if reports else set(), key=_order)
        named = {c.id for c in causes}
        tested = {i for r in reports for i in r.ruled_out} | named
        reasons: dict[str, dict[str, None]] = {}
        for cause_id, why in (item for r in reports for item in r.untested.items() if item[0] not in tested):
            reasons.setdefault(cause_id, {})[why] = None
        untested = {i: ", or ".join(why) for i, why in reasons.items()} | LOG_CANNOT_SHOW
        advice = {
            (a.id, a.message): a.as_dict()
            for s in settings
            for a in lint(recipe_of_engine(s.case.engine, s.case.sampling, s.case.trainer))
        }
        header = {
            "trace": str(trace.path), "model": str(self.check.model), "digest": digest,
            "engine": sorted({r.engine.title() for r in trace.rows}), "engine_arithmetic": scorer.engine.title(),
            "flags": dict(trace.rows[0].engine.flags), "trainer": self.check.trainer,
            "trainer_arithmetic": scorer.trainer.title(), "rows": len(trace.rows),
            "tokens": sum(r.tokens for r in reports), "environment": env.describe(),
        }  # fmt: skip
        return ParityReport(
            header=header, settings=tuple(reports), causes=tuple(causes), notes=tuple(self.notes),
            problems=tuple(self.problems), untested=dict(sorted(untested.items(), key=lambda kv: _order(kv[0]))),
            ruled_out=tuple(i for i in ruled_out if i not in named), seconds=time.monotonic() - started,
            recipe=tuple(advice.values()),
        )  # fmt: skip


def _order(cause_id: str) -> tuple[int, int]:
    return "STWIRO".index(cause_id[0]), int(cause_id[1:])


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


def _merge(reports: Sequence[SettingReport]) -> list[Cause]:
    """One entry a cause id, with the settings it was found in, ranked by how much it explains where it was found."""
    merged: dict[str, Cause] = {}
    for report in reports:
        for cause in report.causes:
            known = merged.get(cause.id)
            best = cause if known is None or (cause.explained or 0) > (known.explained or 0) else known
            places = (known.settings if known else ()) + cause.settings
            merged[cause.id] = replace(best, settings=places)
    return sorted(merged.values(), key=lambda c: (-len(c.settings), -(c.explained or 1.0)))


def _wrong_weights(declared: str, actual: str) -> Cause:
    return Cause(
        id="W16", layer="weights", title="the engine served another checkpoint than the trainer's", confidence="high",
        explained=None, fix="serve the checkpoint the trainer starts from (path, revision, dtype)",
        evidence=f"the trace declares weights {declared[:12]}, the checkpoint has {actual[:12]}",
    )  # fmt: skip


def _empty(setting: Setting, verdict: str, why: str, causes: tuple[Cause, ...]) -> SettingReport:
    label = setting.case.label()
    return SettingReport(
        label=label, verdict=verdict, why=why, rows=len(setting.rows), tokens=0, edge_tokens=(), singleton_tokens=0,
        gap={}, fixed=None, noise_floor={}, judgement={}, causes=tuple(replace(c, settings=(label,)) for c in causes),
        unexplained=None, ambiguous=(), ruled_out=(), untested={}, kept_mass=None,
    )  # fmt: skip


def check_trace(check: CheckConfig, *, announce: Callable[[str], None] = lambda message: None) -> ParityReport:
    """Check a recorded trace against a checkpoint, and against another trace or a report if `check.against` names one.

    Raises TrueupError when nothing can be tested at all.
    """
    if check.trace is None:
        raise ConfigError("check needs --trace FILE (a recorded trueup.trace/1 log)")
    if check.model is None:
        raise ConfigError("check needs --model PATH (the trainer's checkpoint; `trueup model smollm2 DIR` makes one)")
    against = Path(check.against) if check.against else None
    if against is not None and not against.is_file():
        raise TraceError(f"--against {against} does not exist")
    report = TraceChecker(check, announce=announce).run()
    if against is not None:
        report = replace(report, against=compare_against(report, check, against))
    return report
