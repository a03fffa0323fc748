"""What the user's own trainer computed, where a trace carries its logprobs: which kind, and how far from ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from trueup.parity.evidence import TRAINER, Case, Evidence
from trueup.trace import TraceRow
from trueup.types import LogprobKind


def rows_with_trainer(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Rows whose trainer_logprobs have the completion's length."""
    return [
        r for r in rows if r.trainer_logprobs is not None and len(r.trainer_logprobs) == len(r.completion_token_ids)
    ]


def describe(evidence: Evidence, rows: Sequence[TraceRow], floor_rms: float) -> str | None:
    """Say which kind of logprob the logged trainer computed; None if the trace carries none.

    `rows` are those of `evidence`, all with trainer_logprobs.
    """
    if not rows:
        return None
    logged_T = torch.tensor([v for r in rows for v in r.trainer_logprobs or ()], dtype=torch.float64)
    gaps: dict[LogprobKind, float] = {}
    for kind in LogprobKind:
        case: Case = replace(evidence.case, trainer=kind)
        ours_T = evidence.scores(TRAINER, case.trainer_distribution).logprobs_T.double()
        difference_T = (logged_T - ours_T)[torch.isfinite(logged_T) & torch.isfinite(ours_T)]
        gaps[kind] = float(difference_T.square().mean().sqrt()) if len(difference_T) else float("inf")
    used = evidence.case.trainer
    best = min(gaps, key=lambda kind: (gaps[kind], kind != used))
    label = evidence.case.label()
    if not bool(torch.isfinite(logged_T).any()):
        return f"{label}: the logged trainer logprobs are not finite"
    if gaps[best] > 2 * floor_rms:
        return f"{label}: the logged trainer logprobs fit no kind (closest {best}, rms {gaps[best]:.2g} nats from ours)"
    if gaps[used] <= max(1.01 * gaps[best], floor_rms):
        return f"{label}: the logged trainer logprobs are {used}, rms {gaps[used]:.2g} nats from this check's trainer"
    return (
        f"{label}: the logged trainer logprobs are {best} (rms {gaps[best]:.2g} nats), "
        f"not {used} (rms {gaps[used]:.2g}): check with --trainer {best}"
    )
