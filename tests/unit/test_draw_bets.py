"""parity/draw_bets.py, places.py: ways of drawing that no single statistic was made for; honest draws win nothing."""

import math

import pytest
import torch
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity.draw_bets import HEDGE, TOP_MASSES, best_bet
from trueup.parity.draw_origins import origin_of
from trueup.parity.draws import judge_draws
from trueup.parity.evidence import EngineModel
from trueup.parity.places import ID_BLOCKS, Places
from trueup.policy.processing import Distribution
from trueup.types import SamplingParams

VOCAB, LENGTH, ROWS = 100, 20, 60
LOGITS = logits_of(LENGTH * ROWS, VOCAB, scale=2.0)
IDS = torch.arange(VOCAB)
RATE = 2e-5


def judged(targets_T, logits_TV=LOGITS, *, noise_rms=0.0, sampling=None):
    """(draws, origin or None) of tokens against a table."""
    evidence = evidence_of(logits_TV, trace_rows(targets_T, LENGTH), sampling=sampling)
    model = EngineModel(dist=evidence.case.processed)

    def by(model):
        return judge_draws(evidence, model, LimitsConfig(), noise_rms=noise_rms, token_limit=0.01)

    draws = by(model)
    return draws, origin_of(evidence, draws, model, by) if draws.verdict == "mismatch" else None


def one_by_one(change):
    """Tokens drawn from logits [V] that `change(logits, earlier tokens of the completion)` may alter."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for at, logits_V in enumerate(LOGITS):
        row = found[at - at % LENGTH :]
        found.append(int(torch.multinomial(change(logits_V.clone(), row).softmax(0), 1, generator=generator)))
    return torch.tensor(found)


def never(ids):
    return lambda logits_V, _: logits_V.index_fill(0, ids, -torch.inf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (never(IDS[80:]), "ids are never drawn"),
        (lambda logits_V, _: logits_V + 0.7 * (IDS % 2 == 0), "even ids are drawn too often"),
    ],
    ids=["a cut vocabulary", "a bias on even ids"],
)
def test_ids_that_are_drawn_more_or_less_often_are_seen(change, words):
    draws, origin = judged(one_by_one(change))
    assert draws.verdict == "mismatch" and draws.bet == "ids" and words in draws.why
    assert origin.id == "S13" and origin.title.startswith("some ids are drawn") and "logit_bias" in origin.fix


def test_an_id_that_is_drawn_far_too_often_is_no_other_temperature():
    draws, origin = judged(one_by_one(lambda logits_V, _: logits_V + 5.0 * (IDS == 5)))
    assert draws.verdict == "mismatch" and origin.id == "S13"
    assert "drawn far too often: 5" in draws.why + origin.evidence


@pytest.mark.parametrize("upper", [0.5, 0.9])
def test_random_numbers_from_a_part_of_their_range_are_seen(upper):
    generator = torch.Generator().manual_seed(3)
    goals_T = upper * torch.rand(len(LOGITS), 1, generator=generator, dtype=torch.float64)
    draws, origin = judged(torch.searchsorted(LOGITS.softmax(1).cumsum(1), goals_T)[:, 0])
    assert draws.verdict == "mismatch" and draws.bet in ("places", "ids") and origin.id == "S13"


@pytest.mark.parametrize("top_p", [0.9, 0.95])
def test_a_filter_too_weak_for_the_surprise_is_seen(top_p):
    def kept(logits_V, _):
        p_V, order_V = logits_V.softmax(0).sort(descending=True)
        return logits_V.index_fill(0, order_V[p_V.cumsum(0) - p_V >= top_p], -torch.inf)

    draws, origin = judged(one_by_one(kept))
    assert draws.verdict == "mismatch" and f"top_p={top_p:g}" in origin.evidence and origin.id == "S13"


def test_penalties_that_reach_the_draws_alone_are_seen():
    def penalised(logits_V, row):
        return logits_V - torch.bincount(torch.tensor(row, dtype=torch.long), minlength=VOCAB)

    logits_TV = LOGITS  # peaked enough for completions to repeat tokens
    draws, origin = judged(one_by_one(penalised), logits_TV)
    assert draws.verdict == "mismatch" and "frequency_penalty=1" in draws.why + origin.evidence and origin.id == "S13"


def test_penalties_that_are_declared_and_not_drawn_with_are_seen():
    draws, _ = judged(drawn(LOGITS), sampling=SamplingParams(frequency_penalty=1.0))
    assert draws.verdict == "mismatch" and "likelier without penalties" in draws.why


@pytest.mark.parametrize("noise_rms", [0.0, 0.06])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 10}, {"frequency_penalty": 0.5}])
def test_honest_draws_win_nothing(noise_rms, sampling):
    """Ville's inequality leaves room: the largest win of 40 samples is far from one in fifty thousand."""
    params = SamplingParams(**sampling)
    for seed in range(40):
        generator = torch.Generator().manual_seed(1000 + seed)
        engine_TV = LOGITS + noise_rms * torch.randn(LOGITS.shape, generator=generator, dtype=LOGITS.dtype)
        if params.penalises:
            targets_T = one_by_one(
                lambda logits_V, row: (
                    logits_V - 0.5 * torch.bincount(torch.tensor(row, dtype=torch.long), minlength=VOCAB)
                )
            )
        else:
            targets_T = drawn(engine_TV, temperature=params.temperature, top_k=params.top_k, seed=1 + seed)
        evidence = evidence_of(LOGITS, trace_rows(targets_T, LENGTH), sampling=params)
        model = EngineModel(dist=evidence.case.processed)
        usable_T = torch.isfinite(evidence.scores(model.source, model.dist).logprobs_T)
        assert best_bet(evidence, model, usable_T, rate=0.1, slack=len(targets_T) * noise_rms**2) is None
        if params.penalises:
            break


