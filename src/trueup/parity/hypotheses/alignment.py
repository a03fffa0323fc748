"""TOK: right numbers against the wrong tokens. T1 shift."""

from __future__ import annotations

from dataclasses import replace

from trueup.parity.evidence import EngineModel, Evidence
from trueup.parity.hypotheses import Hypothesis, Variant

SHIFTS = (-3, -2, -1, 1, 2, 3)


def _shift(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.shift:
        return []
    return [
        Variant(
            model=replace(model, shift=k),
            detail=f"the number stored at position t is the logprob of token t{k:+d}",
        )
        for k in SHIFTS
    ]


HYPOTHESES = (
    Hypothesis(
        id="T1",
        layer="tokenization",
        title="logprobs are shifted against the tokens",
        fix="realign: entry t must describe completion token t",
        variants=_shift,
    ),
)
