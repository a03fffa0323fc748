"""TOK: the model saw another prompt than the one that is scored. T3 re-tokenized, T4 BOS, T5 template, T9 cut."""

from __future__ import annotations

from dataclasses import replace

from trueup.parity import context
from trueup.parity.evidence import EXACT, EngineModel, Evidence
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.hypotheses.configuration import whole_neighbours

CUTS = (4, 8, 16, 32, 64, 128, 256, 512)
WORDS = {
    context.RETOKENIZED: "decoded and encoded again",
    context.BOS_ADDED: "with a BOS token in front",
    context.BOS_REMOVED: "without its BOS token",
    context.TEMPLATED: "wrapped in the chat template",
    context.SYSTEM_ADDED: "with the template's default system turn in front",
    context.GENERATION_PROMPT: "without the opening of the assistant's turn",
    context.BOS_TWICE: "with two BOS tokens in front",
}
SEPARATED = {
    f"{kind}{separator}": f"{words} {name} {where}"
    for separator, name in context.SEPARATORS.items()
    for kind, words, where in (
        (context.BEHIND, "with", "behind them"),
        (context.IN_FRONT, "with", "in front of them"),
        (context.NOT_BEHIND, "without", "at their end"),
    )
}


def _in(model: EngineModel, name: str, words: str) -> Variant:
    return Variant(
        model=replace(model, source=replace(EXACT, context=name)), detail=f"the engine saw the prompts {words}"
    )


def _offered(evidence: Evidence, model: EngineModel, *names: str) -> list[Variant]:
    if not model.source.plain:
        return []
    return [_in(model, name, (WORDS | SEPARATED)[name]) for name in names if name in evidence.facts.contexts]


def _cut(evidence: Evidence, model: EngineModel) -> list[Variant]:
    longest = max(len(p) for p in evidence.tokens.prompts)
    if not model.source.plain:
        return []
    return [_last(model, count) for count in CUTS if count < longest]


def _last(model: EngineModel, count: int) -> Variant:
    return _in(model, f"{context.LAST}{count}", f"cut to their last {count} tokens")


def _closer_cut(evidence: Evidence, variant: Variant, step: float) -> list[Variant]:
    name = variant.model.source.context
    assert name is not None
    return [_last(variant.model, n) for n in whole_neighbours(int(name.removeprefix(context.LAST)), step)]


def _short(evidence: Evidence) -> str | None:
    return None if evidence.facts.contexts else "no prompt here would be another one after re-tokenizing"


HYPOTHESES = (
    Hypothesis(
        id="T3",
        layer="tokenization",
        title="the prompt was decoded to text and tokenized again",
        fix="send token ids and take token ids back (token-in, token-out); never re-encode earlier turns",
        variants=lambda e, m: _offered(e, m, context.RETOKENIZED),
        unseeable=_short,
        simulates=True,
    ),
    Hypothesis(
        id="T4",
        layer="tokenization",
        title="a BOS token is doubled or missing",
        fix="send token ids, or set add_special_tokens=false where the template writes BOS itself",
        variants=lambda e, m: _offered(e, m, context.BOS_ADDED, context.BOS_TWICE, context.BOS_REMOVED),
        simulates=True,
    ),
    Hypothesis(
        id="T5",
        layer="tokenization",
        title="the engine renders another chat template than the trainer",
        fix="render the template once, in the trainer, and send token ids; or ship the same template file to both",
        variants=lambda e, m: _offered(
            e, m, context.TEMPLATED, context.SYSTEM_ADDED, context.GENERATION_PROMPT, *SEPARATED
        ),
        simulates=True,
    ),
    Hypothesis(
        id="T9",
        layer="tokenization",
        title="long prompts are cut before the model sees them",
        fix="raise --max-model-len, unset truncate_prompt_tokens, and refuse prompts that do not fit",
        variants=_cut,
        refine=_closer_cut,
        simulates=True,
    ),
)
