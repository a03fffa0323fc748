"""`--against`: two engines on the same tokens, or today's report against a committed baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trueup.engines.probe_http import Answer, ProbeClient, read_token
from trueup.errors import EngineError, RecordError, TraceError, TrueupError
from trueup.knobs import CheckConfig
from trueup.model.load import checkpoint_dtype
from trueup.parity.evidence import ENGINE, REFERENCE, TRAINER
from trueup.parity.floor import judge, predict
from trueup.parity.grouping import arithmetic, group
from trueup.parity.invariants import well_formed
from trueup.parity.probes import outcome, paired, scored
from trueup.parity.report import SCHEMA, ParityReport
from trueup.parity.scorer import Scorer
from trueup.trace import TraceRow, read_trace
from trueup.types import LogprobKind, parse_sampling

URLS = ("http://", "https://")
BASELINE_FACTOR = 1.25
"""Rms growth over a baseline that counts as a regression."""


def _key(row: TraceRow) -> tuple[object, ...] | None:
    try:
        sampling, _ = parse_sampling(row.sampling)
    except RecordError:
        return None
    return row.prompt_token_ids, repr(replace(sampling, seed=None, max_tokens=None))


def shared_tokens(
    first: Sequence[TraceRow], second: Sequence[TraceRow]
) -> tuple[list[TraceRow], list[tuple[float, ...]]]:
    """Pair rows of two traces with equal prompt and sampling, cut to their common completion prefix.

    The first token after which two completions differ still has the same context on both sides, but it is another
    token, so it is cut too. Returns (rows of the first, logprobs of the second).
    """
    waiting: dict[tuple[object, ...], list[TraceRow]] = {}
    for row in second:
        if well_formed(row) and (key := _key(row)):
            waiting.setdefault(key, []).append(row)
    rows, logprobs = [], []
    for row in first:
        key = _key(row) if well_formed(row) else None
        others = waiting.get(key) if key else None
        if not others:
            continue
        other = others.pop(0)
        same = 0
        for mine, theirs in zip(row.completion_token_ids, other.completion_token_ids, strict=False):
            if mine != theirs:
                break
            same += 1
        if same:
            rows.append(_cut(row, same))
            logprobs.append(other.completion_logprobs[:same])
    return rows, logprobs


def _cut(row: TraceRow, length: int) -> TraceRow:
    values = {name: getattr(row, name) for name in row.__dataclass_fields__}
    values |= {n: values[n][:length] for n in ("completion_token_ids", "completion_logprobs")}
    return TraceRow(**values)


def against_trace(check: CheckConfig, other: Path) -> dict[str, object]:
    """Compare two engines' logprobs directly on the tokens both produced, setting by setting.

    The floor of a setting is predicted from both declared precisions. Raises TraceError if there are no shared tokens.
    """
    assert check.trace is not None and check.model is not None
    first, second = read_trace(check.trace), read_trace(other)
    rows, theirs = shared_tokens(first.rows, second.rows)
    if not rows:
        raise TraceError(f"{check.trace} and {other} share no tokens (same prompt, sampling and completion prefix)")
    checkpoint = checkpoint_dtype(check.model)
    ours, others = (arithmetic(check, trace.rows, checkpoint)[1] for trace in (first, second))
    scorer = Scorer(path=check.model, trainer=others, engine=ours, batch_rows=check.batch_rows, device=check.device)
    values = {r.line: v for r, v in zip(rows, theirs, strict=True)}
    settings, gaps, verdicts = [], [], set()
    for setting in group(replace(first, rows=tuple(rows)), LogprobKind.PROCESSED, []):
        evidence = scorer.evidence(setting.case, setting.rows)
        dist = setting.case.processed
        sides = [evidence.scores(source, dist).logprobs_T for source in (TRAINER, ENGINE, REFERENCE)]
        row_T, lines = evidence.tokens.row_T, evidence.tokens.lines
        floor = predict(*sides, row_T=row_T, lines=lines, basis="two engines", min_floor=check.limits.min_floor)
        other_T = torch.tensor([v for r in setting.rows for v in values[r.line]], dtype=torch.float64)
        gap_T = other_T - evidence.tokens.engine_T
        verdict = judge(gap_T, row_T, floor, check.limits, lines=lines)
        verdicts.add("inconclusive" if not verdict.enough else "mismatch" if verdict.reasons else "agree")
        gaps.append(gap_T[torch.isfinite(gap_T)])
        why = "; ".join(verdict.reasons) or f"rms {verdict.rms:.3g}, floor {floor.rms:.3g}"
        settings.append(f"{setting.case.label()}: {verdict.tokens} shared tokens, {why}")
    gap_T = torch.cat(gaps)
    outcome = next(v for v in ("mismatch", "inconclusive", "agree") if v in verdicts)
    mean_abs = float(gap_T.abs().mean()) if len(gap_T) else float("nan")
    text = f"{outcome} with {other}: {len(gap_T)} shared tokens, mean |r| {mean_abs:.3g} ({' | '.join(settings)})"
    gap = {"tokens": len(gap_T), "mean_abs": mean_abs}
    return {"kind": "trace", "path": str(other), "verdict": outcome, "gap": gap, "settings": settings, "text": text}


def against_engine(check: CheckConfig, scores: Sequence[TraceRow], limit_rms: float) -> dict[str, object] | None:
    """Another engine's scores of the same tokens, raw at T=1, next to this one's; None if `check` names no URL.

    It gets a bearer token of its own (`against_token_file`), never the first engine's. Raises EngineError when either
    engine cannot score given tokens.
    """
    if not (check.against or "").startswith(URLS):
        return None
    token = None
    if check.against_token_file is not None:
        token = read_token(check.against_token_file)
    other = ProbeClient(str(check.against), token=token, timeout_s=check.request_timeout_s)
    try:
        theirs = scored(other, scores, together=True)
    finally:
        other.close()
    ours = [Answer(ids=r.completion_token_ids, logprobs=r.completion_logprobs) for r in scores]
    probe = outcome("against", paired(theirs, ours), limit_rms, "same tokens, raw at T=1")
    if probe.gap is None or not probe.gap.tokens:
        raise EngineError(f"--against {other.url}: one of the engines does not score given tokens (prompt_logprobs)")
    verdict = "mismatch" if probe.differs else "agree" if probe.compared else "inconclusive"
    text = f"{verdict} with {other.facts.info.title()} at {other.url}: {probe.text}"
    return {"kind": "engine", "path": other.url, "verdict": verdict, "gap": probe.gap.as_dict(), "text": text}


def against_baseline(report: ParityReport, other: Path) -> dict[str, object]:
    """Compare with a committed report: a worse verdict or grown rms is a mismatch. Raises TrueupError if unreadable."""
    try:
        baseline = json.loads(other.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise TrueupError(f"baseline {other} cannot be read: {str(error)[:100]}") from None
    if (
        not isinstance(baseline, dict)
        or baseline.get("schema") != SCHEMA
        or not isinstance(baseline.get("settings"), list)
    ):
        raise TrueupError(f"baseline {other} is no {SCHEMA} report (write one with --json)")
    changes, compared = [], 0
    before = {str(s.get("sampling")): s for s in baseline["settings"] if isinstance(s, dict)}
    for setting in report.settings:
        old = before.get(setting.label)
        if old is None:
            continue
        compared += 1
        if old.get("verdict") == "agree" and setting.verdict != "agree":
            changes.append(f"{setting.label}: agree became {setting.verdict}")
        now_rms = setting.gap.get("rms")
        old_rms = old.get("gap", {}).get("rms") if isinstance(old.get("gap"), dict) else None
        floor = setting.noise_floor.get("rms")
        if not (isinstance(now_rms, float) and isinstance(old_rms, float) and isinstance(floor, float)):
            continue
        if now_rms > BASELINE_FACTOR * max(old_rms, 0.5 * floor):
            changes.append(f"{setting.label}: rms {old_rms:.3g} became {now_rms:.3g}")
    gone = sorted(set(before) - {s.label for s in report.settings})
    outcome = "mismatch" if changes else "agree" if compared and not gone else "inconclusive"
    parts = [*changes, *(f"{label}: in the baseline, not here" for label in gone)]
    text = f"{outcome} with baseline {other}: " + ("; ".join(parts) or f"{compared} settings compared, none worse")
    return {"kind": "baseline", "path": str(other), "verdict": outcome, "changes": changes, "text": text}


def compare_against(report: ParityReport, check: CheckConfig, other: Path) -> dict[str, object]:
    """Dispatch on what `other` is: a .json report, else a trace."""
    return against_baseline(report, other) if other.suffix == ".json" else against_trace(check, other)
