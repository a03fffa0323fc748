"""INF and TOK: right weights in a model that is configured otherwise. I8, I9, I12, I14, and T10 for padded rows."""

from __future__ import annotations

import json
from dataclasses import replace

from trueup.model.altered import words_of
from trueup.parity.evidence import EXACT, TRAINER, EngineModel, Evidence, HeadEdit
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.recipe import as_mapping, flag_of

THETA_FACTORS = (0.03, 0.1, 0.3, 0.6, 0.9, 1.1, 1.6, 3.0, 10.0, 30.0)
LINEAR_FACTORS = (1.05, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WINDOWS = (4, 8, 16, 32, 64, 128, 256, 512)
SOFTCAPS = (2.0, 4.0, 8.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0)
SCALES = (0.5, 0.7, 0.85, 0.95, 0.99, 1.01, 1.05, 1.2, 1.5, 2.0)
SCALING_FACTORS = (2.0, 4.0, 8.0)
USUAL_BASES = (10_000.0, 500_000.0, 1_000_000.0)
ROPE_FLAGS = ("rope_scaling", "rope_parameters", "rope_theta")
WORDS = {
    "window_ignored": (
        "the engine's attention ignores the sliding window that the trainer's has",
        "serve with the window (no --disable-sliding-window, a backend that knows windows), or train without it",
    ),
    "window_resized": (
        "the engine's sliding window is not as wide as the trainer's",
        "the same sliding_window on both sides: serve the trainer's config.json",
    ),
    "rope_unscaled": (
        "the engine leaves out the rotary scaling that the trainer's configuration asks for",
        "serve the trainer's config.json, or pass its rope_parameters (--hf-overrides), or train without",
    ),
}
"""Titles and fixes of cases that differ from the usual one."""
PADDED = tuple(2**k for k in range(11))
DENSE = 16
"""Windows that are tried around the best one."""
OCTAVE = 1.4
"""A step of 1 multiplies or divides a number by this; rotary bases are searched ten times as widely."""


def _altered(model: EngineModel, name: str, value: float) -> Variant:
    source = replace(EXACT, simulation=(name, value))
    variant = Variant(
        model=replace(model, source=source), detail=f"the engine computes like a model with {words_of(name, value)}"
    )
    title, fix = WORDS.get(name, ("", ""))
    return replace(variant, title=title, fix=fix)


def _edited(model: EngineModel, head: HeadEdit, words: str) -> Variant:
    return Variant(model=replace(model, source=replace(EXACT, head=head)), detail=f"engine fits {words}")


def declared_rope(evidence: Evidence) -> str | None:
    """The rotary parameters that the engine's own flags declare, as JSON; None if they declare none."""
    flags = evidence.case.engine.flags
    given = dict(as_mapping(flag_of(flags, "hf_overrides")))
    given |= {name: value for name in ROPE_FLAGS if (value := flag_of(flags, name)) is not None}
    found: dict[str, object] = {}
    for name in ("rope_scaling", "rope_parameters"):
        found |= as_mapping(given.get(name))
    if isinstance(given.get("rope_theta"), int | float):
        found["rope_theta"] = given["rope_theta"]
    return json.dumps(found, sort_keys=True, default=str) if found else None


def _rope(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """What the flags declare, no scaling, other scalings, other bases; in one type of layer where there are several."""
    if not model.source.plain:
        return []
    facts = evidence.facts
    declared = declared_rope(evidence)
    found = [_altered(model, f"rope_declared@{declared}", 0.0)] if declared else []
    found += [_altered(model, "rope_unscaled", 0.0)] if facts.rope_scaled else []
    found += [_altered(model, name, factor) for name in ("rope_yarn", "rope_llama3") for factor in SCALING_FACTORS]
    for layers in ("", *(f"@{name}" for name in facts.rope_layers)):
        bases = {facts.rope_theta * factor for factor in THETA_FACTORS} | ({*USUAL_BASES} if layers else set())
        found += [_altered(model, f"rope_theta{layers}", base) for base in sorted(bases - {facts.rope_theta})]
        found += [_altered(model, f"rope_linear{layers}", factor) for factor in LINEAR_FACTORS]
    return found


def _window(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """A window where there should be none; where there is one, none or another."""
    if not model.source.plain:
        return []
    longest = max(len(p) for p in evidence.tokens.prompts) + int(evidence.tokens.position_T.max())
    own = evidence.facts.window
    found = [_altered(model, "window_ignored", 0.0)] if own is not None else []
    name = "window" if own is None else "window_resized"
    return found + [_altered(model, name, w) for w in WINDOWS if w < longest and w != own]


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
    multiples = {-vocab % multiple for multiple in (64, 128, 256, 512, 1024, 4096)} - {0}
    return [
        _with_rows(replace(model, source=ground), count)
        for ground in (EXACT, TRAINER)  # few rows leave less than a change of precision does
        for count in sorted(multiples | set(PADDED))
    ]


def _with_rows(model: EngineModel, count: int) -> Variant:
    words = f"a softmax over {count} rows more than the vocabulary has"
    source = replace(model.source, head=HeadEdit(padded_rows=count))
    return Variant(model=replace(model, source=source), detail=f"engine fits {words}")


def _finer(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """Neighbours of the one number in a variant; whole numbers move by at least 1."""
    source, head, model = variant.model.source, variant.model.source.head, variant.model
    factors = (OCTAVE**step, OCTAVE**-step)
    if source.simulation is not None:
        name, value = source.simulation
        kind = name.partition("@")[0]
        if kind in ("window", "window_resized"):
            near = every_neighbour(value) if step == 1 else whole_neighbours(value, step)
            return [_altered(model, name, n) for n in near]
        wider = (factors[0] ** 3, factors[1] ** 3) if kind == "rope_theta" else factors
        if kind not in ("rope_theta", "rope_linear", "rope_yarn", "rope_llama3", "embedding_scale"):
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


def every_neighbour(value: float) -> list[int]:
    """Up to DENSE whole numbers, at most a third away. Windows beside the right one fit no better than distant ones."""
    distance = max(1, round(value / 3))
    stride = -(-2 * distance // DENSE)
    return [n for n in range(int(value) - distance, int(value) + distance + 1, stride) if n > 0 and n != value]


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
