"""OBJ: nothing is wrong with the backend; old rollouts are compared with new weights. O7."""

from __future__ import annotations

from dataclasses import replace

import torch

from trueup.parity.evidence import EngineModel, Evidence, render, skipped
from trueup.parity.hypotheses import Hypothesis, Variant

MIN_CURRENT = 16
GROWTH = 1.5


def _stale(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Offered where tokens of older versions are farther off than those of the newest."""
    whole = evidence.everything
    old_T = skipped(whole.tokens, "lagged")
    off_T = (render(whole, model) - whole.tokens.engine_T).abs()
    finite_T = torch.isfinite(off_T)
    now, then = off_T[finite_T & ~old_T], off_T[finite_T & old_T]
    if model.skip is not None or len(now) < MIN_CURRENT or not len(then):
        return []
    if float(then.mean()) < GROWTH * float(now.mean()):
        return []
    versions = whole.tokens.version_T
    lag = int(versions.max()) - int(versions.min())
    detail = (
        f"tokens of the newest weights fit (mean |r| {float(now.mean()):.3g}), those up to {lag} versions older do "
        f"not ({float(then.mean()):.3g})"
    )
    return [Variant(model=replace(model, skip="lagged"), detail=detail)]


def _no_versions(evidence: Evidence) -> str | None:
    if evidence.facts.stamped:
        return "the older weights were given: each token is compared with its own (W10)"
    versions = evidence.everything.tokens.version_T
    return None if len(torch.unique(versions)) > 1 else "every token here is of one weight version"


HYPOTHESES = (
    Hypothesis(
        id="O7",
        layer="objective",
        title="staleness is counted as mismatch",
        fix="nothing is broken in the backend: compare each token under its own version, or only at lag 0",
        variants=_stale,
        unseeable=_no_versions,
    ),
)
