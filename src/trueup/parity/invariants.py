"""What must hold in a log before any logprob is compared: lengths, ids, finite numbers. Needs no model.

A broken invariant is a cause with a name: T2 (length), I11 (non-finite); rows that break one are counted and left out
of the numbers that follow, never repaired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trueup.errors import RecordError
from trueup.parity.sides import ENGINE, LOG
from trueup.trace import TraceRow
from trueup.types import LOGPROB_SLACK


@dataclass(frozen=True, kw_only=True)
class Broken:
    """One broken invariant over a set of rows."""

    id: str
    layer: str
    title: str
    fix: str
    detail: str
    rows: int
    side: str = LOG


NULL = (
    "logprobs are missing from the log (null)",
    "log the number that belongs to each completion token; the first of prompt_logprobs is null and describes none",
)
NOT_FINITE = (
    "engine reports logprobs that are not finite",
    "find the NaN or infinity in the engine (weights after an update, overflow in fp16); do not fill it in",
)
INVARIANTS = ("T2", "I11")
"""Ids of the causes that are broken invariants."""


def well_formed(row: TraceRow) -> bool:
    """Whether entry t of the logprobs can describe completion token t at all."""
    return len(row.completion_logprobs) == len(row.completion_token_ids) > 0


def _lengths(rows: Sequence[TraceRow]) -> Broken | None:
    wrong = [r for r in rows if len(r.completion_logprobs) != len(r.completion_token_ids)]
    if not wrong:
        return None
    first = wrong[0]
    differences = sorted({len(r.completion_logprobs) - len(r.completion_token_ids) for r in wrong})
    return Broken(
        id="T2",
        layer="tokenization",
        title="number of logprobs differs from number of tokens",
        fix="take ids and logprobs from the same response (return_token_ids), one entry a token",
        detail=f"{len(wrong)} of {len(rows)} rows, difference {', '.join(f'{d:+d}' for d in differences[:5])}; "
        f"line {first.line}: {len(first.completion_logprobs)} logprobs, {len(first.completion_token_ids)} tokens",
        rows=len(wrong),
    )


def _non_finite(rows: Sequence[TraceRow]) -> Broken | None:
    wrong = [(r, i) for r in rows for i, v in enumerate(r.completion_logprobs) if not math.isfinite(v)]
    if not wrong:
        return None
    row, position = wrong[0]
    tokens = sum(len(r.completion_logprobs) for r in rows)
    null = all(i in r.null_logprobs for r, i in wrong)
    title, fix = NULL if null else NOT_FINITE
    return Broken(
        id="I11",
        layer="inference",
        title=title,
        fix=fix,
        detail=f"{len(wrong)} of {tokens} tokens; first at line {row.line}, token {position}: "
        f"{'null' if null else row.completion_logprobs[position]}",
        rows=len({r.line for r, _ in wrong}),
        side=LOG if null else ENGINE,
    )


def broken_invariants(rows: Sequence[TraceRow]) -> list[Broken]:
    """Return every broken invariant of a setting's rows."""
    return [b for b in (_lengths(rows), _non_finite(rows)) if b]


def require_logprobs(rows: Sequence[TraceRow]) -> None:
    """Raise RecordError when a column does not hold logprobs but probabilities, or numbers of the wrong sign.

    Zeros are left alone: a token that is certain has logprob 0, and a column of nothing but zeros is named (S9).
    """
    for name in ("completion_logprobs", "trainer_logprobs"):
        values = [v for r in rows for v in getattr(r, name) or () if math.isfinite(v)]
        if not values or min(values) < 0 or max(values) <= LOGPROB_SLACK:
            continue
        line = next(r.line for r in rows if any(v > LOGPROB_SLACK for v in getattr(r, name) or ()))
        if max(values) <= 1:
            kind, advice = "lies between 0 and 1: these look like probabilities", "write their natural logarithms"
        else:
            kind = "is positive: these look like negative log-likelihoods, or like logits"
            advice = "turn the signs of the former, and have logprobs reported instead of the latter"
        raise RecordError(
            f"{name} holds no logprobs: every one of {len(values)} values (first at line {line}) {kind}; {advice}"
        )


def positive_logprobs(rows: Sequence[TraceRow]) -> int:
    """Tokens whose logprob exceeds 0 by more than float32 rounding: no probability is above 1."""
    return sum(v > LOGPROB_SLACK for r in rows for v in r.completion_logprobs)
