"""The parts of a setting's report: numbers of a gap, causes, what is left, and what figures are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from trueup.parity.compare import Residual
from trueup.parity.evidence import Case, Evidence
from trueup.parity.findings import Attribution
from trueup.parity.floor import Judgement
from trueup.parity.grouping import Setting
from trueup.parity.invariants import broken_invariants
from trueup.parity.report import Cause, Points, SettingReport
from trueup.parity.sides import TRAINER, of_trainer
from trueup.policy.diagnostics import diagnose
from trueup.trace import TraceRow

SHOWN = 5


def gap_of(residual_T: torch.Tensor, usable_T: torch.Tensor, evidence: Evidence) -> dict[str, object]:
    """Diagnostics of a residual over its usable tokens."""
    if not bool(usable_T.any()):
        return {}
    engine_T = evidence.tokens.engine_T[usable_T]
    return diagnose(engine_T + residual_T[usable_T], engine_T, evidence.tokens.row_T[usable_T]).as_dict()


def edges_of(evidence: Evidence, edge_T: torch.Tensor) -> tuple[dict[str, int], ...]:
    """Line, position and id of tokens at the edge of a kept set."""
    tokens = evidence.tokens
    return tuple(
        {"line": tokens.lines[int(tokens.row_T[t])], "token": int(tokens.position_T[t]), "id": int(tokens.targets_T[t])}
        for t in edge_T.nonzero()[:, 0].tolist()
    )


def causes_of(found: Attribution, case: Case, where: str = "") -> list[Cause]:
    """The causes that were found, worded for the side whose numbers they explain; `where` says in which rows."""
    causes = [
        Cause(
            id=f.hypothesis.id, layer=f.hypothesis.layer, title=f.title, confidence=f.confidence,
            explained=f.explained, fix=f.fix, evidence=where + f.detail, side=f.side,
        )
        for f in found.findings
    ]  # fmt: skip
    return [of_trainer(c, case.sampling) for c in causes] if case.side == TRAINER else causes


def broken_causes(rows: Sequence[TraceRow], case: Case) -> list[Cause]:
    """The invariants that rows break, as causes of the side whose numbers they are."""
    causes = [
        Cause(
            id=b.id, layer=b.layer, title=b.title, confidence="high", explained=None, fix=b.fix, evidence=b.detail,
            side=b.side,
        )
        for b in broken_invariants(rows)
    ]  # fmt: skip
    return [of_trainer(c, case.sampling) for c in causes] if case.side == TRAINER else causes


def unexplained_part(found: Attribution, left: Judgement) -> dict[str, object] | None:
    """What is left after the causes, and in whose layer it must be looked for."""
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


def points_of(evidence: Evidence, now: Residual) -> Points:
    """What the figures are drawn from."""
    tokens, usable_T = evidence.tokens, now.usable_T
    return Points(
        engine=tuple(tokens.engine_T[usable_T].tolist()),
        trainer=tuple((tokens.engine_T + now.residual_T)[usable_T].tolist()),
        position=tuple(tokens.position_T[usable_T].tolist()),
        line=tuple(tokens.lines[int(r)] for r in tokens.row_T[usable_T]),
    )


def empty_report(setting: Setting, verdict: str, why: str, causes: tuple[Cause, ...]) -> SettingReport:
    """The report of a setting in which nothing could be compared."""
    label = setting.case.label()
    return SettingReport(
        label=label, verdict=verdict, why=why, rows=len(setting.rows), tokens=0, edge_tokens=(), singleton_tokens=0,
        gap={}, fixed=None, noise_floor={}, judgement={}, causes=tuple(replace(c, settings=(label,)) for c in causes),
        unexplained=None, ambiguous=(), ruled_out=(), untested={}, kept_mass=None,
    )  # fmt: skip


def in_rows(rows: Sequence[TraceRow], odd: Sequence[int]) -> str:
    """Name the rows that a cause affects, and their finish reason if no other row has it."""
    lines = ", ".join(str(rows[i].line) for i in odd[:SHOWN]) + (", ..." if len(odd) > SHOWN else "")
    ends = {rows[i].finish_reason for i in odd}
    others = {r.finish_reason for i, r in enumerate(rows) if i not in set(odd)}
    ended = next(iter(ends)) if len(ends) == 1 and not ends & others else None
    common = f", all those that ended by {ended!r}" if ended is not None else ""
    return f"in {len(odd)} of {len(rows)} rows (lines {lines}{common}): "


def of_sequences(verdict: Judgement, row_T: torch.Tensor) -> dict[str, float]:
    """What a gap per token makes of the longest completion: see SettingReport.sequence."""
    if not len(row_T):
        return {}
    tokens = float(torch.unique(row_T, return_counts=True)[1].max())
    bias = abs(verdict.bias) + 2 * verdict.bias_se
    return {"tokens": tokens, "bias_nats": bias * tokens, "noise_nats": verdict.rms * tokens**0.5}
