"""WGT: the engine's weights are not those that the trainer scores with. Needs older checkpoints to compare with.

W1 never synced, W2 so many versions behind, W3 some tensors behind, W5 a table never computed, W10 and W11 versions
that change inside a sequence, W15 the head alone behind.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trueup.model.substitute import EVERYTHING, HEAD
from trueup.parity.evidence import EXACT, STAMPED, EngineModel, Evidence, render, skipped
from trueup.parity.hypotheses import Hypothesis, Variant

TORN = 2.0
"""Tokens next to a switch of versions that are this many times as far off as the rest were made by neither."""
NO_CHECKPOINTS = "needs older weights to compare with (--checkpoints DIR...)"


def _under(model: EngineModel, label: str, pattern: str, detail: str) -> Variant:
    return Variant(model=replace(model, source=replace(EXACT, weights=(label, pattern))), detail=detail)


def _first(evidence: Evidence, model: EngineModel) -> list[Variant]:
    labels = evidence.facts.checkpoints
    if not model.source.plain or not labels:
        return []
    return [_under(model, labels[0], EVERYTHING, f"the engine fits the oldest weights given, {labels[0]}")]


def _behind(evidence: Evidence, model: EngineModel) -> list[Variant]:
    labels = evidence.facts.checkpoints
    if not model.source.plain:
        return []
    return [
        _under(model, label, EVERYTHING, f"the engine fits {label}, number {len(labels) - index} before the trainer's")
        for index, label in enumerate(labels)
        if index > 0
    ]


def _some(evidence: Evidence, model: EngineModel) -> list[Variant]:
    facts = evidence.facts
    if not model.source.plain:
        return []
    return [_partial(model, label, (kind,)) for label in facts.checkpoints[-1:] for kind in facts.tensor_kinds]


def _partial(model: EngineModel, label: str, kinds: tuple[str, ...]) -> Variant:
    pattern = "|".join(rf"\b{kind}\b" for kind in sorted(kinds))
    return _under(model, label, pattern, f"{', '.join(sorted(kinds))} fit {label}, all other tensors the trainer's")


def _more(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """One more kind of tensor behind, or one fewer; or the same of an older version."""
    if step < 1:
        return []
    weights = variant.model.source.weights
    assert weights is not None
    label, pattern = weights
    held = {part.removeprefix(r"\b").removesuffix(r"\b") for part in pattern.split("|")}
    kinds = evidence.facts.tensor_kinds
    changed = [held ^ {kind} for kind in kinds]
    found = [_partial(variant.model, label, tuple(k)) for k in changed if k and len(k) < len(kinds)]
    return found + [_partial(variant.model, other, tuple(held)) for other in evidence.facts.checkpoints[:-1]]


def _head(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    return [
        _under(model, label, HEAD, f"the engine's head fits {label}, its body the trainer's weights")
        for label in evidence.facts.checkpoints
    ]


def _dummy_table(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    return [
        Variant(
            model=replace(model, source=replace(EXACT, simulation=("rope_dummy", value))),
            detail=f"the engine computes as if its rotary table held {value:g} everywhere",
        )
        for value in (0.0, 1.0)
    ]


def _own_versions(evidence: Evidence, model: EngineModel) -> tuple[EngineModel, bool] | None:
    """Every token under its stamped version, and whether tokens next to a switch are off by far more than the rest."""
    if not model.source.plain or not evidence.facts.stamped or model.bias is not None or model.allowed:
        return None
    stamped = replace(model, source=replace(EXACT, weights=(STAMPED, EVERYTHING)))
    whole = evidence.everything
    off_T = (render(whole, stamped) - whole.tokens.engine_T).abs()
    near_T, finite_T = skipped(whole.tokens, "boundary"), torch.isfinite(off_T)
    near, far = off_T[near_T & finite_T], off_T[~near_T & finite_T]
    torn = len(near) > 0 and len(far) > 0 and float(near.mean()) > TORN * float(far.mean())
    return stamped, torn


def _stamps(evidence: Evidence, model: EngineModel) -> list[Variant]:
    found = _own_versions(evidence, model)
    if found is None or found[1]:
        return []
    return [Variant(model=found[0], detail="every token fits the version stamped on it")]


def _torn(evidence: Evidence, model: EngineModel) -> list[Variant]:
    found = _own_versions(evidence, model)
    if found is None or not found[1]:
        return []
    detail = "tokens fit the version stamped on them, except next to where it changes"
    return [Variant(model=replace(found[0], skip="boundary"), detail=detail)]


def _needs_checkpoints(evidence: Evidence) -> str | None:
    return None if evidence.facts.checkpoints else NO_CHECKPOINTS


def _needs_two(evidence: Evidence) -> str | None:
    return None if len(evidence.facts.checkpoints) > 1 else "needs at least two older weights (--checkpoints DIR...)"


def _needs_stamps(evidence: Evidence) -> str | None:
    return None if evidence.facts.stamped else "no rollout here carries stamps of two known versions"


HYPOTHESES = (
    Hypothesis(
        id="W1",
        layer="weights",
        title="the engine never took an update: it serves the initial weights",
        fix="check the receipt of each update (a 200 is no proof), and score a canary prompt after it",
        variants=_first,
        unseeable=_needs_checkpoints,
        simulates=True,
    ),
    Hypothesis(
        id="W2",
        layer="weights",
        title="the engine is versions behind what its label or the trainer says",
        fix="stamp the version when the weights are applied, not when they are sent",
        variants=_behind,
        unseeable=_needs_two,
        simulates=True,
    ),
    Hypothesis(
        id="W3",
        layer="weights",
        title="an update reached some tensors only",
        fix="compare the loader's names with the manifest; every tensor must be accounted for",
        variants=_some,
        refine=_more,
        unseeable=_needs_checkpoints,
        simulates=True,
    ),
    Hypothesis(
        id="W5",
        layer="weights",
        title="a buffer that no checkpoint stores was never computed (dummy load)",
        fix="start the engine from the real checkpoint, or recompute rotary tables and normalisers after loading",
        variants=_dummy_table,
        simulates=True,
    ),
    Hypothesis(
        id="W10",
        layer="weights",
        title="weights changed inside sequences; every token fits its own version",
        fix="nothing is broken: score each token under its stamped version and correct per token",
        variants=_stamps,
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
        id="W15",
        layer="weights",
        title="the output head was left behind by an update",
        fix="refresh the head's own copy (fp32 or repacked) at each update; untie it if it is tied",
        variants=_head,
        unseeable=_needs_checkpoints,
        simulates=True,
    ),
)
