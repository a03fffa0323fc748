"""SEM, continued: the right distribution, the wrong entry of it. S8 top-1 entry, S9 placeholder, S10 transport
grid, S14 a statistic of several tokens."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from trueup.parity.evidence import ENGINE, MIXED, EngineModel, Evidence, skipped, snap
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.hypotheses.alignment import END_IDS

GRIDS = ("1 decimals", "2 decimals", "3 decimals", "4 decimals", "5 decimals", "6 decimals", "bf16", "fp16")
PLACEHOLDER_REPEATS = 3
GRID_VALUES = 16
SENTINEL = -900.0
"""Nothing a language model samples has a logprob below this; -999 and -9999 are fill values."""


def _top_entry(evidence: Evidence, model: EngineModel) -> list[Variant]:
    detail = "where the sampled token is not the most likely one, the engine's number is the most likely one's"
    return [Variant(model=replace(model, entry="top"), detail=detail)] if model.entry == "sampled" else []


def _mixed(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.entry != "sampled":
        return []
    return [
        Variant(model=replace(model, entry=name), detail=f"each number is the {name} of the completion's logprobs")
        for name in MIXED
    ]


BASES = {"2": 1 / math.log(2), "10": 1 / math.log(10)}


def _other_numbers(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Statistics of several tokens, or logarithms to another base."""
    if model.factor != 1:
        return _mixed(evidence, model)
    return _mixed(evidence, model) + [
        Variant(
            model=replace(model, factor=factor),
            detail=f"engine fits logarithms to base {base}",
            title=f"logprobs are logarithms to base {base}, not natural ones",
            fix="write natural logarithms (nats)",
        )
        for base, factor in BASES.items()
    ]


def placeholders(evidence: Evidence) -> dict[float, int]:
    """Constants that stand for a missing number, with how often each occurs.

    A value counts when it repeats exactly and could not be a logprob there: positive, below any sentinel, or exactly
    0.0 at a token whose kept set holds more than one token and whose own probability is not 1.
    """
    evidence = evidence.everything
    engine_T = evidence.tokens.engine_T
    scores = evidence.scores(ENGINE, evidence.case.processed)
    certain_T = (scores.kept_T == 1) | (scores.logprobs_T > -1e-3)
    if evidence.case.sampling.temperature == 0:  # after the argmax every token is
        certain_T = torch.ones_like(certain_T)
    impossible_T = (engine_T > 1e-3) | (engine_T < SENTINEL) | ((engine_T == 0.0) & ~certain_T)
    last_T = skipped(evidence.tokens, "last")
    kinds = len(torch.unique(evidence.tokens.targets_T[impossible_T]))
    if kinds <= END_IDS and bool((last_T | ~impossible_T).all()):  # an end token of its own, no lost number: T7
        return {}
    counts = Counter(engine_T[impossible_T & torch.isfinite(engine_T)].tolist())
    return {value: count for value, count in counts.items() if count >= PLACEHOLDER_REPEATS}


def _placeholder(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.constant is not None:
        return []
    total = len(evidence.everything.tokens)
    return [
        Variant(
            model=replace(model, constant=value),
            detail=f"{count} of {total} tokens carry exactly {value:g}, which their probability rules out",
        )
        for value, count in placeholders(evidence).items()
    ]


def _distinct(evidence: Evidence) -> torch.Tensor:
    values = evidence.everything.tokens.engine_T
    return torch.unique(values[torch.isfinite(values) & (values.abs() > 1e-3)])


def _grid_unseeable(evidence: Evidence) -> str | None:
    distinct = len(_distinct(evidence))
    return None if distinct >= GRID_VALUES else f"{distinct} distinct values are too few to tell a grid from chance"


def grid_of(evidence: Evidence) -> str | None:
    """Return the coarsest transport grid that every engine value lies on, or None.

    Needs enough distinct values that lying on the grid by chance is out of the question.
    """
    distinct = _distinct(evidence)
    if len(distinct) < GRID_VALUES:
        return None
    for grid in GRIDS:
        if bool(((snap(distinct, grid) - distinct).abs() <= 1e-9 * distinct.abs().clamp_min(1.0)).all()):
            return grid
    return None


def _transport_grid(evidence: Evidence, model: EngineModel) -> list[Variant]:
    grid = grid_of(evidence)
    if grid is None or model.grid is not None:
        return []
    return [Variant(model=replace(model, grid=grid), detail=f"every engine value lies on a grid of {grid}")]


HYPOTHESES = (
    Hypothesis(
        id="S8",
        side="log",
        layer="semantic",
        title="the most likely token's logprob is read instead of the sampled one's",
        fix="read the logprob by token id, not the first entry of the returned dictionary",
        variants=_top_entry,
    ),
    Hypothesis(
        id="S9",
        side="log",
        layer="semantic",
        title="missing logprobs are filled with a constant",
        fix="fail or mask tokens without a logprob; never fill them in",
        variants=_placeholder,
        marked=True,
    ),
    Hypothesis(
        id="S14",
        side="log",
        layer="semantic",
        title="the number reported is not the token's own logprob",
        fix="report each token's logprob by itself: no running sums or means, no limits",
        variants=_other_numbers,
    ),
    Hypothesis(
        id="S10",
        side="log",
        layer="semantic",
        title="logprobs are rounded in transport",
        fix="carry logprobs as float32 with all digits",
        variants=_transport_grid,
        unseeable=_grid_unseeable,
        marked=True,
    ),
)
