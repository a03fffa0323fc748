"""SEM: the engine changes the distribution on its own account. S5 defaults nobody sent, S7 a grammar."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trueup.parity.evidence import EngineModel, Evidence, of_other_rows, render
from trueup.parity.hypotheses import Hypothesis, Variant

GRIDS: dict[str, tuple[float, ...]] = {
    "temperature": (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.5),
    "top_p": (0.5, 0.8, 0.85, 0.9, 0.95, 0.99),
    "top_k": (1, 5, 10, 20, 30, 40, 50, 64, 100, 200),
    "min_p": (0.01, 0.02, 0.05, 0.1),
    "repetition_penalty": (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5),
    "presence_penalty": (-0.5, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5),
    "frequency_penalty": (-0.5, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5),
}
ONE_SIDED = 0.9
MIN_ZEROS = 2
MAX_ALLOWED_MASS = 0.95
MAX_NEW_IDS = 0.15
"""Of a grammar of thirty ids a hundred tokens leave few unseen; of a filter that changes with the context, a third.
More than this, by STANDARD_ERRORS of the share, speaks against a grammar."""
STANDARD_ERRORS = 2.0


FILTERS = ("top_p", "top_k", "min_p")
"""Fields that are tried although the requests set them: an engine's own setting may win over theirs."""


def _open(evidence: Evidence) -> list[str]:
    """The fields that may not be what they are declared to be."""
    return [n for n in GRIDS if n in evidence.case.omitted or n in FILTERS]


def _filled(evidence: Evidence, model: EngineModel, values: dict[str, float]) -> list[Variant]:
    dist = replace(model.dist, **values)  # type: ignore[arg-type]
    if dist == model.dist:
        return []
    declared, omitted = evidence.case.processed, evidence.case.omitted
    names = [n for n in GRIDS if getattr(dist, n) != getattr(declared, n)]
    words = ", ".join(f"{n}={getattr(dist, n):g}" for n in names)
    changed = replace(model, dist=dist)
    if set(names) <= set(omitted):
        return [Variant(model=changed, detail=f"no request set it, yet the engine fits {words}")]
    own = sorted(set(names) - set(omitted))
    sent = ", ".join(f"{n}={getattr(declared, n):g}" for n in names if n not in omitted)
    return [
        Variant(
            model=changed,
            detail=f"the engine fits {words}, where the requests say {sent}",
            title=f"the engine's {' and '.join(own)} {'is' if len(own) == 1 else 'are'} not what was declared",
            fix="make the sampler use the request's fields, and log the fields that were sent",
        )
    ]


def _hidden(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.dist != evidence.case.processed:
        return []
    omitted = evidence.case.omitted
    declared = {n: v for n, v in evidence.facts.generation.items() if n in omitted}
    found = _filled(evidence, model, declared) if declared else []
    found += [v for n in _open(evidence) for value in GRIDS[n] for v in _filled(evidence, model, {n: value})]
    if model.dist.temperature == 1 or "temperature" in omitted:
        return found
    # an engine that goes by its own settings instead of the requests' samples at T=1 through filters of its own
    own = {"temperature": 1.0}
    return found + [v for n in FILTERS for value in GRIDS[n] for v in _filled(evidence, model, own | {n: value})]


def _another_field(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """The same with one more hidden field, or another value of one: on the grid, and half-way to its neighbours."""
    if step < 1:
        return []
    found = []
    dist, declared = variant.model.dist, evidence.case.processed
    for name in GRIDS:  # one that was sent is only brought closer: most of them change little and fit anything
        if name not in evidence.case.omitted and (
            name not in FILTERS or getattr(dist, name) == getattr(declared, name)
        ):
            continue
        value = getattr(variant.model.dist, name)
        near = [value + share * (other - value) for other in GRIDS[name] for share in (0.5, 0.2)]
        near = sorted(near, key=lambda v, at=value: abs(v - at))[:8] if value else []  # type: ignore[misc]
        values = {*GRIDS[name], *(float(round(v)) if name == "top_k" else round(v, 4) for v in near)}
        for candidate in sorted(values - {value}):
            found += _filled(evidence, variant.model, {name: int(candidate) if name == "top_k" else candidate})
    return found


def _goes_on(evidence: Evidence, whole: Evidence) -> bool:
    """Whether the other rows go on drawing ids that these rows do not hold: a few allowed ids would soon be known."""
    others_T = whole.tokens.targets_T[of_other_rows(whole, evidence)]
    if not len(others_T):
        return True
    share = float((~torch.isin(others_T, evidence.tokens.targets_T)).double().mean())
    return share - STANDARD_ERRORS * math.sqrt(share * (1 - share) / len(others_T)) > MAX_NEW_IDS


def _grammar(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Offered where the engine's numbers are too high throughout and the ids it drew hold little of the mass."""
    if model.allowed or model.dist.truncates or model.dist.penalises or model.bias is not None:
        return []
    whole = evidence.everything
    residual_T = render(whole, model) - whole.tokens.engine_T
    residual_T = residual_T[torch.isfinite(residual_T)]
    allowed = tuple(torch.unique(whole.tokens.targets_T).tolist())
    if _goes_on(evidence, whole):
        return []
    mass = float(whole.mass(model.source, model.dist.temperature, allowed).mean())
    if not len(residual_T) or float((residual_T < 1e-3).double().mean()) < ONE_SIDED or mass > MAX_ALLOWED_MASS:
        return []
    zeros = int((whole.tokens.engine_T == 0.0).sum())
    forced = f"; {zeros} tokens carry exactly 0: nothing else was allowed" if zeros >= MIN_ZEROS else ""
    detail = f"the engine draws among {len(allowed)} ids only, which hold {mass:.0%} of the trainer's mass{forced}"
    return [Variant(model=replace(model, allowed=allowed), detail=detail)]


HYPOTHESES = (
    Hypothesis(
        id="S5",
        layer="semantic",
        title="the engine applies sampling defaults that no request set",
        fix="--generation-config vllm, and send every sampling field explicitly",
        variants=_hidden,
        refine=_another_field,
        simulates=True,
        may_redraw=True,
    ),
    Hypothesis(
        id="S7",
        layer="semantic",
        title="a grammar or structured-output mask is in the engine's logprobs only",
        fix="leave forced tokens out of the loss, or replay the mask in the trainer",
        variants=_grammar,
    ),
)
