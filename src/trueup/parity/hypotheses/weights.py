"""WGT: the engine's weights are not those that the trainer scores with. Needs older checkpoints to compare with.

W1 never synced, W2 so many versions behind, W3 some tensors behind, W5 a table never computed, W15 the head alone
behind. Where tokens carry stamps: versions.py.
"""

from __future__ import annotations

from dataclasses import replace

from trueup.model.substitute import EVERYTHING, HEAD
from trueup.parity.evidence import EXACT, EngineModel, Evidence
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.hypotheses.versions import by_stamp

NO_CHECKPOINTS = "needs older weights to compare with (--checkpoints DIR...)"


def _under(model: EngineModel, label: str, pattern: str, detail: str) -> Variant:
    return Variant(model=replace(model, source=replace(EXACT, weights=(label, pattern))), detail=detail)


def _first(evidence: Evidence, model: EngineModel) -> list[Variant]:
    labels = evidence.facts.checkpoints
    if not model.source.plain or not labels:
        return []
    whole = _under(model, labels[0], EVERYTHING, f"the engine fits the oldest weights given, {labels[0]}")
    return [whole, *(v for v, kind in by_stamp(evidence, model) if kind == "W1")]


def _behind(evidence: Evidence, model: EngineModel) -> list[Variant]:
    labels = evidence.facts.checkpoints
    if not model.source.plain:
        return []
    return [
        _under(model, label, EVERYTHING, f"the engine fits {label}, number {len(labels) - index} before the trainer's")
        for index, label in enumerate(labels)
        if index > 0
    ] + [v for v, kind in by_stamp(evidence, model) if kind == "W2"]


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


def _needs_checkpoints(evidence: Evidence) -> str | None:
    return None if evidence.facts.checkpoints else NO_CHECKPOINTS


def _needs_two(evidence: Evidence) -> str | None:
    return None if len(evidence.facts.checkpoints) > 1 else "needs at least two older weights (--checkpoints DIR...)"


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
        id="W15",
        layer="weights",
        title="the output head was left behind by an update",
        fix="refresh the head's own copy (fp32 or repacked) at each update; untie it if it is tied",
        variants=_head,
        unseeable=_needs_checkpoints,
        simulates=True,
    ),
)
