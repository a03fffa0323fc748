"""parity/draws.py: were tokens drawn from the distribution that is declared, and if not, from which one?"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import binom
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity import draws as draws_module
from trueup.parity.draw_origins import IMPOSSIBLE_NATS, ROUND_NATS, _likeliest, _likelihood, origin_of
from trueup.parity.draw_parts import NOISE_SIGMAS, Drawn, contexts
from trueup.parity.draws import (
    EXACT_COUNT,
    SKEW,
    STATISTICS,
    TOO_FEW_FIRST,
    _among_others,
    _blind,
    _surprise,
    independent,
    is_top,
    judge_draws,
    shared_beginning,
    top_count_chance,
)  # fmt: skip
from trueup.parity.evidence import TRAINER, EngineModel
from trueup.parity.facts import Facts
from trueup.parity.floor import normal_quantile
from trueup.policy.processing import Distribution
from trueup.policy.reduction import TokenScores
from trueup.types import LogprobKind, SamplingParams

LENGTH, ROWS = 25, 160
LIMITS = LimitsConfig()
LOGITS = logits_of(LENGTH * ROWS)
CLOSE = {"noise_rms": 0.0, "token_limit": 0.01}


def model_of(evidence):
    return EngineModel(dist=evidence.case.processed)


def judged(targets_T, logits_TV=LOGITS, *, length=LENGTH, noise_rms=0.0, whatever_length=False, prompts=None, **knobs):
    """(draws, origin or None) of tokens against a table."""
    evidence = evidence_of(logits_TV, trace_rows(targets_T, length, prompts=prompts), **knobs)
    model = model_of(evidence)

    def by(model):
        return judge_draws(
            evidence, model, LIMITS, noise_rms=noise_rms, token_limit=0.01, whatever_length=whatever_length
        )  # fmt: skip

    draws = by(model)
    return draws, origin_of(evidence, draws, model, by) if draws.verdict == "mismatch" else None


def test_honest_draws_agree_and_what_was_counted_is_what_is_there():
    targets_T = drawn(LOGITS)
    draws, _ = judged(targets_T)
    probability_TV = LOGITS.softmax(1)
    top_T = targets_T == LOGITS.argmax(1)
    first_T = torch.arange(len(targets_T)) % LENGTH == 0
    assert draws.verdict == "agree" and draws.why == "as the distribution says" and draws.blind == ""
    assert (draws.tokens, draws.copies, draws.shared_seed) == (len(targets_T), 0, False)
    assert (draws.top_tokens, draws.first_tokens, draws.first_top) == (
        int(top_T.sum()),
        ROWS,
        int(top_T[first_T].sum()),
    )
    assert draws.top_expected == pytest.approx(float(probability_TV.amax(1).sum()))
    assert draws.first_expected == pytest.approx(float(probability_TV.amax(1)[first_T].sum()))
    surprise_TV = -probability_TV.log()
    entropy_T = (probability_TV * surprise_TV).sum(1)
    variance_T = (probability_TV * surprise_TV.square()).sum(1) - entropy_T.square()
    offset = float((surprise_TV.gather(1, targets_T[:, None])[:, 0] - entropy_T).sum())
    assert draws.surprise_z == pytest.approx(offset / math.sqrt(float(variance_T.sum())))


def test_hundreds_of_honest_samples_agree():
    part = LOGITS[: 40 * LENGTH]
    verdicts = [judged(drawn(part, seed=seed), part)[0].verdict for seed in range(100, 300)]
    assert verdicts == ["agree"] * len(verdicts)


@pytest.mark.parametrize(("temperature", "sign", "words"), [(0.7, -1, "less"), (1.5, 1, "more")])
def test_colder_and_hotter_draws_are_named_by_their_temperature(temperature, sign, words):
    draws, origin = judged(drawn(LOGITS, temperature=temperature))
    assert draws.verdict == "mismatch" and f"{words} surprising" in draws.why and draws.surprise_z * sign > 4
    assert f"(z {draws.surprise_z:+.1f})" in draws.why
    assert origin.id == "S3" and f"T'={temperature:g} makes the tokens" in origin.evidence
    assert "--generation-config vllm" in origin.fix and origin.title.startswith(
        "tokens are drawn at another temperature"
    )
    assert origin.confidence == "high" and origin.subject == "draws" and origin.layer == "semantic"
    likelier = float(
        ((LOGITS / temperature).log_softmax(1) - LOGITS.log_softmax(1))
        .gather(1, drawn(LOGITS, temperature=temperature)[:, None])
        .sum()
    )
    assert f"{likelier:.0f} nats likelier than temperature=1" in origin.evidence


@pytest.mark.parametrize(("omitted", "cause"), [((), "S13"), (("top_k",), "S5")])
def test_a_filter_that_reaches_only_the_draws_is_named(omitted, cause):
    draws, origin = judged(drawn(LOGITS, top_k=2), omitted=omitted)
    assert draws.verdict == "mismatch" and origin.id == cause and "top_k=2 makes" in origin.evidence
    words = "through a filter or penalty that no request set" if omitted else "through another filter or penalty than"
    assert origin.title.startswith("tokens are drawn") and words in origin.title and "every field" in origin.fix


@pytest.mark.parametrize(("omitted", "cause"), [((), "S3"), (("temperature",), "S5")])
def test_greedy_draws_are_said_to_be_greedy(omitted, cause):
    draws, origin = judged(LOGITS.argmax(1), omitted=omitted)
    assert draws.verdict == "mismatch" and draws.top_tokens == draws.tokens == len(LOGITS)
    assert f"{len(LOGITS)} of {len(LOGITS)} tokens are the most likely one" in draws.why
    assert origin.id == cause and "drawn greedily" in origin.title and "the request's temperature" in origin.fix
    assert "the draws are greedy, though temperature=1 is declared" in origin.evidence and draws.why in origin.evidence


def test_tokens_that_no_other_distribution_makes_likelier_stay_without_one():
    """Only first tokens are greedy: neither a temperature nor a filter does that."""
    logits_TV = logits_of(LENGTH * ROWS, scale=0.3)
    targets_T = drawn(logits_TV)
    targets_T[::LENGTH] = logits_TV[::LENGTH].argmax(1)
    draws, origin = judged(targets_T, logits_TV)
    assert draws.verdict == "mismatch" and f"{ROWS} of {ROWS} first tokens are the most likely one" in draws.why
    assert "not drawn from the distribution" in origin.title and "no correction of ratios helps" in origin.fix
    assert origin.id == "S13" and f"makes the {len(logits_TV)} tokens likelier" in origin.evidence


def replicas_of(count):
    return [f"gpu{row % count}" for row in range(ROWS)]


def named_replicas(targets_T, names):
    rows = [replace(r, replica=name) for r, name in zip(trace_rows(targets_T, LENGTH), names, strict=True)]
    evidence = evidence_of(LOGITS, rows)

    def by(model):
        return judge_draws(evidence, model, LIMITS, **CLOSE)

    draws = by(model_of(evidence))
    return draws, origin_of(evidence, draws, model_of(evidence), by) if draws.verdict == "mismatch" else None


def test_one_row_that_is_greedy_is_found_and_named_by_its_line():
    targets_T, row_T = drawn(LOGITS), torch.arange(len(LOGITS)) // LENGTH
    targets_T = torch.where(row_T == 7, LOGITS.argmax(1), targets_T)
    draws, origin = judged(targets_T)
    assert draws.verdict == "mismatch" and draws.where.startswith(f"line 8: {LENGTH} of {LENGTH} tokens are the most")
    assert abs(draws.surprise_z) < 4 and origin.id == "S3" and origin.title == "some tokens are drawn greedily"
    assert "line 8" in origin.evidence and "how the others are" in origin.fix


def test_one_position_that_is_greedy_is_found():
    targets_T, position_T = drawn(LOGITS), torch.arange(len(LOGITS)) % LENGTH
    draws, origin = judged(torch.where(position_T == 3, LOGITS.argmax(1), targets_T))
    assert draws.where.startswith(f"token 3 of the completions: {ROWS} of {ROWS}") and origin.id == "S3"


def test_replicas_whose_faults_cancel_are_found_apart():
    warm_T, cold_T = (drawn(LOGITS, temperature=t) for t in (1.25, 0.83))
    row_T, names = torch.arange(len(LOGITS)) // LENGTH, replicas_of(2)
    draws, origin = named_replicas(torch.where(row_T % 2 == 0, warm_T, cold_T), names)
    assert draws.verdict == "mismatch" and "replica gpu" in draws.why and origin.id == "S13"
    assert abs(draws.surprise_z) < 3 and "not drawn from the distribution" in origin.title
    assert named_replicas(drawn(LOGITS), names)[0].verdict == "agree"


def test_halves_of_completions_are_judged_apart():
    later_T = torch.arange(len(LOGITS)) % LENGTH >= (LENGTH + 1) // 2
    draws, _ = judged(torch.where(later_T, drawn(LOGITS, temperature=1.3), drawn(LOGITS, temperature=0.75)))
    assert draws.verdict == "mismatch" and "halves of the completions" in draws.why


def test_contexts_are_the_same_up_to_where_completions_part():
    rows = trace_rows(torch.tensor([5, 6, 7, 5, 6, 8, 5, 9, 7, 5, 6, 7]), 3, prompts=[1, 1, 1, 2])
    found = contexts(evidence_of(torch.zeros(12, 10), rows).tokens).view(4, 3).tolist()
    assert found[0] == found[1] and found[2][:2] == found[0][:2] and found[2][2] != found[0][2]
    assert not set(found[3]) & set(found[0]) and len({*found[0]}) == 3


def test_rounding_brings_a_count_closer_to_its_expectation_and_not_beyond():
    def counted(seen, noise_rms, same):
        top_T = torch.arange(100) < seen
        zeros_T = torch.zeros(100)
        context_T = torch.zeros(100).long() if same else torch.arange(100)
        half_T = torch.full((100,), 0.5, dtype=torch.float64)
        return Drawn(
            top_T=top_T, chance_T=half_T, offset_T=zeros_T, variance_T=zeros_T, context_T=context_T
        ).counted(noise_rms)  # fmt: skip

    assert counted(80, 0.0, False) == 80 and counted(20, 0.0, False) == 20
    assert counted(80, 0.05, False) < 80 and counted(20, 0.05, False) > 20
    assert counted(80, 0.05, True) < counted(80, 0.05, False), "what is rounded alike moves alike"
    assert counted(80, 5.0, True) == 50 == counted(20, 5.0, True)
    moved = 1 / (1 + math.exp(-2 * math.sqrt(2) * 0.3)) - 0.5  # of each probability, at two times 0.3 nats a logit
    assert counted(100, 0.3, False) == math.ceil(100 - NOISE_SIGMAS * math.sqrt(100) * moved)


def test_tokens_that_are_greedy_at_random_are_no_other_temperature():
    """T'=0.8 makes them likelier, and has as few of the most likely tokens as any temperature."""
    greedy_T = torch.rand(len(LOGITS), generator=torch.Generator().manual_seed(4)) < 0.4
    origin = judged(torch.where(greedy_T, LOGITS.argmax(1), drawn(LOGITS)))[1]
    assert (
        origin.id == "S13" and "makes them likelier, but they do not look like draws from it either" in origin.evidence
    )


