"""INF: right weights, right distribution, other arithmetic: I1 rounding, I2 head precision, I6 8-bit cache."""

from __future__ import annotations

from dataclasses import replace

from trueup.parity.evidence import ENGINE, EXACT, EngineModel, Evidence, HeadEdit
from trueup.parity.hypotheses import Hypothesis, Variant

KNOWN = {
    "residual_truncated": "whose residual stream is stored in bf16 by truncation, not rounding",
    "kernels_truncated": "whose bf16 stores truncate instead of rounding (residual stream, norms, activation)",
    "rotary_bf16": "whose rotary tables are held in bf16",
    "softmax_bf16": "whose attention softmax runs in bf16",
    "norm_bf16": "whose norm output is rounded twice",
}


def _simulated(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    return [
        Variant(
            model=replace(model, source=replace(EXACT, simulation=(name, 0.0))),
            detail=f"the engine computes like a body {what}",
        )
        for name, what in KNOWN.items()
    ]


def _float8(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    return [
        Variant(
            model=replace(model, source=replace(ENGINE, simulation=("kv_float8", bits))),
            detail=f"the engine computes as if keys and values were kept in 8 bits ({name})",
        )
        for bits, name in ((4.0, "e4m3"), (5.0, "e5m2"))
    ]


def _bf16_head(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain or evidence.facts.bf16_head:
        return []
    detail = "the engine's logits are those of a head multiplied and rounded in bf16; the trainer's head is fp32"
    return [Variant(model=replace(model, source=replace(EXACT, head=HeadEdit(bf16=True))), detail=detail)]


HYPOTHESES = (
    Hypothesis(
        id="I1",
        layer="inference",
        title="the engine rounds in bf16 where the trainer does not",
        fix="use a build whose bf16 stores round to nearest (on x86: compiled for AVX512-BF16), or serve in float32",
        variants=_simulated,
        simulates=True,
        numeric=True,
    ),
    Hypothesis(
        id="I2",
        layer="inference",
        title="the output head is multiplied in another precision than the trainer's",
        fix='fp32 head on both sides: vLLM 0.32 --hf-overrides \'{"head_dtype": "float32"}\'; or bf16 on both',
        variants=_bf16_head,
        simulates=True,
        numeric=True,
    ),
    Hypothesis(
        id="I6",
        layer="inference",
        title="the engine keeps keys and values in 8 bits",
        fix="--kv-cache-dtype auto, or quantise the trainer's keys and values alike",
        variants=_float8,
        simulates=True,
        numeric=True,
    ),
)
