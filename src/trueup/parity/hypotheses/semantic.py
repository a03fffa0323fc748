"""SEM: the engine's number is a logprob, but of another distribution than the trainer's. S1 to S4, S6."""

from __future__ import annotations

from dataclasses import replace

from trueup.parity.bias import bias_variants, closer_bias, smallest_bias
from trueup.parity.compare import residual
from trueup.parity.evidence import EXACT, SEEN, EngineModel, Evidence
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.policy.processing import Distribution

NEWTON_STEP = 1 / 64
"""From this step of a refinement on the temperature of least squares is tried as well."""
TEMPERATURE_GRID = tuple(round(0.3 + 0.05 * i, 2) for i in range(35))
"""0.30 to 2.00: temperatures tried when the declared one does not fit."""
COLDEST = 1e-4
"""In the place of 0, at which a distribution is not defined."""
NEAR_DECLARED = (0.98, 0.99, 0.995, 1.005, 1.01, 1.02)
"""Between the declared temperature and its neighbours on the grid, from where a search finds the rest."""


OWN_PENALTIES: dict[str, tuple[float, ...]] = {
    "repetition_penalty": (1.1, 1.3),
    "presence_penalty": (0.5, 1.2),
    "frequency_penalty": (0.5,),
}
"""Penalties that an engine may apply to every request, where a search starts."""


def _with(model: EngineModel, detail: str, **changes: object) -> list[Variant]:
    dist = replace(model.dist, **changes)  # type: ignore[arg-type]
    return [Variant(model=replace(model, dist=dist), detail=detail)] if dist != model.dist else []


def _raw(evidence: Evidence, model: EngineModel) -> list[Variant]:
    if model.dist == Distribution() or evidence.case.trainer_distribution == Distribution():
        return []
    detail = "engine fits the trainer's raw logprobs (T'=1, no penalties, full vocabulary)"
    return [Variant(model=replace(model, dist=Distribution()), detail=detail)]


def _raw_unseeable(evidence: Evidence) -> str | None:
    if evidence.case.trainer_distribution != Distribution():
        return None
    if not evidence.case.sampling.transforms:
        return "at T=1 without truncation or penalties raw and processed logprobs are the same number"
    return "the trainer compares raw logprobs here, so a raw engine agrees with it"


def _temperature_applied(evidence: Evidence, model: EngineModel) -> list[Variant]:
    declared = evidence.case.processed.temperature
    if evidence.case.trainer_distribution.temperature != 1 or model.dist.temperature != 1:
        return []
    return _with(model, f"engine fits T'={declared:g}; the trainer does not divide by T", temperature=declared)


def _temperature_unseeable(evidence: Evidence) -> str | None:
    if evidence.case.processed.temperature == 1:
        return "the declared temperature is 1"
    return None if evidence.case.trainer_distribution.temperature == 1 else "the trainer divides by T itself"


def _wrong_temperature(evidence: Evidence, model: EngineModel) -> list[Variant]:
    declared = evidence.case.processed.temperature
    if "temperature" in evidence.case.omitted:  # then it is the engine's default: S5
        return []
    if evidence.case.sampling.temperature == 0:
        return _after_the_argmax(model) + _reported_at(model)
    if model.dist.temperature not in (declared, evidence.case.trainer_distribution.temperature):
        return []
    near = {round(declared * factor, 6) for factor in NEAR_DECLARED}
    variants: list[Variant] = []
    variants += _divided(model, declared)
    candidates = {round(declared**2, 6), 1.0, *evidence.case.other_temperatures, *TEMPERATURE_GRID, *near}
    for temperature in sorted(candidates - {declared, model.dist.temperature}):
        if temperature <= 0:
            continue
        twice = f" = {declared:g} squared: applied twice" if temperature == round(declared**2, 6) else ""
        variants += _with(
            model, f"engine fits T'={temperature:g}{twice}, not the declared {declared:g}", temperature=temperature
        )
    return variants


def _after_the_argmax(model: EngineModel) -> list[Variant]:
    """At temperature 0 some engines report the logprob of the only token that is left."""
    found = _with(model, "engine's numbers are those of the argmax: 0 at every token", temperature=COLDEST)
    title = "logprobs of greedy tokens are taken after the argmax: each is 0"
    fix = "report greedy tokens before the argmax (raw), or leave them out of what is compared and trained on"
    top = [replace(v.model, entry="top") for v in found]  # near equals change places in 16 bits
    return [replace(v, model=m, title=title, fix=fix, only_reported=True) for v, m in zip(found, top, strict=True)]


