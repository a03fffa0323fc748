"""Which ids does an engine favour or forbid? Read off the tokens it drew and the numbers it reported for them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from trueup.parity.evidence import EngineModel, Evidence, of_other_rows, render
from trueup.parity.hypotheses import Variant

EXPECTED_OFTEN = 6.0
"""An id that is expected so often and never drawn is forbidden, with odds of 400 to 1 each."""
OFFSET_NATS = 0.15
SLACK = 0.1
MIN_REPEATS, REPEATED_SHARE = 2, 0.75
"""How often ids must occur in rows that had no part in choosing them, and which share of these must be off as well."""
BIASES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
CANDIDATES = 8
SHOWN = 4
MAX_IDS = 64
MAX_FAVOURED = 16


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
    residual_T = render(evidence, model) - evidence.tokens.engine_T
    off_T = render(whole, model) - whole.tokens.engine_T
    for sign in (1, -1):
        ids = _favoured(evidence, sign * residual_T)
        if 0 < len(ids) <= MAX_FAVOURED and _repeated(whole, evidence, sign * off_T, ids):
            found += [_variant(model, ids, sign * b) for b in BIASES]
    return found


def smallest_bias(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """The smallest bias that is tried, on the rarest id that could be noticed; end ids forbidden, if none was drawn."""
    if model.bias is not None or model.allowed or model.dist.truncates or model.dist.penalises:
        return []
    ids, counts = torch.unique(evidence.everything.tokens.targets_T, return_counts=True)
    often = counts > MIN_REPEATS
    if not bool(often.any()):
        return []
    rarest = int(ids[often][counts[often].argmin()])
    ends = tuple(i for i in evidence.facts.eos_ids if i not in ids.tolist())
    return [_variant(model, (rarest,), min(BIASES)), *([_variant(model, ends, -math.inf)] if ends else [])]


def _repeated(whole: Evidence, fit: Evidence, off_T: torch.Tensor, ids: tuple[int, ...]) -> bool:
    """Whether occurrences of the ids in the other rows, which had no part in choosing them, are raised as well.

    An id that is favoured is favoured wherever it is drawn; numbers that are off at random are not off again.
    """
    at_T = of_other_rows(whole, fit) & torch.isin(whole.tokens.targets_T, torch.tensor(ids)) & torch.isfinite(off_T)
    raised = off_T[at_T] < -OFFSET_NATS
    return int(at_T.sum()) >= MIN_REPEATS and float(raised.double().mean()) >= REPEATED_SHARE


def _favoured(evidence: Evidence, residual_T: torch.Tensor) -> tuple[int, ...]:
    """Ids for which the engine's number is higher than the trainer's at every occurrence, and by OFFSET_NATS on
    average: a positive bias raises those and lowers all others. For a negative one the residual comes negated."""
    targets_T = evidence.tokens.targets_T
    off_T = residual_T.nan_to_num(math.inf, posinf=math.inf, neginf=math.inf)
    ids = torch.unique(targets_T).tolist()
    return tuple(
        i
        for i in ids
        if float(off_T[targets_T == i].mean()) < -OFFSET_NATS and float(off_T[targets_T == i].max()) < SLACK
    )


def _missed(evidence: Evidence, model: EngineModel, ids: list[int]) -> list[int]:
    """The ids whose probability goes with what a model leaves: where one was likely, the others are raised."""
    raised_T = evidence.tokens.engine_T - render(evidence, model)
    ok_T = torch.isfinite(raised_T)

    def goes_with(token_id: int) -> float:
        mass_T = evidence.mass(model.source, model.dist.temperature, (token_id,)).double()
        return float(torch.corrcoef(torch.stack([mass_T[ok_T], raised_T[ok_T].double()]))[0, 1])

    return sorted(ids, key=goes_with, reverse=True)[:CANDIDATES]


def closer_bias(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """Neighbours of a fitted bias; for forbidden ids, one more that was never drawn or one fewer."""
    if variant.model.bias is None:
        return []
    ids, bias = variant.model.bias
    if not math.isinf(bias):
        near = (round(bias + sign * step / 2, 4) for sign in (-1, 1))
        return [_variant(variant.model, ids, b) for b in near if b]
    if step < 1:
        return []
    whole = evidence.everything
    drawn = set(whole.tokens.targets_T.tolist())
    expected_V = whole.expected()
    others = [int(i) for i in expected_V.argsort(descending=True) if int(i) not in drawn | set(ids)][:MAX_IDS]
    changed = [tuple(sorted({*ids, i})) for i in _missed(evidence, variant.model, others)]
    changed += [tuple(i for i in ids if i != gone) for gone in ids] if 1 < len(ids) <= CANDIDATES else []
    return [_variant(variant.model, c, bias) for c in changed]
