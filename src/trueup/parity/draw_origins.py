"""Where do wrong draws come from? S3 another temperature, S5 a filter that nobody sent, S13 anything else.

Every other distribution that a sampler may have used is asked how likely it makes the tokens. The likeliest is named if
it is far ahead of the declared one and if the tokens look like draws from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from trueup.knobs import LimitsConfig
from trueup.parity.draw_bets import CHANGED_IDS, CHANGED_PLACES
from trueup.parity.draws import Draws, independent
from trueup.parity.evidence import Case, EngineModel, Evidence, Source
from trueup.parity.report import Cause
from trueup.policy.processing import Distribution

TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0)
FILTERS: dict[str, tuple[float, ...]] = {
    "top_p": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0),
    "top_k": (0, 1, 2, 5, 10, 20, 40, 50, 100),
    "min_p": (0.0, 0.02, 0.05, 0.1, 0.2),
    "repetition_penalty": (1.0, 1.1, 1.2, 1.3),
    "presence_penalty": (0.0, 0.5, 1.0),
    "frequency_penalty": (0.0, 0.5, 1.0, 2.0),
}
"""What draws are compared with to say where they may come from."""
CHANGED = {
    CHANGED_IDS: (
        "some ids are drawn more or less often than the distribution says",
        "compare what changes single ids in the sampler with the request: logit_bias, bad_words, allowed or suppressed "
        "ids, a vocabulary that is cut; and log it with the sampling parameters",
    ),
    CHANGED_PLACES: (
        "tokens are drawn unevenly from the distribution that is declared",
        "compare the sampler's random numbers and its cumulative sums with the distribution: a generator that is "
        "seeded again, uniform numbers of low precision or from a part of [0, 1)",
    ),
}
"""Title and fix where a bet on ids, or on places in the distribution, won."""
CHANGE_DRAWS = frozenset({"S3", "S5", "S6", "S7", "S13"})
"""Causes that can change what tokens are drawn, whatever the numbers beside them say."""
LIKELIER_NATS = 7.0
"""Another distribution is named only if the tokens are a thousand times more likely under it."""
IMPOSSIBLE_NATS = 25.0
NEARLY_ALL = 0.97
FINEST_TEMPERATURE = 0.005
ROUND_NATS = 2.0
"""A round temperature is named instead of the fitted one if it costs the tokens at most so much likelihood."""


def origin_of(
    evidence: Evidence, draws: Draws, model: EngineModel, judged: Callable[[EngineModel], Draws]
) -> Cause:  # fmt: skip
    """Name where draws come from that are wrong under a model; `judged` judges them under another one.

    A distribution is named if it makes the tokens at least LIKELIER_NATS likelier than the declared one, and if they
    agree with it. Temperature 0 rules every token out that is not the most likely one.
    """
    case, tokens = evidence.case, evidence.tokens
    greedy = case.sampling.temperature == 0
    if case.unmodelled:
        return _cause(
            "S6", f"{', '.join(case.unmodelled)} changes what is drawn, and is not in the logprobs",
            "report processed logprobs (vLLM: --logprobs-mode processed_logprobs), or turn the field off for rollouts",
            draws.why,
        )  # fmt: skip
    if draws.shared_seed:
        return _cause(
            "S13", "completions of one prompt were drawn with the same random numbers",
            "give each sample a seed of its own (no fixed seed beside n > 1 or in every request), and log a row once",
            draws.why,
        )  # fmt: skip
    if draws.no_ends:
        return _cause(
            "S13", "end tokens are drawn less often than the distribution says",
            "declare min_tokens, bad_words or suppressed ids in the log's sampling parameters, or turn them off for "
            "rollouts; and log completions that ended as well as those that were cut",
            draws.why,
        )  # fmt: skip
    if draws.where and not greedy:
        cold = draws.part_top_tokens >= NEARLY_ALL * draws.part_tokens
        return _cause(
            "S3" if cold else "S13",
            f"some tokens are {'drawn greedily' if cold else 'not drawn from the distribution that is declared'}",
            "compare how these are sampled with how the others are: replicas and their versions, the first token, "
            "speculative or batched paths",
            draws.why,
        )  # fmt: skip
    if draws.bet in (CHANGED_IDS, CHANGED_PLACES):
        return _cause("S13", *CHANGED[draws.bet], draws.why)
    if draws.tokens and draws.top_tokens >= NEARLY_ALL * draws.tokens and not greedy:
        said = case.sampling.label()
        evidence_text = (
            f"{draws.why}; {draws.top_tokens} of {draws.tokens} are: the draws are greedy, though {said} is declared"
        )
        left = "temperature" in case.omitted
        fix = "make the sampler use the request's temperature (do_sample, top_k, --generation-config vllm)"
        title = "tokens are drawn greedily, though their logprobs are of the declared distribution"
        return _cause("S5" if left else "S3", title, fix, evidence_text)
    fresh_T = independent(evidence, model, LimitsConfig())[0]
    declared = _likelihood(evidence, model.source, model.dist, fresh_T)
    if greedy:
        declared = -IMPOSSIBLE_NATS * (draws.tokens - draws.top_tokens)
    likelihood, cause_id, words, dist = _likeliest(evidence, model, fresh_T)
    unknown = f"no other temperature, top-p, top-k or min-p makes the {len(tokens)} tokens likelier"
    explained = likelihood - declared >= LIKELIER_NATS
    if explained and not greedy and (again := judged(replace(model, dist=dist))).verdict == "mismatch":
        explained = False
        unknown = f"{words} makes them likelier, but they do not look like draws from it either: {again.why}"
    if not explained:
        return _cause(
            "S13", "tokens were not drawn from the distribution that is declared",
            "compare the sampler with the request: seeds, filters, the first token, speculative acceptance, and which "
            "completions were logged; no correction of ratios helps, because the logprobs are right",
            f"{draws.why}; {unknown}",
        )  # fmt: skip
    likelier = "possible" if greedy else f"{likelihood - declared:.0f} nats likelier than {case.sampling.label()}"
    text = f"{draws.why}; {words} makes the tokens {likelier}"
    titles = {
        "S3": "tokens are drawn at another temperature than the declared one",
        "S5": "tokens are drawn through a filter or penalty that no request set",
        "S13": "tokens are drawn through another filter or penalty than the declared one",
    }
    fix = (
        "make the sampler use the request's fields: --generation-config vllm, every field sent explicitly; and log "
        "every completion, because the likeliest of several look drawn colder"
    )
    return _cause(cause_id, titles[cause_id], fix, text)


def _cause(cause_id: str, title: str, fix: str, evidence: str) -> Cause:
    return Cause(
        id=cause_id, layer="semantic", title=title, confidence="high", explained=None, fix=fix, evidence=evidence,
        subject="draws",
    )  # fmt: skip


def _likeliest(evidence: Evidence, model: EngineModel, fresh_T: Tensor) -> tuple[float, str, str, Distribution]:
    """(log-likelihood, id, words, distribution) of the one under which the tokens are likeliest; a temperature is
    brought closer in steps that end at FINEST_TEMPERATURE."""

    def best(offered: Sequence[tuple[str, str, Distribution]]) -> tuple[float, str, str, Distribution]:
        evidence.prefetch(model.source, [dist for _, _, dist in offered])
        ranked = [(_likelihood(evidence, model.source, offer[2], fresh_T), *offer) for offer in offered]
        return max(ranked, key=lambda r: r[0])

    found, step = best(_offered(model.dist, evidence.case)), 0.05
    while found[1] == "S3" and step >= FINEST_TEMPERATURE:
        near = [t for sign in (-1, 1) if (t := round(found[3].temperature + sign * step, 4)) > 0]
        found = best([found[1:], *(("S3", f"T'={t:g}", replace(model.dist, temperature=t)) for t in near)])
        step /= 2
    for digits in (1, 2) if found[1] == "S3" else ():  # people write round numbers into requests
        t = round(found[3].temperature, digits)
        if (
            t > 0
            and (rounded := best([("S3", f"T'={t:g}", replace(model.dist, temperature=t))]))[0] > found[0] - ROUND_NATS
        ):
            return rounded
    return found


def _offered(dist: Distribution, case: Case) -> list[tuple[str, str, Distribution]]:
    """(id, words, distribution) of what tokens may have been drawn from instead."""
    temperatures = [t for t in TEMPERATURES if t != case.sampling.temperature]
    found = [("S3", f"T'={t:g}", replace(dist, temperature=t)) for t in temperatures]
    for name, values in FILTERS.items():
        cause_id = "S5" if name in case.omitted else "S13"
        others = [v for v in values if v != getattr(dist, name)]
        found += [(cause_id, f"{name}={v:g}", replace(dist, **{name: v})) for v in others]  # type: ignore[arg-type]
    return found


def _likelihood(evidence: Evidence, source: Source, dist: Distribution, fresh_T: Tensor) -> float:
    """Log-likelihood of independent tokens in nats; a token that the distribution rules out costs IMPOSSIBLE_NATS."""
    logprobs_T = evidence.scores(source, dist).logprobs_T.double()[fresh_T]
    return float(logprobs_T.clamp_min(-IMPOSSIBLE_NATS).sum())
