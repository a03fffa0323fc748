"""`trueup check --trace`: from a log and a checkpoint to a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trueup import env
from trueup.errors import ModelError, RecordError
from trueup.parity.attribution import EDGE_ALLOWANCE, Attribution, Attributor
from trueup.parity.compare import residual
from trueup.parity.evidence import ENGINE, REFERENCE, TRAINER, Case, EngineModel, Evidence
from trueup.parity.floor import Floor, Judgement, Limits, judge, predict
from trueup.parity.hypotheses import all_hypotheses
from trueup.parity.invariants import broken_invariants, positive_logprobs, well_formed
from trueup.parity.recipe import lint, recipe_of_engine
from trueup.parity.report import Cause, ParityReport, SettingReport
from trueup.parity.scorer import Arithmetic, Scorer
from trueup.policy.diagnostics import diagnose
from trueup.trace import Trace, TraceRow, read_trace
from trueup.types import LogprobKind, parse_sampling

FIT_TOKENS = 320
"""Enough to tell candidates apart, few enough to scan temperatures quickly."""
NOISE_ROWS = 2
FP64_ROWS = 3
"""Rows a setting for the float64 reference pass of a float32 check, and for the batch-shape noise."""

LOG_CANNOT_SHOW = {
    "W1": "a log has one set of logprobs; needs the live engine or older checkpoints",
    "W12": "needs the live engine: cached against salted prefix",
    "I2": "needs the engine's own A/B of head precision",
    "I3": "needs the live engine: alone against batched",
    "I4": "needs the live engine: generation against scoring",
    "I15": "needs the live engine: repeated requests",
    "R1": "the trainer here runs in evaluation mode",
}


@dataclass(frozen=True, kw_only=True)
class TraceCheck:
    """What to check and how; every field is a knob of `CheckConfig`."""

    trace: Path
    model: Path
    trainer: str = "processed"
    dtype: str = "auto"
    head: str = "float32"
    device: str = "cpu"
    batch_rows: int = 16
    max_rows: int | None = None
    limits: Limits = Limits()


TRAINERS = {
    "processed": LogprobKind.PROCESSED,
    "tempered": LogprobKind.TEMPERED,
    "raw": LogprobKind.RAW,
    "trl": LogprobKind.TEMPERED,
    "verl": LogprobKind.TEMPERED,
}
"""What a named trainer computes: TRL and verl divide logits by T and ignore top-p, top-k, min-p and penalties."""


@dataclass(frozen=True, kw_only=True)
class _Setting:
    case: Case
    rows: tuple[TraceRow, ...]


def _dtype(name: str) -> torch.dtype | None:
    return {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
            "float32": torch.float32, "fp32": torch.float32, "float": torch.float32}.get(name.removeprefix("torch."))  # fmt: skip


def arithmetic(check: TraceCheck, rows: Sequence[TraceRow], checkpoint: torch.dtype) -> tuple[Arithmetic, Arithmetic]:
    """Return (trainer, engine) precision: the engine's as its flags declare, else the checkpoint's.

    The trainer follows the engine's body unless `dtype` names one; its head is `head`. An engine multiplies its head
    in the body's dtype unless it declares head_dtype float32.
    """
    flags = rows[0].engine.flags
    declared = flags.get("dtype")
    body = (_dtype(str(declared)) if declared not in (None, "auto") else None) or checkpoint
    overrides = flags.get("hf_overrides")
    head_flag = flags.get("head_dtype") or (overrides.get("head_dtype") if isinstance(overrides, dict) else None)
    engine_head = torch.float32 if torch.float32 in (body, _dtype(str(head_flag))) else torch.bfloat16
    trainer_body = body if check.dtype == "auto" else _dtype(check.dtype)
    head = _dtype(check.head)
    if trainer_body is None or head not in (torch.float32, torch.bfloat16):
        raise ModelError(f"dtype {check.dtype!r} or head {check.head!r} is not one of float32, bfloat16, float16")
    trainer_head = head if trainer_body != torch.float32 else torch.float32
    return Arithmetic(body=trainer_body, head=trainer_head), Arithmetic(body=body, head=engine_head)


def group(trace: Trace, kind: LogprobKind, problems: list[str]) -> list[_Setting]:
    """Group rows by engine and sampling; rows whose sampling cannot be read are reported and left out."""
    groups: dict[tuple[object, ...], list[TraceRow]] = {}
    cases: dict[tuple[object, ...], Case] = {}
    for row in trace.rows:
        try:
            sampling, unmodelled = parse_sampling(row.sampling)
        except RecordError as error:
            problems.append(f"line {row.line}: {error}; row left out")
            continue
        shape = replace(sampling, max_tokens=None, seed=None, stop=())
        key = (row.engine.title(), repr(sorted(row.engine.flags.items(), key=str)), shape, unmodelled)
        groups.setdefault(key, []).append(row)
        cases[key] = Case(
            engine=row.engine, sampling=shape, trainer=kind, unmodelled=unmodelled, declared_digest=row.model_digest
        )
    temperatures = {c.sampling.temperature for c in cases.values()}
    return [
        _Setting(case=replace(cases[k], other_temperatures=tuple(sorted(temperatures))), rows=tuple(groups[k]))
        for k in groups
    ]


def _halves(rows: Sequence[TraceRow]) -> tuple[list[TraceRow], list[TraceRow]]:
    """Split into a fitting half (capped at FIT_TOKENS) and a held-back half, by alternating rows."""
    fit, tokens = [], 0
    for row in rows[::2]:
        if tokens < FIT_TOKENS or not fit:
            fit.append(row)
            tokens += len(row.completion_token_ids)
    return fit, list(rows[1::2]) or fit


class TraceChecker:
    """Runs one check; `announce` receives a line whenever something that takes seconds starts."""

    def __init__(self, check: TraceCheck, *, announce: Callable[[str], None] = lambda message: None) -> None:
        self.check, self.announce = check, announce
        self.problems: list[str] = []
        self.notes: list[str] = []

    def run(self) -> ParityReport:
        """Read, score, judge, attribute. Raises TrueupError when nothing can be tested."""
        started = time.monotonic()
        check = self.check
        self.announce(f"reading {check.trace}")
        trace = read_trace(check.trace)
        self.problems += [f"line {p.line}: {p.message}" + ("; row left out" if p.dropped else "") for p in trace.problems]
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
        settings = [replace(s, case=replace(s.case, trainer_digest=digest)) for s in settings]
        self._prefetch(scorer, settings)
        reports = [self._setting(scorer, s) for s in settings]
        return self._assemble(trace, scorer, settings, reports, digest, started)

    def _usable(self, setting: _Setting) -> list[TraceRow]:
        return [r for r in setting.rows if well_formed(r)]

    def _reference_rows(self, scorer: Scorer, rows: list[TraceRow]) -> list[TraceRow]:
        return rows[:FP64_ROWS] if scorer.reference.body == torch.float64 else rows

    def _prefetch(self, scorer: Scorer, settings: Sequence[_Setting]) -> None:
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

    def _floor(self, scorer: Scorer, setting: _Setting, model: EngineModel) -> Floor:
        rows = self._reference_rows(scorer, self._usable(setting))
        evidence = scorer.evidence(setting.case, rows)
        trainer, engine, reference = (evidence.scores(s, model.dist).logprobs_T for s in (TRAINER, ENGINE, REFERENCE))
        basis = (
            f"trainer ({scorer.trainer.title()}) and engine ({scorer.engine.title()}) against "
            f"{scorer.reference.title()}, taken as independent"
        )
        return predict(trainer, engine, reference, basis=basis, min_floor=self.check.limits.min_floor)

    def _setting(self, scorer: Scorer, setting: _Setting) -> SettingReport:
        self.announce(f"judging {setting.case.label()}")
        broken = [
            Cause(id=b.id, layer=b.layer, title=b.title, confidence="high", explained=None, fix=b.fix, evidence=b.detail)
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

        verdict = judge(now.residual_T.masked_fill(~now.usable_T, torch.nan), now.row_T, floor_of(base), self.check.limits)
        wrong_edges = now.edge_share > self.check.limits.edge_share
        positive = positive_logprobs(rows)
        mismatch = bool(verdict.reasons) or wrong_edges or positive > 0
        fit, held = (scorer.evidence(setting.case, half) for half in _halves(rows))
        found = Attributor(
            fit=fit, held=held, hypotheses=all_hypotheses(), floor_of=floor_of, limits=self.check.limits
        ).run(mismatch=mismatch and verdict.enough)
        causes = [*broken, *_causes(found)] if mismatch and verdict.enough else broken
        reasons = [*verdict.reasons]
        if wrong_edges:
            reasons.append(f"{now.edge_share:.1%} of tokens lie outside the trainer's kept set")
        if positive:
            reasons.append(f"{positive} logprobs are above 0")
        return self._report(scorer, setting, evidence, base, verdict, floor_of(base), found, causes, reasons)

    def _report(
        self, scorer: Scorer, setting: _Setting, evidence: Evidence, base: EngineModel, verdict: Judgement,
        floor: Floor, found: Attribution, causes: list[Cause], reasons: list[str],
    ) -> SettingReport:  # fmt: skip
        now = residual(evidence, base)
        outcome = "mismatch" if causes or (reasons and verdict.enough) else "agree"
        why = "; ".join(reasons) or "within the predicted floor"
        if outcome == "agree" and not verdict.enough:
            outcome, why = "inconclusive", f"{verdict.tokens} tokens are too few ({self.check.limits.min_tokens} needed)"
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
                fixed = _gap(left.residual_T, left.usable_T, evidence, found.model, scorer)
            unexplained = _unexplained(found, verdict)
        return SettingReport(
            label=label,
            verdict=outcome,
            why=why,
            rows=len(setting.rows),
            tokens=verdict.tokens,
            edge_tokens=_edges(evidence, now.edge_T),
            singleton_tokens=int((scores.kept_T == 1).sum()),
            gap=_gap(now.residual_T, now.usable_T, evidence, base, scorer),
            fixed=fixed,
            noise_floor=floor.as_dict() | {"batch_shape_rms": scorer.batch_shape_noise(self._usable(setting)[:NOISE_ROWS], setting.case)},
            judgement={n: getattr(verdict, n) for n in verdict.__dataclass_fields__},
            causes=tuple(replace(c, settings=(label,)) for c in causes),
            unexplained=unexplained,
            ambiguous=found.ambiguous if outcome == "mismatch" else (),
            ruled_out=found.ruled_out,
            untested=untested,
            kept_mass=float(scores.log_kept_mass_T.double().exp().mean()) if setting.case.processed.truncates else None,
        )

    def _assemble(
        self, trace: Trace, scorer: Scorer, settings: Sequence[_Setting], reports: list[SettingReport],
        digest: str, started: float,
    ) -> ParityReport:  # fmt: skip
        causes = _merge(reports)
        mismatch = any(r.verdict == "mismatch" for r in reports)
        declared = {s.case.declared_digest for s in settings} - {None, digest}
        if declared and mismatch:
            causes = [_wrong_weights(str(next(iter(declared))), digest), *causes]
        elif declared:
            self.notes.append("the trace declares another weight digest than the checkpoint's, yet the logprobs agree (re-saved?)")
        if any(r.sampling.get("temperature") == 0 for r in trace.rows):
            self.notes.append("greedy rows are compared at T=1, before the argmax: a processed logprob at T=0 is not defined")
        ruled_out = sorted(set.intersection(*(set(r.ruled_out) for r in reports)) if reports else set(), key=_order)
        named = {c.id for c in causes}
        tested = {i for r in reports for i in r.ruled_out} | named
        untested = {i: w for r in reports for i, w in r.untested.items() if i not in tested} | LOG_CANNOT_SHOW
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


def _gap(residual_T: torch.Tensor, usable_T: torch.Tensor, evidence: Evidence, model: EngineModel, scorer: Scorer) -> dict[str, object]:
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


def _unexplained(found: Attribution, verdict: Judgement) -> dict[str, object] | None:
    """What is left after the causes, and in whose layer it must be looked for."""
    left = found.judgement
    if left.within or not left.tokens:
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


def _empty(setting: _Setting, verdict: str, why: str, causes: tuple[Cause, ...]) -> SettingReport:
    label = setting.case.label()
    return SettingReport(
        label=label, verdict=verdict, why=why, rows=len(setting.rows), tokens=0, edge_tokens=(), singleton_tokens=0,
        gap={}, fixed=None, noise_floor={}, judgement={}, causes=tuple(replace(c, settings=(label,)) for c in causes),
        unexplained=None, ambiguous=(), ruled_out=(), untested={}, kept_mass=None,
    )  # fmt: skip


def check_trace(check: TraceCheck, *, announce: Callable[[str], None] = lambda message: None) -> ParityReport:
    """Check a recorded trace against a checkpoint. Raises TrueupError when nothing can be tested at all."""
    return TraceChecker(check, announce=announce).run()
