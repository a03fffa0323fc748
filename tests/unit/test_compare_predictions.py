"""parity/compare.py: what a prediction leaves, and whether it is better, follows the engine, drifts or would show."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import kruskal
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity.compare import (
    INFEASIBLE_NATS,
    Residual,
    _chance_of_ranks,
    clearly_better,
    drifts,
    log_likelihood,
    loss,
    number_moves,
    residual,
    separation,
    tracks,
    would_show,
)
from trueup.parity.evidence import EngineModel
from trueup.parity.floor import Floor
from trueup.policy.processing import Distribution

ROWS, LENGTH = 12, 20
TOKENS = ROWS * LENGTH
ROW = torch.arange(TOKENS) // LENGTH
LOGITS = logits_of(TOKENS)
TARGETS = drawn(LOGITS)
RAW = EngineModel(dist=Distribution())


def numbers(temperature=1.0):
    """Logprobs of the drawn tokens at a temperature, [T]."""
    return (LOGITS / temperature).log_softmax(1).gather(1, TARGETS[:, None])[:, 0]


def evidence_with(logprobs_T):
    return evidence_of(LOGITS, trace_rows(TARGETS, LENGTH, logprobs_T=logprobs_T))


def left(sizes):
    """Residuals of one size in each row."""
    r_T = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(LENGTH)
    usable = torch.ones(len(r_T), dtype=torch.bool)
    return Residual(residual_T=r_T, usable_T=usable, edge_T=~usable, row_T=ROW)


def of(values, edges=()):
    """Residuals of single tokens, some of them ruled out by the prediction."""
    r_T = torch.tensor(values, dtype=torch.float64)
    edge_T = torch.isin(torch.arange(len(values)), torch.tensor(edges, dtype=torch.long))
    return Residual(residual_T=r_T, usable_T=torch.isfinite(r_T) & ~edge_T, edge_T=edge_T, row_T=ROW[: len(values)])


def test_what_is_left_is_prediction_minus_engine_and_says_what_can_be_compared():
    logprobs_T = numbers()
    logprobs_T[3], logprobs_T[4] = math.nan, -math.inf
    found = residual(evidence_with(logprobs_T), EngineModel(dist=Distribution(top_k=3)))
    outside_T = (LOGITS.argsort(1, descending=True)[:, :3] != TARGETS[:, None]).all(1)
    assert 0 < int(outside_T.sum()) < TOKENS
    compared_T = torch.ones(TOKENS, dtype=torch.bool)
    compared_T[3] = compared_T[4] = False
    assert torch.equal(found.edge_T, outside_T & compared_T) and torch.equal(found.usable_T, ~outside_T & compared_T)
    kept_T = LOGITS.topk(3).values.logsumexp(1)
    expected_T = LOGITS.logsumexp(1) - kept_T
    torch.testing.assert_close(found.residual_T[found.usable_T], expected_T[found.usable_T])
    assert torch.equal(found.row_T, ROW)


def test_a_token_that_is_ruled_out_is_charged_beyond_the_share_of_edges():
    found = of([0.1, -0.3, math.nan, 0.0], edges=[3])
    assert found.edge_share == pytest.approx(1 / 3)
    assert found.charged_T(0.4).nan_to_num(-1).tolist() == pytest.approx([0.1, 0.3, -1, 0.0])
    assert found.charged_T(1 / 3).nan_to_num(-1).tolist() == pytest.approx([0.1, 0.3, -1, 0.0])
    assert found.charged_T(0.3).nan_to_num(-1).tolist() == pytest.approx([0.1, 0.3, -1, INFEASIBLE_NATS])
    assert loss(found, 0.4) == pytest.approx(0.4 / 3) and loss(found, 0.0) == pytest.approx((0.4 + INFEASIBLE_NATS) / 3)
    nothing = of([math.nan, math.nan])
    assert nothing.edge_share == 1.0 and loss(nothing, 1.0) == math.inf


def test_better_on_average_is_not_clearly_better():
    """A prediction that wins in seven rows of twelve wins in most resamples, and not in 99 of 100."""
    some = left([0.1 if row < 7 else 0.3 for row in range(ROWS)])
    other = left([0.3 if row < 7 else 0.1 for row in range(ROWS)])
    assert float(some.residual_T.abs().mean()) < float(other.residual_T.abs().mean())
    assert not clearly_better(some, other, 0.0) and not clearly_better(other, some, 0.0)
    assert clearly_better(left([0.1] * ROWS), left([0.11] * ROWS), 0.0)


def test_only_tokens_that_both_can_compare_count():
    worse, better = [0.2] * TOKENS, [0.1] * TOKENS
    worse[::LENGTH] = [math.nan] * ROWS
    better[1::LENGTH] = [math.nan] * ROWS
    better[::LENGTH] = [9.0] * ROWS
    assert clearly_better(of(better), of(worse), 0.0)
    assert not clearly_better(of([math.nan] * 4), of([0.1] * 4), 0.0)
    assert clearly_better(of([0.1] * TOKENS), of([0.1] * TOKENS, edges=range(0, TOKENS, 2)), 0.0)
    assert not clearly_better(of([0.1] * TOKENS), of([0.1] * TOKENS, edges=range(0, TOKENS, 2)), 0.5)


def test_a_separation_is_the_rms_difference_of_what_both_can_compare():
    assert separation(of([0.1, 0.5, math.nan, 7.0]), of([0.4, 0.1, 0.3, math.nan])) == pytest.approx(
        math.sqrt((0.3**2 + 0.4**2) / 2)
    )
    assert separation(of([math.nan, 0.1]), of([0.1, math.nan])) == 0.0


def test_the_likelihood_of_what_a_distribution_rules_out_is_not_a_number():
    evidence = evidence_with(numbers())
    assert log_likelihood(evidence, Distribution(temperature=0.7)) == pytest.approx(float(numbers(0.7).sum()))
    assert math.isnan(log_likelihood(evidence, Distribution(top_k=1)))


def test_a_prediction_follows_the_engine_or_only_its_average():
    evidence = evidence_with(numbers(0.7))
    assert tracks(evidence, residual(evidence, RAW))
    noise_T = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale, follows in ((0.2, True), (0.8, False)):
        blurred = Residual(
            residual_T=scale * noise_T, usable_T=torch.ones(TOKENS).bool(), edge_T=torch.zeros(TOKENS).bool(), row_T=ROW
        )
        assert tracks(evidence, blurred) == follows
    flat = Residual(
        residual_T=numbers(0.7).mean() - numbers(0.7), usable_T=torch.ones(TOKENS).bool(),
        edge_T=torch.zeros(TOKENS).bool(), row_T=ROW,
    )  # fmt: skip
    assert not tracks(evidence, flat)
    few = torch.zeros(TOKENS).bool()
    few[:2] = True
    two = Residual(residual_T=torch.zeros(TOKENS), usable_T=few, edge_T=~few & few, row_T=ROW)
    assert not tracks(evidence, two), "two points lie on a line whatever they are"


@pytest.mark.parametrize(("factor", "drifting"), [(1.9, False), (2.1, True)])
@pytest.mark.parametrize("third", [0, 1, 2])
def test_a_remainder_that_is_larger_in_one_third_of_completions_drifts(factor, drifting, third):
    evidence = evidence_with(numbers())
    part_T = torch.bucketize((torch.arange(TOKENS) % LENGTH).double(), torch.tensor([6.0, 13.0]).double())
    size_T = torch.where(part_T == third, factor * 0.1, 0.1).double()
    size_T[::2] *= -1
    every = torch.ones(TOKENS, dtype=torch.bool)
    gap = Residual(residual_T=torch.ones(TOKENS).double(), usable_T=every, edge_T=~every, row_T=ROW)
    remainder = replace(gap, residual_T=size_T)
    assert drifts(evidence, gap, remainder, grows=True) == drifts(evidence, gap, remainder, grows=False) == drifting
    grown = replace(gap, residual_T=3 * size_T)
    assert not drifts(evidence, grown, remainder, grows=True), "a third of the gap everywhere"
    assert drifts(evidence, grown, remainder, grows=False) == drifting, "a number may be the average of one that moves"
    some = every & ((part_T != 1) | (torch.arange(TOKENS) < 2 * LENGTH))
    assert int((some & (part_T == 1)).sum()) < 16
    assert not drifts(evidence, gap, replace(remainder, usable_T=some, edge_T=~some), grows=False), "too few to say"


def test_one_far_token_of_a_heavy_tail_is_no_drift():
    """Rounding to 8 bits leaves a tenth of a nat, and now and then half a nat."""
    evidence = evidence_with(numbers())
    every = torch.ones(TOKENS, dtype=torch.bool)
    sizes_T = 0.1 * torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)).double()
    sizes_T[9] = 3.0
    gap = Residual(residual_T=torch.ones(TOKENS).double(), usable_T=every, edge_T=~every, row_T=ROW)
    assert not drifts(evidence, gap, replace(gap, residual_T=sizes_T), grows=True)


@pytest.mark.parametrize(
    ("start", "end", "moving"), [(-1.0, 1.0, True), (1.0, -1.0, True), (1.0, 1.0, False), (0.0, 2.0, False)]
)
def test_a_number_that_is_too_small_at_one_end_and_too_large_at_the_other_moves(start, end, moving):
    """Residuals of a number that is off by `start` at first and by `end` at last, and of its two neighbours."""
    evidence, every = evidence_with(numbers()), torch.ones(TOKENS, dtype=torch.bool)
    share_T = (torch.arange(TOKENS) % LENGTH) / (LENGTH - 1)
    off_T = start + (end - start) * share_T + 0.5 * torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))
    slope_T = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1)).double()

    def left(number):
        return Residual(residual_T=(number - off_T) * slope_T, usable_T=every, edge_T=~every, row_T=ROW)

    assert number_moves(evidence, left(-0.2), left(0.2)) == moving
    few = every & (torch.arange(TOKENS) < 40)
    assert not number_moves(evidence, replace(left(-0.2), usable_T=few), left(0.2)), "too few to say"


def test_ranks_are_compared_as_kruskal_and_wallis_do():
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(n)).double() + n / 30 for n in (20, 30, 45)]
    assert _chance_of_ranks(parts) == pytest.approx(kruskal(*(p.numpy() for p in parts)).pvalue)


def shows(*temperatures, rms=0.01):
    floor = Floor(rms=rms, trainer_rms=rms, engine_rms=rms, basis="")
    models = [EngineModel(dist=Distribution(temperature=t)) for t in temperatures]
    return would_show(evidence_with(numbers()), RAW, models, floor, LimitsConfig())


def test_a_cause_would_show_if_each_of_its_forms_is_beyond_a_limit_by_itself():
    assert shows(0.7) and shows(0.7, 1.4) and not shows(0.7, 1.0001) and not shows(1.0001)
    assert not shows(0.7, rms=10.0)


def test_what_the_engine_reported_has_no_part_in_what_would_show():
    floor = Floor(rms=0.01, trainer_rms=0.01, engine_rms=0.01, basis="")
    off = evidence_with(numbers() + 3.0)
    assert not would_show(off, RAW, [EngineModel(dist=Distribution(temperature=1.0001))], floor, LimitsConfig())
    all_but_few = EngineModel(dist=Distribution(top_k=LOGITS.shape[1] - 4))
    wide = Floor(rms=0.1, trainer_rms=0.1, engine_rms=0.1, basis="")
    evidence = evidence_with(numbers())
    assert bool(residual(evidence, all_but_few).edge_T.any()), "it rules a token out, which is not compared then"
    assert not would_show(evidence, RAW, [all_but_few], wide, LimitsConfig())


def test_tokens_that_one_of_two_models_says_nothing_about_are_not_compared():
    """A shift by one says nothing about the last token of a row: it must not count as a difference of nothing."""
    floor = Floor(rms=0.01, trainer_rms=0.01, engine_rms=0.01, basis="", rows={1: 5.0})
    shifted = EngineModel(dist=Distribution(), shift=LENGTH - 1)
    assert int(residual(evidence_with(numbers()), shifted).usable_T.sum()) == ROWS
    few = LimitsConfig(min_tokens=1)
    assert would_show(evidence_with(numbers()), RAW, [shifted], floor, few)
    assert not would_show(evidence_with(numbers()), RAW, [EngineModel(dist=Distribution(), shift=LENGTH)], floor, few)


def test_a_number_whose_neighbours_take_turns_at_random_does_not_move():
    """The ends may differ in sign by chance: which neighbour fits better must go with the position."""
    evidence, every = evidence_with(numbers()), torch.ones(TOKENS, dtype=torch.bool)
    for seed in range(12):
        worse_T = torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed)).double()
        below, above = (
            Residual(residual_T=r_T, usable_T=every, edge_T=~every, row_T=ROW)
            for r_T in ((1 + worse_T).abs(), torch.ones(TOKENS).double())
        )
        assert not number_moves(evidence, below, above)