def test_few_first_tokens_are_known_to_show_nothing():
    draws, _ = judged(drawn(LOGITS), length=LENGTH * ROWS // 2)
    assert draws.verdict == "agree" and draws.first_tokens == 2 and draws.blind == TOO_FEW_FIRST


def test_too_few_tokens_are_not_judged():
    few = LIMITS.min_tokens - 1
    draws, _ = judged(drawn(LOGITS[:few]), LOGITS[:few])
    assert draws.verdict == "not judged" and draws.why == f"{few} independent tokens are too few (64 needed)"
    assert judged(drawn(LOGITS[: few + 1]), LOGITS[: few + 1])[0].verdict == "agree"


def test_at_temperature_0_each_token_has_to_be_the_most_likely_one():
    greedy, targets_T = SamplingParams(temperature=0.0), LOGITS.argmax(1)
    draws, _ = judged(targets_T, sampling=greedy)
    assert draws.verdict == "agree" and draws.tokens == draws.top_tokens == draws.top_expected == len(LOGITS)
    targets_T[3] = LOGITS[3].argmin()
    draws = judge_draws(
        evidence := evidence_of(LOGITS, trace_rows(targets_T, LENGTH), sampling=greedy),
        model_of(evidence),
        LIMITS,
        **CLOSE,
    )
    assert draws.verdict == "mismatch" and f"1 of {len(LOGITS)} tokens are not the most likely one" in draws.why
    tie_TV = LOGITS.clone()
    tie_TV[3, targets_T[3]] = LOGITS[3].amax() - 0.009
    assert judged(targets_T, tie_TV, sampling=greedy)[0].verdict == "agree", "as likely as rounding can tell"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_draws_where_temperature_0_was_declared_are_named_by_their_temperature(temperature):
    draws, origin = judged(drawn(LOGITS, temperature=temperature), sampling=SamplingParams(temperature=0.0))
    assert draws.verdict == "mismatch" and origin.id == "S3"
    assert f"T'={temperature:g} makes the tokens possible" in origin.evidence
    targets_T = LOGITS.argmax(1)
    targets_T[3] = LOGITS[3].argmin()
    assert judged(targets_T, sampling=SamplingParams(temperature=0.0))[1].id == "S13", "one token is no temperature"


def test_tokens_outside_the_declared_kept_set_are_no_draws_from_it():
    targets_T = drawn(LOGITS, top_k=10)
    targets_T[5] = LOGITS[5].argmin()
    draws, _ = judged(targets_T, sampling=SamplingParams(top_k=10))
    assert draws.tokens == len(targets_T) - 1 and draws.verdict == "agree"


def test_rounding_is_given_half_of_its_square_and_more():
    """An engine draws from its own rounding of the distribution: so many nats of surprise are no sign of anything."""
    targets_T = drawn(LOGITS)
    plain, wide = judged(targets_T)[0].surprise_z, judged(targets_T, noise_rms=1.0)[0].surprise_z
    assert plain != 0 and wide == 0
    scores = TokenScores(
        **{n: torch.zeros(4) for n in ("log_kept_mass_T", "kept_T", "top_logprobs_T")},
        logprobs_T=torch.full((4,), -3.0), entropy_T=torch.ones(4), varentropy_T=torch.ones(4),
    )  # fmt: skip
    usable_T = torch.tensor([True, True, True, False])
    assert _surprise(scores, usable_T, slack=0.0) == pytest.approx(6 / math.sqrt(3))
    assert _surprise(scores, usable_T, slack=2.0) == pytest.approx(4 / math.sqrt(3))
    assert _surprise(replace(scores, varentropy_T=torch.zeros(4)), usable_T, slack=0.0) == 0
    narrow = replace(scores, varentropy_T=torch.full((4,), 0.12))
    assert _surprise(narrow, usable_T, slack=0.0) == pytest.approx(10.0, rel=1e-6), "less than one nat of spread, too"


@pytest.mark.parametrize(("trials", "tolerance"), [(60, 1e-9), (EXACT_COUNT, 1e-9), (4 * EXACT_COUNT, 0.1)])
@pytest.mark.parametrize("share", [0.27, 0.29, 0.3, 0.315, 0.33])
def test_the_chance_of_a_count_is_that_of_the_nearer_tail(trials, tolerance, share):
    seen = int(share * trials)
    tail = min(binom.cdf(seen, trials, 0.3), binom.sf(seen - 1, trials, 0.3))
    found = top_count_chance(torch.full((trials,), 0.3, dtype=torch.float64), seen)
    assert found == pytest.approx(tail, rel=tolerance)


def test_chances_beyond_one_are_certainties():
    assert top_count_chance(torch.tensor([1.0000001, 0.5]), 1) == pytest.approx(0.5)
    assert top_count_chance(torch.ones(600), 600) == 0.5
    sure_T = torch.full((4 * EXACT_COUNT,), 1 - 1e-5, dtype=torch.float64)
    assert top_count_chance(sure_T, len(sure_T) - 3) < 1e-9, "three of thousands that were as good as certain"


@pytest.mark.parametrize(
    ("first", "second", "shared"), [((1, 2, 3), (1, 2, 4), 2), ((1, 2), (1, 2, 3), 2), ((5,), (6,), 0), ((), (1,), 0)]
)
def test_a_beginning_is_shared_up_to_the_first_difference(first, second, shared):
    assert shared_beginning(first, second) == shared


def test_copies_that_chance_explains_are_draws_like_any_other():
    """Short answers of one prompt repeat: leaving them out would leave what is too surprising."""
    logits_TV = torch.zeros(16, 8, dtype=torch.float64)
    logits_TV[:, [4, 5, 6]] = 3.0
    rows = trace_rows(torch.tensor([4, 5] * 6 + [4, 6] * 2), 2, prompts=[1] * 8)
    evidence = evidence_of(logits_TV, rows)
    fresh_T, copies, shared = independent(evidence, model_of(evidence), LIMITS)
    assert copies == 6 and not shared and bool(fresh_T.all())


def test_beginnings_that_chance_rules_out_were_drawn_with_one_seed():
    """Chance that some pair of n shares what it shares: at most n times its probability."""
    one_T = drawn(LOGITS[:LENGTH])
    logits_TV = LOGITS[:LENGTH].repeat(4, 1)
    apart_T = one_T.clone()
    apart_T[10:] = drawn(LOGITS[:LENGTH], seed=9)[10:]
    assert apart_T[10] != one_T[10]
    targets_T = torch.cat([one_T, one_T, apart_T, drawn(LOGITS[:LENGTH], seed=5)])
    draws, origin = judged(targets_T, logits_TV, prompts=[3] * 4)
    assert draws.verdict == "mismatch" and draws.shared_seed and draws.copies == 1 and draws.tokens == 3 * LENGTH
    assert "begin alike, which chance rules out (1 are whole copies)" in draws.why
    assert origin.id == "S13" and "same random numbers" in origin.title and origin.evidence == draws.why
    assert origin.fix.startswith("give each sample a seed of its own")
    draws, _ = judged(targets_T, logits_TV, prompts=[3, 4, 5, 6])
    assert not draws.shared_seed and draws.copies == 0, "the same answer to other prompts is no copy"


def test_the_limit_of_a_shared_beginning_counts_the_pairs():
    rate = LIMITS.false_alarm_rate / STATISTICS
    for pairs, completions in ((1, 2), (3, 3)):
        for factor, ruled_out in ((0.9, True), (1.1, False)):
            logprob = math.log(factor * rate / pairs)
            logits_TV = torch.tensor([[logprob, math.log1p(-math.exp(logprob))]] * completions, dtype=torch.float64)
            evidence = evidence_of(logits_TV, trace_rows(torch.zeros(completions).long(), 1, prompts=[1] * completions))
            assert independent(evidence, model_of(evidence), LIMITS)[2] == ruled_out, (pairs, factor)


def test_copies_at_temperature_0_count_once():
    evidence = evidence_of(
        LOGITS[:LENGTH].repeat(2, 1), trace_rows(LOGITS[:LENGTH].argmax(1).repeat(2), LENGTH, prompts=[1, 1]),
        sampling=SamplingParams(temperature=0.0),
    )  # fmt: skip
    fresh_T, copies, shared = independent(evidence, model_of(evidence), LIMITS)
    assert (int(fresh_T.sum()), copies, shared) == (LENGTH, 1, False)


def test_a_token_is_the_most_likely_one_within_a_distance():
    scores = TokenScores(
        **{n: torch.zeros(3) for n in ("entropy_T", "log_kept_mass_T", "kept_T")},
        logprobs_T=torch.tensor([-1.0, -1.05, -2.0]), top_logprobs_T=torch.full((3,), -1.0),
    )  # fmt: skip
    assert is_top(scores).tolist() == [True, False, False]
    assert is_top(scores, 0.1).tolist() == [True, True, False]


def test_a_token_that_a_distribution_rules_out_costs_so_many_nats():
    evidence = evidence_of(LOGITS[:2], trace_rows(LOGITS[:2].argmin(1), 2))
    every_T = torch.tensor([True, True])
    assert _likelihood(evidence, TRAINER, Distribution(top_k=1), every_T) == -2 * IMPOSSIBLE_NATS
    assert _likelihood(evidence, TRAINER, Distribution(top_k=1), ~every_T) == 0


@pytest.mark.parametrize("truncates", [False, True])
def test_draws_whatever_their_length_are_judged_among_the_ids_that_end_nothing(truncates):
    end, logits_TV = 5, logits_of(400, 12, scale=2.0)
    logits_TV[:, end] = -1.0
    logits_TV[11, end], logits_TV[12, end] = 9.0, logits_TV[12].amax() - 1e-3
    targets_T = drawn(logits_TV)
    targets_T[7] = end
    dist = Distribution(top_k=5) if truncates else Distribution()
    evidence = evidence_of(logits_TV, trace_rows(targets_T, 400), facts=Facts(eos_ids=(end,), vocab=12))
    model = EngineModel(dist=dist)
    found, apart_T = _among_others(evidence, model, evidence.spread(TRAINER, dist))
    likely = 1e-3 if truncates else 0.1
    kept_T = logits_TV.softmax(1).topk(5).values.sum(1) if truncates else 1.0
    end_T = logits_TV.softmax(1)[:, end] / kept_T
    assert bool((end_T[apart_T] < likely).all()) and not apart_T[[7, 11, 12]].any()
    assert bool(apart_T[(end_T < 0.9 * likely) & (targets_T != end)].all()) and int(apart_T.sum()) > 3
    own_T = evidence.spread(TRAINER, dist).logprobs_T.double() - torch.log1p(-end_T)
    torch.testing.assert_close(found.logprobs_T[apart_T], own_T[apart_T])
    if not truncates:
        others_TV = logits_TV.clone()
        others_TV[:, end] = -torch.inf
        others = evidence_of(others_TV.clamp_min(-1e4), trace_rows(targets_T, 400)).spread(TRAINER, dist)
        for name in ("logprobs_T", "entropy_T", "top_logprobs_T"):
            torch.testing.assert_close(getattr(found, name)[apart_T], getattr(others, name)[apart_T].double())
    same, every_T = _among_others(
        evidence_of(logits_TV, trace_rows(targets_T, 400)), model, scores := evidence.spread(TRAINER, dist)
    )
    assert same is scores and bool(every_T.all()), "nothing ends a completion"


def test_completions_chosen_by_length_agree_only_apart_from_their_ends():
    """The short ones of many: their end tokens came too early, and nothing else is wrong."""
    vocab, end, logits_TV = 12, 0, logits_of(60_000, 12, seed=3)
    logits_TV[:, end] = -1.0
    every_T = drawn(logits_TV)
    kept, at = [], 0
    for stop in (every_T == end).nonzero()[:, 0].tolist():
        if stop - at < 12:
            kept.append(torch.arange(at, stop + 1))
        at = stop + 1
    rows = [trace_rows(every_T[part], len(part))[0] for part in kept]
    rows = [replace(row, line=at, prompt_token_ids=(at,)) for at, row in enumerate(rows)]
    evidence = evidence_of(logits_TV[torch.cat(kept)], rows, facts=Facts(eos_ids=(end,), vocab=vocab))
    plain, apart = (
        judge_draws(evidence, model_of(evidence), LIMITS, whatever_length=flag, **CLOSE) for flag in (False, True)
    )
    assert plain.verdict == "mismatch" and apart.verdict == "agree" and 0 < apart.tokens < plain.tokens


def test_few_tokens_say_from_which_temperature_on_draws_would_show():
    rate = 5e-5

    def said(count, variance=0.5):
        scores = TokenScores(
            **{n: torch.zeros(count) for n in
               ("logprobs_T", "entropy_T", "log_kept_mass_T", "kept_T", "top_logprobs_T")},
            varentropy_T=torch.full((count,), variance),
        )  # fmt: skip
        return _blind(scores, torch.ones(count, dtype=torch.bool), rate)

    needed = (SKEW * normal_quantile(rate / 2) + normal_quantile(0.05)) / math.sqrt(512 * 0.5)
    assert f"from {1 / (1 + needed):.2g} times" in said(512) and "0.71 times" in said(512)
    assert said(20_000) == "" and said(64, variance=0.0).startswith("in so few tokens")
    assert f"from {1 / (1 + needed * math.sqrt(512 * 0.5) / 0.5):.2g} times" in said(1, variance=0.25)


def test_a_trainer_of_another_kind_changes_nothing_about_draws():
    draws, _ = judged(drawn(LOGITS, temperature=0.8), sampling=SamplingParams(temperature=0.8), trainer=LogprobKind.RAW)
    assert draws.verdict == "agree"


def test_what_is_drawn_is_scored_once():
    """Copies are counted by logprobs that the judgement has asked for, with entropies, before."""
    evidence = evidence_of(LOGITS, trace_rows(torch.multinomial(LOGITS.softmax(1), 1)[:, 0], LENGTH))
    asked, dist = [], Distribution()

    def ask(source, dists):
        asked.append(dists)
        return evidence.ask(source, dists)

    watched = replace(evidence, ask=ask)
    judge_draws(watched, EngineModel(dist=dist), LimitsConfig(), noise_rms=0, token_limit=0)
    assert watched.scores(TRAINER, dist) is watched.spread(TRAINER, dist)
    assert not [dists for dists in asked if dist in dists]


@pytest.mark.parametrize("temperature", [0.26, 0.64, 0.83, 1.39])
def test_a_temperature_between_those_that_are_tried_is_found(temperature):
    """No finer grid holds a temperature under which the tokens are much likelier."""
    evidence = evidence_of(LOGITS, trace_rows(drawn(LOGITS, temperature=temperature), LENGTH))
    model, every_T = model_of(evidence), torch.ones(len(LOGITS), dtype=torch.bool)
    likelihood, cause_id, words, dist = _likeliest(evidence, model, every_T)
    assert cause_id == "S3" and abs(dist.temperature - temperature) < 0.04 and words == f"T'={dist.temperature:g}"
    assert likelihood == _likelihood(evidence, model.source, dist, every_T)
    near = [Distribution(temperature=dist.temperature + 0.0025 * n) for n in range(-40, 41)]
    assert max(_likelihood(evidence, model.source, d, every_T) for d in near) < likelihood + ROUND_NATS + 0.1
    assert (
        round(dist.temperature, 2) == dist.temperature
        or likelihood
        > max(
            _likelihood(evidence, model.source, Distribution(temperature=round(dist.temperature, n)), every_T)
            for n in (1, 2)
        )
        + ROUND_NATS
    )


def test_one_wild_token_among_greedy_ones_is_not_another_temperature():
    """Where greedy draws are declared, a token that no temperature makes likely leaves nothing that fits better."""
    logits_TV = torch.zeros(200, 20, dtype=torch.float64)
    logits_TV[:, 0] = 6.0
    targets_T = torch.zeros(200, dtype=torch.long)
    logits_TV[70, 5], targets_T[70] = -60.0, 5
    draws, origin = judged(targets_T, logits_TV, length=20, sampling=SamplingParams(temperature=0.0))
    assert draws.verdict == "mismatch" and (draws.tokens, draws.top_tokens) == (200, 199)
    assert origin.id == "S13"


def test_the_surprise_is_brought_closer_by_the_square_of_the_noise():
    targets_T = drawn(LOGITS, temperature=1.3)
    evidence = evidence_of(LOGITS, trace_rows(targets_T, LENGTH))
    scores, every_T = evidence.spread(TRAINER, Distribution()), torch.ones(len(targets_T), dtype=torch.bool)
    for noise_rms in (0.1, 0.3):
        found = judged(targets_T, noise_rms=noise_rms)[0].surprise_z
        assert found == pytest.approx(_surprise(scores, every_T, slack=len(targets_T) * noise_rms**2))
        assert 0 < found < _surprise(scores, every_T, slack=0.0)


def test_tokens_that_a_model_says_nothing_about_are_no_draws():
    evidence = evidence_of(LOGITS, trace_rows(drawn(LOGITS), LENGTH))
    fresh_T, copies, shared = independent(evidence, replace(model_of(evidence), skip="last"), LIMITS)
    assert (~fresh_T).nonzero()[:, 0].tolist() == list(range(LENGTH - 1, LENGTH * ROWS, LENGTH))
    assert not copies and not shared and bool(independent(evidence, model_of(evidence), LIMITS)[0].all())
    copied = evidence_of(
        LOGITS[:LENGTH].repeat(2, 1), trace_rows(drawn(LOGITS[:LENGTH]).repeat(2), LENGTH, prompts=[1, 1])
    )
    fresh_T, copies, shared = independent(copied, replace(model_of(copied), skip="last"), LIMITS)
    assert copies == 1 and shared and fresh_T.nonzero()[:, 0].tolist() == list(range(LENGTH - 1)), "both are left out"


@pytest.mark.parametrize(("share", "verdict"), [(0.99, "agree"), (1.01, "mismatch")])
def test_the_surprise_may_be_as_large_as_its_false_alarm_rate_allows(monkeypatch, share, verdict):
    """On both sides together: half of the rate on each."""
    limit = SKEW * normal_quantile(LIMITS.false_alarm_rate / STATISTICS / 2)
    for sign in (-1, 1):
        monkeypatch.setattr(draws_module, "_surprise", lambda *_, sign=sign, **__: sign * share * limit)
        draws, _ = judged(drawn(LOGITS))
        assert draws.verdict == verdict and ("surprising" in draws.why) == (verdict == "mismatch")


def test_what_cannot_be_compared_does_not_come_back_where_lengths_were_chosen():
    targets_T = drawn(LOGITS, top_k=4)
    targets_T[3::LENGTH] = LOGITS[3::LENGTH].argmin(1)
    draws, _ = judged(
        targets_T, whatever_length=True, sampling=SamplingParams(top_k=4), facts=Facts(vocab=LOGITS.shape[1])
    )
    assert draws.tokens == len(targets_T) - ROWS


def test_how_cold_draws_must_be_is_said_of_the_tokens_that_count():
    """Half of the tokens are appended, say: what the others show is what is promised."""
    few = (n for n in range(20, ROWS, 2) if not judged(drawn(LOGITS[: n * LENGTH]), LOGITS[: n * LENGTH])[0].blind)
    logits_TV = LOGITS[: next(few) * LENGTH]
    evidence = evidence_of(logits_TV, trace_rows(drawn(logits_TV), 2))
    draws = judge_draws(evidence, replace(model_of(evidence), skip="last"), LIMITS, **CLOSE)
    assert draws.tokens == len(logits_TV) / 2 and "in so few tokens" in draws.blind


def test_appended_tokens_make_no_distribution_likelier():
    """How much likelier the tokens are under another temperature is counted in tokens that were drawn."""
    cold_T = drawn(LOGITS, temperature=0.7)
    last_T = torch.arange(len(cold_T)) % LENGTH == LENGTH - 1
    targets_T = torch.where(last_T, LOGITS.argmin(1), cold_T)
    evidence = evidence_of(LOGITS, trace_rows(targets_T, LENGTH))
    model = replace(model_of(evidence), skip="last")
    by = partial(judge_draws, evidence, limits=LIMITS, **CLOSE)
    origin = origin_of(evidence, by(model), model, by)
    shift_TV = (LOGITS / 0.7).log_softmax(1) - LOGITS.log_softmax(1)
    likelier = float(shift_TV.gather(1, cold_T[:, None])[~last_T].sum())
    assert origin.id == "S3" and f"{likelier:.0f} nats likelier" in origin.evidence
