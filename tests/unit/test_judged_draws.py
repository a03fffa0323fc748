"""parity/draws.py: tokens judged as draws, apart from where completions end."""

import torch

from trueup.parity.draws import _among_others
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
