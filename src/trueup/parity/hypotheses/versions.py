"""WGT and OBJ: tokens that carry the version of the weights that made them. W10, W11 inside sequences, O7 between them.

Staleness is an exoneration, so that it needs proof: the older weights themselves must give the numbers of the tokens
that carry their stamp. Where other weights give them, the stamps are wrong (W1, W2 in weights.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trueup.model.substitute import EVERYTHING
from trueup.parity.evidence import EXACT, EngineModel, Evidence, Source, render, skipped
from trueup.parity.hypotheses import Hypothesis, Variant

TORN = 2.0
"""Tokens next to a switch of versions that are this many times as far off as the rest were made by neither."""
GROWTH = 1.5
"""Tokens of older versions are off if they are this many times as far off as those of the newest."""
MIN_CURRENT = 16


def mixed_rows(evidence: Evidence) -> bool:
    """Whether the version changes inside a completion."""
    tokens = evidence.everything.tokens
    changes = (tokens.version_T[1:] != tokens.version_T[:-1]) & (tokens.row_T[1:] == tokens.row_T[:-1])
    return bool(changes.any())


def _own_versions(evidence: Evidence, model: EngineModel) -> tuple[EngineModel, bool] | None:
    """Every token under its stamped version, and whether tokens next to a switch are off by far more than the rest."""
    if not model.source.plain or not evidence.facts.stamped or model.bias is not None or model.allowed:
        return None
    stamped = replace(model, source=replace(EXACT, by_version=evidence.facts.versions))
    whole = evidence.everything
    off_T = (render(whole, stamped) - whole.tokens.engine_T).abs()
    near_T, finite_T = skipped(whole.tokens, "boundary"), torch.isfinite(off_T)
    near, far = off_T[near_T & finite_T], off_T[~near_T & finite_T]
    torn = len(near) > 0 and len(far) > 0 and float(near.mean()) > TORN * float(far.mean())
    return stamped, torn


def _stamps(evidence: Evidence, model: EngineModel, *, inside: bool) -> list[Variant]:
    found = _own_versions(evidence, model)
    if found is None or found[1] or mixed_rows(evidence) != inside:
        return []
    return [Variant(model=found[0], detail="every token fits the version stamped on it")]


def _torn(evidence: Evidence, model: EngineModel) -> list[Variant]:
    found = _own_versions(evidence, model)
    if found is None or not found[1]:
        return []
    detail = "tokens fit the version stamped on them, except next to where it changes"
    return [Variant(model=replace(found[0], skip="boundary"), detail=detail)]


def by_stamp(evidence: Evidence, model: EngineModel) -> list[tuple[Variant, str]]:
    """Which of the older weights fit the tokens of each stamp, where that contradicts the stamp: (variant, W1 or W2).

    Weights whose version is not recorded contradict a stamp only if they are the oldest of several.
    """
    facts = evidence.facts
    if not model.source.plain or len(facts.stamps) < 2 or not facts.checkpoints:
        return []
    whole, labels = evidence.everything, facts.checkpoints
    sources: dict[str | None, Source] = {None: EXACT}
    sources |= {label: replace(EXACT, weights=(label, EVERYTHING)) for label in labels}
    off = {
        label: (render(whole, replace(model, source=source)) - whole.tokens.engine_T).abs()
        for label, source in sources.items()
    }
    fitting: dict[int, str] = {}
    for version in facts.stamps:
        at_T = whole.tokens.version_T == version
        best = min(off, key=lambda label: float(off[label][at_T].nan_to_num(torch.inf).mean()))
        if best is not None:
            fitting[version] = best
    known = {label: version for version, label in facts.versions}
    wrong = {
        v: label
        for v, label in fitting.items()
        if known.get(label, v) != v or (label not in known and label == labels[0] and len(labels) > 1)
    }
    if not wrong:
        return []
    source = replace(EXACT, by_version=tuple(sorted(fitting.items())))
    said = ", ".join(f"tokens stamped {v} fit {label}" for v, label in sorted(wrong.items()))
    kind = "W1" if set(wrong.values()) == {labels[0]} else "W2"
    return [(Variant(model=replace(model, source=source), detail=said), kind)]


def versions_apart(evidence: Evidence, off_T: torch.Tensor) -> str | None:
    """What is known where tokens of older stamps are off and those of the newest fit; None where that is not so."""
    old_T = skipped(evidence.tokens, "lagged")
    finite_T = torch.isfinite(off_T)
    now, then = off_T[finite_T & ~old_T].abs(), off_T[finite_T & old_T].abs()
    if len(now) < MIN_CURRENT or not len(then) or float(then.mean()) < GROWTH * float(now.mean()):
        return None
    return (
        f"the {len(then)} tokens stamped with older weights are off (mean |r| {float(then.mean()):.3g}), those of the "
        f"newest are not ({float(now.mean()):.3g}): staleness, or other weights than the stamps say; --checkpoints "
        f"with the older weights tells"
    )


def _needs_stamps(evidence: Evidence) -> str | None:
    if len(evidence.facts.stamps) < 2:
        return "every token here is of one weight version"
    return None if evidence.facts.stamped else "needs the older weights that tokens are stamped with (--checkpoints)"


HYPOTHESES = (
    Hypothesis(
        id="W10",
        layer="weights",
        title="weights changed inside sequences; every token fits its own version",
        fix="nothing is broken: score each token under its stamped version and correct per token",
        variants=lambda e, m: _stamps(e, m, inside=True),
        unseeable=_needs_stamps,
        simulates=True,
    ),
    Hypothesis(
        id="W11",
        layer="weights",
        title="an update was torn: tokens next to the switch fit neither version",
        fix="pause the engine before weights are copied, resume after all of them are",
        variants=_torn,
        unseeable=_needs_stamps,
        simulates=True,
    ),
    Hypothesis(
        id="O7",
        layer="objective",
        title="staleness is counted as mismatch",
        fix="nothing is broken in the backend: compare each token under its own version, or only at lag 0",
        variants=lambda e, m: _stamps(e, m, inside=False),
        unseeable=_needs_stamps,
        simulates=True,
    ),
)
