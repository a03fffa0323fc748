"""INF: right weights, right distribution, other arithmetic. I1 and its known forms, each imitated by a forward pass."""

from __future__ import annotations

from dataclasses import replace

from trueup.parity.evidence import TRAINER, EngineModel, Evidence, simulation
from trueup.parity.hypotheses import Hypothesis, Variant

KNOWN = {
    "residual_truncated": "whose residual stream is stored in bf16 by truncation, not rounding",
    "kernels_truncated": "whose bf16 stores truncate instead of rounding (residual stream, norms, activation)",
    "rotary_bf16": "whose rotary tables are held in bf16",
    "softmax_bf16": "whose attention softmax runs in bf16",
    "norm_bf16": "whose norm output is rounded twice",
}


def _simulated(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.source != TRAINER:
        return []
    return [
        Variant(model=replace(model, source=simulation(name)), detail=f"the engine computes like a body {what}")
        for name, what in KNOWN.items()
    ]


HYPOTHESES = (
    Hypothesis(
        id="I1",
        layer="inference",
        title="the engine rounds in bf16 where the trainer does not",
        fix="use a build whose bf16 stores round to nearest (on x86: compiled for AVX512-BF16), or serve in float32",
        variants=_simulated,
        simulates=True,
    ),
)