def _reported_at(model: EngineModel) -> list[Variant]:
    """Greedy tokens are compared at T=1; an engine may have divided by a temperature all the same."""
    found = [
        v
        for t in TEMPERATURE_GRID
        if t != model.dist.temperature
        for v in _with(model, f"greedy tokens are reported at T'={t:g}, where raw logprobs are expected", temperature=t)
    ]
    return [replace(v, only_reported=True) for v in found]


def _divided(model: EngineModel, declared: float) -> list[Variant]:
    """The raw logprob divided by T: what comes of tempering after the softmax; or the tempered one, once more. Nothing
    sums to 1 any more."""
    if declared == 1 or model.factor != 1:
        return []
    return [
        Variant(
            model=replace(model, dist=dist, factor=1 / declared),
            detail=f"engine fits the {kind} logprob divided by T={declared:g}, not renormalised",
            title=f"logprobs are divided by the temperature, {instead}",
            fix="divide logits by T before log_softmax; a logprob divided by T is not one of any distribution",
            only_reported=True,
        )
        for kind, dist, instead in (("raw", Distribution(), "not logits"), ("tempered", model.dist, "logits as well"))
    ]


def _truncation(evidence: Evidence, model: EngineModel) -> list[Variant]:
    dist = evidence.case.processed
    if model.dist.truncates:
        detail = "engine's logprobs are of the full vocabulary; the trainer renormalises on the kept set"
        return _with(model, detail, top_p=1.0, top_k=0, min_p=0.0) + _temperature_last(model)
    named = " ".join(f"{n}={getattr(dist, n):g}" for n in ("top_p", "top_k", "min_p") if getattr(dist, n) not in (0, 1))
    detail = f"engine renormalises on the kept set ({named}), the trainer scores the full vocabulary: r = log S"
    changes = {n: getattr(dist, n) for n in ("top_p", "top_k", "min_p", "min_p_first")}
    found = _with(model, detail, **changes) if dist.truncates else []
    return [replace(v, side="trainer") for v in found]


def _temperature_last(model: EngineModel) -> list[Variant]:
    """The kept set of T=1, tempered afterwards: it shows at other temperatures, where a mass is measured."""
    if model.dist.temperature == 1 or (model.dist.top_p == 1 and not model.dist.min_p):
        return []
    found = _with(model, "engine measures the kept set at T=1 and applies the temperature last", temperature_last=True)
    title = "the engine measures the kept set of top-p or min-p before the temperature, the trainer after it"
    fix = "one order on both sides (vLLM: temperature first), or top_p=1 and min_p=0 for rollouts"
    return [replace(v, title=title, fix=fix) for v in found]


def _truncation_unseeable(evidence: Evidence) -> str | None:
    return None if evidence.case.processed.truncates else "no top-p, top-k or min-p is declared"


