"""`--against`: two engines on the same tokens, or today's report against a committed baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from trueup.config import LimitsConfig
from trueup.errors import TraceError, TrueupError
from trueup.parity.evidence import Tokens
from trueup.parity.floor import Floor, judge
from trueup.parity.invariants import well_formed
from trueup.parity.report import SCHEMA, ParityReport
from trueup.policy.diagnostics import diagnose
from trueup.trace import TraceRow, read_trace
from trueup.types import parse_sampling

BASELINE_FACTOR = 1.25
"""Rms growth over a baseline that counts as a regression."""


def _key(row: TraceRow) -> tuple[object, ...]:
    sampling, _ = parse_sampling(row.sampling)
    return row.prompt_token_ids, repr(sampling)


def shared_tokens(
    first: Sequence[TraceRow], second: Sequence[TraceRow]
) -> tuple[list[TraceRow], list[tuple[float, ...]]]:
    """Pair rows of two traces with equal prompt and sampling, cut to their common completion prefix.

    The first token after which two completions differ still has the same context on both sides, but it is another
    token, so it is cut too. Returns (rows of the first, logprobs of the second).
    """
    waiting: dict[tuple[object, ...], list[TraceRow]] = {}
    for row in second:
        if well_formed(row):
            waiting.setdefault(_key(row), []).append(row)
    rows, logprobs = [], []
    for row in first:
        others = waiting.get(_key(row)) if well_formed(row) else None
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


def against_trace(report: ParityReport, path: Path, other: Path, limits: LimitsConfig) -> dict[str, object]:
    """Compare two engines' logprobs directly on the tokens both produced. Raises TraceError if there are none."""
    rows, theirs = shared_tokens(read_trace(path).rows, read_trace(other).rows)
    if not rows:
        raise TraceError(f"{path} and {other} share no tokens (same prompt, sampling and completion prefix)")
    tokens = Tokens.of(rows)
    other_T = torch.tensor([v for values in theirs for v in values], dtype=torch.float64)
    usable_T = torch.isfinite(tokens.engine_T) & torch.isfinite(other_T)
    if not bool(usable_T.any()):
        raise TraceError(f"{path} and {other} share no token with two finite logprobs")
    rms = [s.noise_floor.get("engine_rms") for s in report.settings]
    engine_rms = max((r for r in rms if isinstance(r, float) and r == r), default=0.0)
    floor_rms = max(limits.min_floor, engine_rms * 2**0.5)
    floor = Floor(
        rms=floor_rms, trainer_rms=engine_rms, engine_rms=engine_rms, q99_abs=3 * floor_rms, basis="two engines"
    )
    verdict = judge((other_T - tokens.engine_T).masked_fill(~usable_T, torch.nan), tokens.row_T, floor, limits)
    outcome = "inconclusive" if not verdict.enough else "mismatch" if verdict.reasons else "agree"
    gap = diagnose(other_T[usable_T], tokens.engine_T[usable_T], tokens.row_T[usable_T])
    why = "; ".join(verdict.reasons) or ("within two engines' floor" if verdict.enough else "too few shared tokens")
    measured = f"{gap.tokens} shared tokens, mean |r| {gap.mean_abs:.3g}, rms {gap.rms:.3g}, floor {floor_rms:.3g}"
    text = f"{outcome} with {other}: {measured} ({why})"
    return {"kind": "trace", "path": str(other), "verdict": outcome, "gap": gap.as_dict(), "text": text}


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
    outcome = "mismatch" if changes else "agree" if compared else "inconclusive"
    text = f"{outcome} with baseline {other}: " + ("; ".join(changes) or f"{compared} settings compared, none worse")
    return {"kind": "baseline", "path": str(other), "verdict": outcome, "changes": changes, "text": text}


def compare_against(report: ParityReport, path: Path, other: Path, limits: LimitsConfig) -> dict[str, object]:
    """Dispatch on what `other` is: a .json report, else a trace."""
    if other.suffix == ".json":
        return against_baseline(report, other)
    return against_trace(report, path, other, limits)
