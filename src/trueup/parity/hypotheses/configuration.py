"""INF and TOK: right weights in a model that is configured otherwise. I8, I9, I12, I14, and T10 for padded rows."""

from __future__ import annotations

from dataclasses import replace

from trueup.model.altered import ALTERATIONS
from trueup.parity.evidence import EXACT, EngineModel, Evidence, HeadEdit
from trueup.parity.hypotheses import Hypothesis, Variant

THETA_FACTORS = (0.03, 0.1, 0.3, 0.6, 0.9, 1.1, 1.6, 3.0, 10.0, 30.0)
LINEAR_FACTORS = (1.05, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WINDOWS = (4, 8, 16, 32, 64, 128, 256, 512)
SOFTCAPS = (2.0, 4.0, 8.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0)
SCALES = (0.5, 0.7, 0.85, 0.95, 0.99, 1.01, 1.05, 1.2, 1.5, 2.0)
PADDED = tuple(2**k for k in range(11))
OCTAVE = 1.4
"""A step of 1 multiplies or divides a number by this; rotary bases are searched ten times as widely."""


def _altered(model: EngineModel, name: str, value: float) -> Variant:
    words = ALTERATIONS[name][0].format(value)
    source = replace(EXACT, simulation=(name, value))
    return Variant(model=replace(model, source=source), detail=f"the engine computes like a model with {words}")


def _edited(model: EngineModel, head: HeadEdit, words: str) -> Variant:
    return Variant(model=replace(model, source=replace(EXACT, head=head)), detail=f"engine fits {words}")


def _rope(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    theta = evidence.facts.rope_theta
    bases = {theta * factor for factor in THETA_FACTORS}
    return [_altered(model, "rope_theta", base) for base in sorted(bases - {theta})] + [
        _altered(model, "rope_linear", factor) for factor in LINEAR_FACTORS
    ]


def _window(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    longest = max(len(p) for p in evidence.tokens.prompts) + int(evidence.tokens.position_T.max())
    return [_altered(model, "window", w) for w in WINDOWS if w < longest]


def _mask(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    forms = (("attention_scale", 1.0), ("attention_scale", 0.0), ("skips_self", 0.0), ("skips_first", 0.0))
    return [_altered(model, name, value) for name, value in forms]


def _logits(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    found = [_capped(model, cap) for cap in SOFTCAPS] + [_scaled(model, scale) for scale in SCALES]
    return found + [_altered(model, "embedding_scale", s) for s in (0.5, 0.9, 1.1, 2.0)]


def _capped(model: EngineModel, cap: float) -> Variant:
    return _edited(model, HeadEdit(softcap=cap), f"logits soft-capped at {cap:.4g}")


def _scaled(model: EngineModel, scale: float) -> Variant:
    return _edited(model, HeadEdit(scale=scale), f"logits multiplied by {scale:.4g}")


def _padded(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if not model.source.plain:
        return []
    vocab = evidence.facts.vocab
    rounded = {-vocab % multiple for multiple in (64, 128, 256, 512, 1024, 4096)} - {0}
    return [_with_rows(model, count) for count in sorted(rounded | set(PADDED))]


def _with_rows(model: EngineModel, count: int) -> Variant:
    words = f"a softmax over {count} rows more than the vocabulary has"
    return _edited(model, HeadEdit(padded_rows=count), words)


def _finer(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """Neighbours of the one number in a variant; whole numbers move by at least 1."""
    source, head, model = variant.model.source, variant.model.source.head, variant.model
    factors = (OCTAVE**step, OCTAVE**-step)
    if source.simulation is not None:
        name, value = source.simulation
        if name == "window":
            return [_altered(model, name, n) for n in whole_neighbours(value, step)]
        wider = (factors[0] ** 3, factors[1] ** 3) if name == "rope_theta" else factors
        if name not in ("rope_theta", "rope_linear", "embedding_scale"):
            return []
        return [_altered(model, name, n) for n in (*(value * factor for factor in wider), *rounded(value))]
    if head.softcap is not None:
        return [_capped(model, n) for n in (*(head.softcap * f for f in factors), *rounded(head.softcap))]
    if head.padded_rows:
        return [_with_rows(model, n) for n in whole_neighbours(head.padded_rows, step)]
    return [_scaled(model, n) for n in (*(head.scale * f for f in factors), *rounded(head.scale))]


def rounded(value: float) -> list[float]:
    """The number to one, two and three digits: people write round numbers into configurations."""
    return [float(f"{value:.{digits}g}") for digits in (1, 2, 3)]


def whole_neighbours(value: float, step: float) -> list[int]:
    """The whole numbers above and below `value`, a third away at step 1 and closer at smaller steps."""
    distance = max(1, round(value * step / 3))
    return [n for n in (int(value) - distance, int(value) + distance) if n > 0]


HYPOTHESES = (
    Hypothesis(
        id="I8",
        layer="inference",
        title="rotary positions are configured otherwise in the engine",
        fix="compare rope_theta, rope_scaling and --hf-overrides of both sides; serve the trainer's config.json",
        variants=_rope,
        refine=_finer,
        simulates=True,
    ),
    Hypothesis(
        id="I9",
        layer="inference",
        title="the engine's attention has a sliding window that the trainer's has not",
        fix="--disable-sliding-window, or the same sliding_window on both sides",
        variants=_window,
        refine=_finer,
        simulates=True,
    ),
    Hypothesis(
        id="I12",
        layer="inference",
        title="the attention's mask or scale is wrong in one backend",
        fix="switch the attention backend (--attention-backend) and compare again",
        variants=_mask,
        simulates=True,
    ),
    Hypothesis(
        id="I14",
        layer="inference",
        title="a soft-cap, logit scale or embedding scale is on one side only",
        fix="compare final_logit_softcapping, logit_scale and embedding scale of both configurations",
        variants=_logits,
        refine=_finer,
        simulates=True,
    ),
    Hypothesis(
        id="T10",
        layer="tokenization",
        title="padded vocabulary rows take part in the engine's softmax",
        fix="mask rows beyond the tokenizer's vocabulary on both sides",
        variants=_padded,
        refine=_finer,
        simulates=True,
    ),
)