def _closer_temperature(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    value, declared = variant.model.dist.temperature, evidence.case.processed.temperature
    if variant.model.factor != 1 or value == COLDEST:  # what was divided, or is certain, has no temperature to move
        return []
    near = [t for sign in (-1, 1) if (t := round(value + sign * 0.04 * step, 4)) > 0 and t != declared]
    if step <= NEWTON_STEP and (best := _least_squares(evidence, variant.model)) is not None:
        near += [t for digits in (4, 7) if (t := round(best, digits)) > 0]
    greedy = evidence.case.sampling.temperature == 0
    detail = "greedy tokens are reported at T'={:g}" if greedy else "engine fits T'={:g}, not the declared {:g}"
    found = [v for t in near if t != declared for v in _with(variant.model, detail.format(t, declared), temperature=t)]
    return [replace(v, only_reported=True) for v in found] if greedy else found


def _least_squares(evidence: Evidence, model: EngineModel) -> float | None:
    """The temperature at which the squared residuals would be smallest if they were linear in it: in float32 a
    hundred-thousandth of a nat decides whether a temperature explains a gap."""
    value = model.dist.temperature
    width = 1e-3 * value
    now, moved = (
        residual(evidence, replace(model, dist=replace(model.dist, temperature=t))) for t in (value, value + width)
    )
    both_T = now.usable_T & moved.usable_T
    slope_T = (moved.residual_T - now.residual_T)[both_T] / width
    size = float(slope_T @ slope_T)
    return value - float(now.residual_T[both_T] @ slope_T) / size if size > 0 else None


def _penalties(evidence: Evidence, model: EngineModel) -> list[Variant]:
    counted = [*_other_tokens(model)] if model.dist.penalises else []
    return [*_declared_penalties(evidence, model), *counted, *bias_variants(evidence, model)]


def _other_tokens(model: EngineModel) -> list[Variant]:
    """The declared penalties, counted over other tokens than vLLM counts."""
    if not model.source.plain:
        return []
    return [
        Variant(
            model=replace(model, source=replace(EXACT, seen=name)),
            detail=f"the engine's penalties count {words}",
            title="the engine's penalties count other tokens than the trainer's",
            fix="repetition_penalty sees prompt and completion, presence and frequency the completion (as in vLLM); or "
            "turn penalties off for rollouts",
        )
        for name, words in SEEN.items()
    ]


def _declared_penalties(evidence: Evidence, model: EngineModel) -> list[Variant]:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    if model.dist.penalises:
        plain = Distribution()
        detail = "engine's logprobs ignore the declared penalties; the trainer applies them"
        return _with(model, detail, **{n: getattr(plain, n) for n in names})
    detail = "engine applies the declared penalties, the trainer does not"
    found = _with(model, detail, **{n: getattr(evidence.case.processed, n) for n in names})
    return [replace(v, side="trainer") for v in found] or _own_penalties(evidence, model)


def _own_penalties(evidence: Evidence, model: EngineModel) -> list[Variant]:
    """Penalties that no request asked for and that every request gets; where fields are left out S5 looks for them."""
    if model.dist.penalises:
        return []
    return [
        v
        for name, values in OWN_PENALTIES.items()
        if name not in evidence.case.omitted
        for value in values
        for v in _with(model, f"the engine applies {name}={value:g} of its own", **{name: value})
    ]


def _smallest_penalties(evidence: Evidence, model: EngineModel) -> list[Variant]:
    counted = _other_tokens(model) if model.dist.penalises else []
    return [*_declared_penalties(evidence, model), *counted, *smallest_bias(evidence, model)]


def _closer_penalty(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    """Neighbours of a penalty that was found, or of a fitted bias."""
    if variant.model.bias is not None:
        return closer_bias(evidence, variant, step)
    dist, declared = variant.model.dist, evidence.case.processed
    moved = [n for n in OWN_PENALTIES if getattr(dist, n) != getattr(declared, n)]
    if len(moved) != 1 or declared.penalises:
        return []
    name, value = moved[0], getattr(dist, moved[0])
    near = [round(value + sign * 0.1 * step, 4) for sign in (-1, 1)]
    return [
        v
        for n in near
        if n > 0 or name != "repetition_penalty"
        for v in _with(variant.model, f"the engine applies {name}={n:g} of its own", **{name: n})
    ]


HYPOTHESES = (
    Hypothesis(
        id="S1",
        layer="semantic",
        title="engine returns raw logprobs, trainer needs processed",
        fix="--logprobs-mode processed_logprobs",
        variants=_raw,
        unseeable=_raw_unseeable,
    ),
    Hypothesis(
        id="S2",
        layer="semantic",
        title="trainer does not apply the temperature the engine samples with",
        fix="divide the trainer's logits by the rollout's temperature before log_softmax",
        variants=_temperature_applied,
        side="trainer",
        unseeable=_temperature_unseeable,
    ),
    Hypothesis(
        id="S3",
        layer="semantic",
        title="engine's temperature is not the declared one",
        fix="store the temperature with each rollout and apply it once, on one side only",
        variants=_wrong_temperature,
        refine=_closer_temperature,
        redraws=True,
    ),
    Hypothesis(
        id="S4",
        layer="semantic",
        title="only one side renormalises over the kept set of top-p, top-k or min-p",
        fix="set top_p=1, top_k=0 and min_p=0 for rollouts, or replay the sampling mask in the trainer",
        variants=_truncation,
        unseeable=_truncation_unseeable,
        may_redraw=True,
    ),
    Hypothesis(
        id="S6",
        layer="semantic",
        title="penalties or a logit bias are in the logprobs of one side only",
        fix="turn penalties, logit_bias, bad_words and min_tokens off for rollouts, or replay them in the trainer",
        variants=_penalties,
        refine=_closer_penalty,
        smallest=_smallest_penalties,
        may_redraw=True,
    ),
)