def test_a_bet_on_a_filter_wins_what_the_filter_makes_likelier():
    """Tokens that all lie among the likeliest 90 %: each wins 1/0.9, but for the hedge and for tokens at the edge."""
    flat_TV = torch.zeros(LENGTH * ROWS, VOCAB, dtype=torch.float64) + torch.linspace(
        1e-3, 0, VOCAB, dtype=torch.float64
    )
    targets_T = drawn(flat_TV[:, :90])
    evidence = evidence_of(flat_TV, trace_rows(targets_T, LENGTH))
    model = EngineModel(dist=Distribution())
    found = best_bet(evidence, model, torch.ones(len(targets_T), dtype=torch.bool), rate=RATE, slack=0.0)
    assert found.nats >= len(targets_T) * math.log(HEDGE + (1 - HEDGE) / TOP_MASSES[3]) - 2


def test_places_add_up():
    targets_T = drawn(LOGITS)
    p_TV = LOGITS.softmax(1)
    places = Places.of([p_TV[:707], p_TV[707:]], targets_T, torch.arange(len(LOGITS)) // LENGTH)
    own_T = p_TV.gather(1, targets_T[:, None])[:, 0]
    assert torch.equal(places.own_T, own_T) and torch.allclose(places.blocks_TB.sum(1), torch.ones(len(own_T)).double())
    rank_T = (p_TV > own_T[:, None]).sum(1)
    above_T = torch.stack([p_TV[t].sort(descending=True).values[:r].sum() for t, r in enumerate(rank_T.tolist())])
    assert torch.allclose(places.above_T, above_T) and torch.allclose(places.tied_T, own_T)
    below_T = torch.stack([p_TV[t, :i].sum() for t, i in enumerate(targets_T.tolist())])
    assert torch.allclose(places.below_T, below_T) and torch.allclose(places.even_T, p_TV[:, ::2].sum(1))
    for t in (0, 5, 19, 20, 708, 1199):
        before = targets_T[t - t % LENGTH : t].unique()
        assert float(places.earlier_T[t]) == pytest.approx(float(p_TV[t, before].sum()), abs=1e-6)
        assert bool(places.repeats_T[t]) == bool((before == targets_T[t]).any())
    size = -(-VOCAB // ID_BLOCKS)
    assert torch.allclose(places.blocks_TB[:, 2], p_TV[:, 2 * size : 3 * size].sum(1))
