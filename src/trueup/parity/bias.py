"""Which ids does an engine favour or forbid? Read off the tokens it drew and the numbers it reported for them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trueup.parity.evidence import EngineModel, Evidence, render
from trueup.parity.hypotheses import Variant

EXPECTED_OFTEN = 6.0
"""An id that is expected so often and never drawn is forbidden, with odds of 400 to 1 each."""
OFFSET_NATS = 0.25
OCCURRENCES = 2
BIASES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
SHOWN = 4
MAX_IDS = 64


def _words(ids: tuple[int, ...], bias: float) -> str:
    shown = ", ".join(str(i) for i in ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
    what = "forbids" if math.isinf(bias) else f"adds {bias:+.3g} nats to the logits of"
    return f"the engine {what} {len(ids)} id{'s' if len(ids) > 1 else ''} ({shown})"


def _variant(model: EngineModel, ids: tuple[int, ...], bias: float) -> Variant:
    return Variant(model=replace(model, bias=(ids, bias)), detail=_words(ids, bias))


def bias_variants(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Biases that the tokens of the whole setting suggest: on ids that are never drawn, or constantly off."""
    if model.bias is not None or model.allowed or model.dist.truncates or model.dist.penalises or model.shift:
        return []
    whole = evidence.everything
    drawn_V = torch.bincount(whole.tokens.targets_T, minlength=evidence.facts.vocab)
    expected_V = whole.expected()[: len(drawn_V)].double()
    found = []
    forbidden = ((drawn_V[: len(expected_V)] == 0) & (expected_V > EXPECTED_OFTEN)).nonzero()[:, 0].tolist()
    never = tuple(i for i in evidence.facts.eos_ids if i < len(drawn_V) and not drawn_V[i])
    for ids in dict.fromkeys((tuple(forbidden), never, tuple(sorted({*forbidden, *never})))):
        if 0 < len(ids) <= MAX_IDS:
            found.append(_variant(model, ids, -math.inf))
    residual_T = render(whole, model) - whole.tokens.engine_T
    for sign in (1, -1):
        ids = _constantly_off(whole, residual_T, sign)
        if 0 < len(ids) <= MAX_IDS:
            found += [_variant(model, ids, sign * b) for b in BIASES]
    return found


def _constantly_off(evidence: Evidence, residual_T: torch.Tensor, sign: int) -> tuple[int, ...]:
    """Ids whose every occurrence is off by OFFSET_NATS in one direction: the engine's number is too high (sign +1)."""
    targets_T = evidence.tokens.targets_T
    usual = float(residual_T[torch.isfinite(residual_T)].median()) if bool(torch.isfinite(residual_T).any()) else 0.0
    off_T = sign * (residual_T - usual) < -OFFSET_NATS
    ids, counts = torch.unique(targets_T, return_counts=True)
    always = [
        int(i) for i, n in zip(ids, counts, strict=True) if n >= OCCURRENCES and bool(off_T[targets_T == i].all())
    ]
    return tuple(always)


def closer_bias(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """Neighbours of a fitted bias; nothing for penalties or forbidden ids."""
    if variant.model.bias is None or math.isinf(variant.model.bias[1]):
        return []
    ids, bias = variant.model.bias
    near = (round(bias + sign * step / 2, 4) for sign in (-1, 1))
    return [_variant(variant.model, ids, b) for b in near if b]
