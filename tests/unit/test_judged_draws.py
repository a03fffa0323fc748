"""parity/draws.py: tokens judged as draws, apart from where completions end."""

import torch

from trueup.knobs import LimitsConfig
from trueup.parity.draws import _among_others, _blind, _independent
from trueup.parity.evidence import Case, EngineModel, Evidence, Tokens
from trueup.parity.facts import Facts
from trueup.policy.processing import Distribution
from trueup.policy.reduction import TokenScores
from trueup.trace import EngineInfo, TraceRow
from trueup.types import LogprobKind, SamplingParams


def test_draws_whatever_their_length_are_judged_among_the_ids_that_end_nothing():
    generator = torch.Generator().manual_seed(0)
    logits_TV = 2 * torch.randn(60, 12, generator=generator, dtype=torch.float64)
    logits_TV[:, 5] = -1.0
    logprobs_TV = logits_TV.log_softmax(1)
    targets_T = torch.multinomial(logprobs_TV.exp(), 1, generator=generator)[:, 0]
    targets_T[7] = 5
    row = TraceRow(
        line=1, engine=EngineInfo(), sampling={}, prompt_token_ids=(1,), completion_token_ids=tuple(targets_T.tolist()),
        completion_logprobs=(0.0,) * 60,
    )  # fmt: skip

    def scores(of_TV):
        own_T = of_TV.gather(1, targets_T[:, None])[:, 0]
        entropy_T = -(of_TV.exp() * of_TV.masked_fill(of_TV == -torch.inf, 0.0)).sum(1)
        return TokenScores(
            logprobs_T=own_T, entropy_T=entropy_T, kept_T=torch.full((60,), 12), log_kept_mass_T=torch.zeros(60),
            top_logprobs_T=of_TV.amax(1),
        )  # fmt: skip

    case = Case(engine=row.engine, sampling=SamplingParams(), trainer=LogprobKind.RAW)
    evidence = Evidence(
        case=case, tokens=Tokens.of([row]), facts=Facts(eos_ids=(5,)), ask=lambda *a: [], expected=lambda: targets_T,
        mass=lambda source, temperature, ids: logprobs_TV.exp()[:, list(ids)].sum(1),
        spread=lambda *a: scores(logprobs_TV),
    )  # fmt: skip
    found, apart_T = _among_others(evidence, EngineModel(dist=Distribution()), scores(logprobs_TV))
    others_TV = logits_TV.clone()
    others_TV[:, 5] = -torch.inf
    expected = scores(others_TV.log_softmax(1))
    assert 40 < int(apart_T.sum()) < 60 and not apart_T[7]
    for name in ("logprobs_T", "entropy_T", "top_logprobs_T"):
        torch.testing.assert_close(getattr(found, name)[apart_T], getattr(expected, name)[apart_T])


def rows(completions):
    return [
        TraceRow(
            line=at, engine=EngineInfo(), sampling={}, prompt_token_ids=(1,), completion_token_ids=ids,
            completion_logprobs=(0.0,) * len(ids),
        )
        for at, ids in enumerate(completions)
    ]  # fmt: skip


def uniform(tokens, logprob):
    """Evidence whose tokens all have one logprob."""
    scores = TokenScores(
        logprobs_T=torch.full((len(tokens),), logprob), entropy_T=torch.full((len(tokens),), -logprob),
        kept_T=torch.full((len(tokens),), 2), log_kept_mass_T=torch.zeros(len(tokens)),
        top_logprobs_T=torch.full((len(tokens),), logprob),
    )  # fmt: skip
    return Evidence(
        case=Case(engine=EngineInfo(), sampling=SamplingParams(), trainer=LogprobKind.RAW), tokens=tokens,
        ask=lambda source, dists: [scores] * len(dists), mass=lambda *a: scores.logprobs_T,
        expected=lambda: scores.logprobs_T, spread=lambda *a: scores,
    )  # fmt: skip


def test_copies_that_chance_explains_are_draws_like_any_other():
    """Short answers of one prompt repeat: leaving them out would leave what is too surprising."""
    tokens = Tokens.of(rows([(4, 5)] * 6 + [(4, 6)] * 2))
    fresh_T, copies, shared = _independent(uniform(tokens, -0.5), EngineModel(dist=Distribution()), LimitsConfig())
    assert copies == 6 and not shared and bool(fresh_T.all())


def test_copies_that_chance_rules_out_do_not_count():
    tokens = Tokens.of(rows([tuple(range(40))] * 3))
    fresh_T, copies, shared = _independent(uniform(tokens, -2.0), EngineModel(dist=Distribution()), LimitsConfig())
    assert copies == 2 and shared and int(fresh_T.sum()) == 40


def test_few_tokens_say_from_which_temperature_on_draws_would_show():
    def said(count):
        scores = TokenScores(**{n: torch.zeros(count) for n in (
            "logprobs_T", "entropy_T", "log_kept_mass_T", "kept_T", "top_logprobs_T",
        )}, varentropy_T=torch.full((count,), 0.5))  # fmt: skip
        return _blind(scores, torch.ones(count, dtype=torch.bool), 5e-5)

    assert "0.71 times" in said(512) and said(20_000) == ""
