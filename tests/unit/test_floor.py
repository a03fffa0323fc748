"""parity/floor.py: what rounding predicts, and which limit each part of a gap is held to."""

import math
from dataclasses import replace

import pytest
import torch

from trueup.knobs import LimitsConfig
from trueup.parity.floor import (
    BOOTSTRAPS,
    FEW_SEQUENCES,
    SMALLEST_ROW,
    TAIL_COUNTS,
    Floor,
    NoiseShape,
    cluster_bootstrap,
    judge,
    judge_quartile,
    normal_quantile,
    predict,
    rows_beyond,
    starts,
    sum_per_row,
)

LIMITS = LimitsConfig()
FLOOR = Floor(rms=0.05, trainer_rms=0.03, engine_rms=0.04, basis="by hand")
ROWS, LENGTH = 10, 20
ROW = torch.arange(ROWS * LENGTH) // LENGTH


def noise(rms=0.05, tokens=ROWS * LENGTH, seed=0):
    sample = torch.randn(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rms * sample / sample.square().mean().sqrt()


@pytest.mark.parametrize(("kurtosis", "spread"), [(3.0, 0.0), (9.0, 0.0), (3.0, 0.5)])
def test_an_rms_may_exceed_its_prediction_by_what_a_lognormal_ratio_allows(kurtosis, spread):
    found = NoiseShape(kurtosis=kurtosis).excess(torch.tensor([40, 4000]), 2.5, spread=spread)
    for tokens, factor in zip((40, 4000), found.tolist(), strict=True):
        variance = math.log1p(1.5 * (kurtosis - 1) / tokens) + spread**2
        assert factor == pytest.approx(math.exp(2.5 * math.sqrt(variance) / 2), rel=1e-12)


def test_a_size_that_many_tokens_exceed_is_where_the_tail_starts():
    shape = NoiseShape()
    assert shape.exceeded_by(10, tokens=10, rate=1e-3) == shape.tail_start
    expected = -math.log1p(-1e-3)  # one or more of a Poisson number, with probability 1e-3
    size = shape.tail_start + shape.tail_scale * math.log(shape.tail_share * 1e6 / expected)
    assert shape.exceeded_by(1, tokens=10**6, rate=1e-3) == pytest.approx(size, rel=1e-9)


def test_each_row_starts_once():
    assert starts(torch.tensor([0, 0, 1, 1, 1, 2])).tolist() == [True, False, True, False, False, True]
    assert starts(torch.tensor([], dtype=torch.long)).tolist() == []


def test_first_tokens_and_lines_have_a_prediction_of_their_own():
    exact_T, row_T = torch.zeros(9), torch.arange(9) // 3
    engine_T = torch.tensor([0.4, 0.1, 0.1, 0.4, 0.1, 0.1, math.inf, math.inf, math.inf])  # the last row is not usable
    trainer_T = torch.where(torch.isfinite(engine_T), -0.75 * engine_T, engine_T)
    found = predict(trainer_T, engine_T, exact_T, row_T=row_T, basis="", min_floor=1e-6, lines=(7, 9, 8))
    assert found.first_rms == pytest.approx(0.5)
    assert found.rows == {7: pytest.approx(found.rms), 9: pytest.approx(found.rms)}
    one_line = predict(trainer_T, engine_T, exact_T, row_T=row_T, basis="", min_floor=1e-6, lines=(7, 7, 8))
    assert list(one_line.rows) == [7], "the turns of one conversation share a line"


def test_the_bootstrap_draws_every_sequence_and_the_same_ones_again():
    statistic = torch.zeros(20, 2, dtype=torch.float64)
    statistic[:, 1] = 1
    statistic[0, 0] = 20
    means = cluster_bootstrap(statistic)
    assert len(means) == BOOTSTRAPS and float(means.mean()) == pytest.approx(1, abs=0.2)
    assert torch.equal(means, cluster_bootstrap(statistic))


def test_a_few_long_rows_are_taken_apart_into_blocks():
    values = torch.ones(80)
    assert sum_per_row(values, torch.arange(80) // 40).tolist() == [[8.0, 8.0]] * 10
    rows = torch.arange(60) // 10
    assert len(torch.unique(rows)) == FEW_SEQUENCES
    assert sum_per_row(values[:60], rows).tolist() == [[10.0, 10.0]] * 6


def test_nothing_to_judge_is_not_enough_and_the_least_number_is():
    none = judge(torch.tensor([math.nan]), torch.tensor([0]), FLOOR, LIMITS)
    assert none.tokens == 0 and not none.enough and not none.reasons
    least = LIMITS.min_tokens
    row = torch.arange(least) // LENGTH
    assert judge(noise(tokens=least), row, FLOOR, LIMITS).enough
    assert not judge(noise(tokens=least)[1:], row[1:], FLOOR, LIMITS).enough


def test_the_limit_of_a_bias_is_the_widest_of_three():
    def limit(floor, r=None):
        return judge(torch.zeros(200) if r is None else r, ROW, floor, LIMITS).bias_limit

    assert limit(replace(FLOOR, rms=1e-9)) == LIMITS.min_bias
    small = replace(FLOOR, rms=0.01)
    assert limit(small) == pytest.approx(max(LIMITS.min_bias, LIMITS.bias_factor * 0.01))
    wide = replace(FLOOR, rms=100.0, bias=0.02)
    assert limit(wide) == pytest.approx(0.02 + LIMITS.sequence_nats / LENGTH)
    shifted = judge(noise() + 0.5, ROW, FLOOR, LIMITS)
    allowed = min(LIMITS.bias_factor * FLOOR.rms, LIMITS.sequence_nats / LENGTH)
    assert shifted.bias_limit == pytest.approx(max(LIMITS.min_bias, allowed, LIMITS.bias_sigmas * shifted.bias_se))
    errors = shifted.bias / shifted.bias_se
    assert any(f"bias {shifted.bias:+.3g} nats a token, {errors:.0f} standard errors" in r for r in shifted.reasons)


def test_rows_are_off_by_themselves_among_others_only():
    r = noise()
    r[:LENGTH] *= 6
    assert judge(r, ROW, FLOOR, LIMITS).far_rows == 1 and rows_beyond(r, ROW, FLOOR, LIMITS) == [0]
    two = judge(r[: 2 * LENGTH], ROW[: 2 * LENGTH], FLOOR, LIMITS)
    assert two.far_rows == 1 and two.worst_row == 0
    assert judge(r[:LENGTH], ROW[:LENGTH], FLOOR, LIMITS).far_rows == 0, "one row is the whole"


def test_rows_without_a_prediction_may_differ_as_rows_do():
    spread = replace(FLOOR, shape=NoiseShape(row_spread=1.0), rows={1: 0.05})
    limits = [judge(noise(), ROW, f, LIMITS).worst_row_limit for f in (FLOOR, spread)]
    assert limits[1] > 2 * limits[0]
    known = replace(spread, rows=dict.fromkeys(range(ROWS), 0.05))
    assert judge(noise(), ROW, known, LIMITS, lines=range(ROWS)).worst_row_limit == pytest.approx(limits[0])


def test_first_tokens_are_held_to_what_is_predicted_for_them():
    row = torch.arange(FEW_SEQUENCES * LENGTH) // LENGTH
    floor, r = replace(FLOOR, first_rms=0.1), noise(tokens=len(row))
    quantile = normal_quantile(LIMITS.false_alarm_rate)
    excess = float(floor.shape.excess(FEW_SEQUENCES, quantile))
    found = judge(r, row, floor, LIMITS)
    assert found.first_rms_limit == pytest.approx(LIMITS.rms_factor * 0.1 * excess) and not found.reasons
    small = judge(r, row, replace(FLOOR, first_rms=1e-6), LIMITS)
    assert small.first_rms_limit == pytest.approx(LIMITS.rms_factor * SMALLEST_ROW * FLOOR.rms * excess)
    off = r.clone()
    off[starts(row)] = 1.01 * found.first_rms_limit
    assert any("first tokens are off by rms" in reason for reason in judge(off, row, floor, LIMITS).reasons)
    off[starts(row)] = 0.99 * found.first_rms_limit
    assert not any("first tokens" in reason for reason in judge(off, row, floor, LIMITS).reasons)
    assert math.isnan(judge(r, row, FLOOR, LIMITS).first_rms), "nothing is predicted"
    assert math.isnan(judge(r[LENGTH:], row[LENGTH:], floor, LIMITS).first_rms), "too few rows"


def test_tokens_are_held_to_the_tail_one_by_one_and_in_small_groups():
    rate = LIMITS.false_alarm_rate / len(TAIL_COUNTS)

    def size(count, tokens):
        return LIMITS.rms_factor * FLOOR.rms * FLOOR.shape.exceeded_by(count, tokens=tokens, rate=rate)

    tokens = ROWS * LENGTH
    r = 0.2 * noise()
    r[3] = -1.01 * size(1, tokens)
    one = judge(r, ROW, FLOOR, LIMITS)
    assert (one.far_tokens, one.token_limit, one.max_abs) == (1, pytest.approx(size(1, tokens)), -float(r[3]))
    assert any(f"the farthest by {-float(r[3]):.3g}" in reason for reason in one.reasons)
    r = 0.2 * noise()
    r[:10] = (size(10, tokens) + size(3, tokens)) / 2
    ten = judge(r, ROW, FLOOR, LIMITS)
    assert ten.token_limit == pytest.approx(size(10, tokens)) and ten.far_tokens == 10
    few = torch.full((10,), 1.01 * size(10, 10))
    assert judge(few, torch.arange(10), FLOOR, LIMITS).far_tokens == 10, "all of them, where there are ten"


def test_a_quarter_of_the_tokens_may_be_beyond_the_quartile_of_the_noise():
    """1.25 times the quartile 0.5, of a floor of 0.05 nats: 38 % of 200 tokens are 3.54 standard errors away."""
    floor = replace(FLOOR, shape=NoiseShape(quartile=0.5))
    limit = 0.25 + normal_quantile(2e-4) * math.sqrt(1.5 * 0.25 * 0.75 / 200)
    most = math.floor(limit * 200)

    def beyond(count, size=0.0313, sign=1.0):
        r_T = torch.zeros(200, dtype=torch.float64)
        r_T[torch.randperm(200, generator=torch.Generator().manual_seed(0))[:count]] = sign * size
        return r_T

    assert judge_quartile(beyond(most), ROW, floor, LIMITS) is None
    for sign in (1, -1):
        reason = judge_quartile(beyond(most + 1, sign=sign), ROW, floor, LIMITS)
        assert (
            reason == f"{(most + 1) / 200:.0%} of 200 tokens beyond 0.0312 nats, where rounding puts up to {limit:.0%}"
        )
    assert judge_quartile(beyond(200, 0.0312), ROW, floor, LIMITS) is None
    assert judge_quartile(torch.full((200,), math.nan), ROW, floor, LIMITS) is None
    half = torch.where(torch.arange(200) % 2 == 0, math.nan, beyond(200))  # of half as many tokens, more may be
    assert "of 100 tokens" in judge_quartile(half, ROW, floor, LIMITS)
    wide, small = (replace(floor, rows=dict.fromkeys(range(ROWS), rms)) for rms in (0.1, 0.01))
    assert judge_quartile(beyond(200), ROW, wide, LIMITS, lines=range(ROWS)) is None
    assert judge_quartile(beyond(200, 0.0626), ROW, wide, LIMITS, lines=range(ROWS)) is not None
    assert judge_quartile(beyond(200, 0.0312), ROW, small, LIMITS, lines=range(ROWS)) is None
