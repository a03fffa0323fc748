"""Corrections and old policies against hand-computed values; masks zero what they should and nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import NumericsError
from trueup.policy import corrections as cor
from trueup.policy.proximal import CLIPPED_BY_OBJECTIVE, Component, OldPolicy, interpolated

ROW = torch.tensor([0, 0, 1, 1, 1, 2])
RATIO = torch.tensor([3.0, 0.5, 0.4, 1.0, 1.0, 6.0], dtype=torch.float64)
R = RATIO.log()
"""Products 1.5, 0.4, 6; geometric means sqrt(1.5), 0.4^(1/3), 6."""


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_no_correction():
    found = cor.no_correction(R)
    close(found.weight_T, [1.0] * 6)
    assert found.kept_T.all() and not found.truncated_T.any()


def test_token_truncation():
    found = cor.truncate_tokens(R, upper=2.0)
    close(found.weight_T, [2.0, 0.5, 0.4, 1.0, 1.0, 2.0])
    assert found.truncated_T.tolist() == [True, False, False, False, False, True]
    close(cor.truncate_tokens(R, upper=5.0, lower=0.5).weight_T, [3.0, 0.5, 0.5, 1.0, 1.0, 5.0])


def test_sequence_truncation():
    found = cor.truncate_sequences(R, ROW, upper=2.0)
    close(found.weight_T, [1.5, 1.5, 0.4, 0.4, 0.4, 2.0])
    assert found.truncated_T.tolist() == [False] * 5 + [True]


def test_icepop_zeroes_tokens_outside_its_band():
    found = cor.mask_tokens(R)  # 0.5 to 5, both included
    close(found.weight_T, [3.0, 0.5, 0.0, 1.0, 1.0, 0.0])
    assert found.kept_T.tolist() == [True, True, False, True, True, False]


def test_mis_zeroes_sequences_above_its_bound():
    found = cor.mask_sequences(R, ROW, upper=2.0)
    close(found.weight_T, [1.5, 1.5, 0.4, 0.4, 0.4, 0.0])
    assert found.kept_T.tolist() == [True] * 5 + [False]
    assert cor.mask_sequences(R, ROW, lower=0.5, upper=2.0).kept_T.tolist() == [True] * 2 + [False] * 4


def test_geometric_band_rejects_and_does_not_weigh():
    found = cor.geometric_band(R, ROW, lower=0.7, upper=1.3)
    assert 0.7 < 0.4 ** (1 / 3) < 1.3 and 1.5**0.5 < 1.3
    close(found.weight_T, [1.0] * 5 + [0.0])
    assert not cor.geometric_band(R, ROW).kept_T.any()  # 0.999 to 1.001
    assert cor.geometric_band(torch.zeros(6), ROW).kept_T.all()


def test_k3_rejection():
    k3 = [(w - 1 - math.log(w)) for w in RATIO.tolist()]
    means = [sum(k3[:2]) / 2, sum(k3[2:5]) / 3, k3[5]]
    found = cor.k3_rejection(R, ROW, upper=0.2)
    assert means[1] < 0.2 < means[0] < means[2]
    close(found.weight_T, [0.0, 0.0, 1.0, 1.0, 1.0, 0.0])


def test_veto_looks_below_only_and_takes_the_whole_sequence():
    close(cor.veto(R, ROW, lower=0.45).weight_T, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert cor.veto(R, ROW).kept_T.all()
    tiny = torch.tensor([0.0, math.log(1e-5), 0.0, 0.0, 0.0, 0.0])
    assert cor.veto(tiny, ROW).kept_T.tolist() == [False] * 2 + [True] * 4


def test_two_corrections_in_a_row_and_normalised_weights():
    both = cor.truncate_tokens(R, upper=2.0).then(cor.veto(R, ROW, lower=0.45))
    close(both.weight_T, [2.0, 0.5, 0.0, 0.0, 0.0, 2.0])
    assert both.kept_T.tolist() == [True, True, False, False, False, True]
    close(both.normalised().weight_T, [4 / 3, 1 / 3, 0.0, 0.0, 0.0, 4 / 3])
    part = both.of(torch.tensor([0, 5]))
    close(part.spread(torch.tensor([3, 1]), 4).weight_T, [0.0, 2.0, 0.0, 2.0])
    assert part.spread(torch.tensor([3, 1]), 4).kept_T.tolist() == [False, True, False, True]
    assert float(both.normalised().weight_T[both.kept_T].mean()) == pytest.approx(1.0)


def test_sequence_ratios_grow_with_length_and_do_not_overflow():
    """The length trap: 1.1 a token is 2.6 after 10 tokens and 13,780 after 100; its geometric mean stays 1.1."""
    for length, product in ((10, 2.5937), (100, 13780.6)):
        r, row = torch.full((length,), math.log(1.1), dtype=torch.float64), torch.zeros(length).long()
        assert float(cor.truncate_sequences(r, row, upper=1e9).weight_T[0]) == pytest.approx(product, rel=1e-4)
        assert cor.geometric_band(r, row, lower=1.0, upper=1.11).kept_T.all()
    far = torch.full((4000,), 2.0)
    assert float(cor.truncate_sequences(far, torch.zeros(4000).long(), upper=8.0).weight_T[0]) == pytest.approx(8.0)
    assert not cor.mask_sequences(far, torch.zeros(4000).long(), upper=8.0).kept_T.any()


def test_every_correction_acts_on_backend_and_staleness():
    made = [
        cor.no_correction(R), cor.truncate_tokens(R), cor.truncate_sequences(R, ROW), cor.mask_tokens(R),
        cor.mask_sequences(R, ROW), cor.geometric_band(R, ROW), cor.k3_rejection(R, ROW), cor.veto(R, ROW),
    ]  # fmt: skip
    for found in made:
        assert found.acts_on == (Component.BACKEND, Component.STALENESS)
        assert not found.weight_T.requires_grad and found.weight_T.dtype == torch.float64
    # Together with the objective's own ratio every share is bounded once in decoupled mode, twice in bypass.
    assert CLIPPED_BY_OBJECTIVE[OldPolicy.DECOUPLED] == (Component.POLICY,)
    assert set(CLIPPED_BY_OBJECTIVE[OldPolicy.BYPASS]) == set(Component)


def test_bounds_that_are_not_given_are_those_of_the_sources():
    row, r = torch.tensor([0, 1, 2]), torch.tensor([2.5, 0.5, 1.5], dtype=torch.float64).log()
    close(cor.truncate_tokens(r).weight_T, [2.0, 0.5, 1.5])
    close(cor.truncate_sequences(r, row).weight_T, [2.0, 0.5, 1.5])
    close(cor.mask_sequences(r, row).weight_T, [0.0, 0.5, 1.5])
    k3 = torch.tensor([0.0448, 0.0446, -0.0446], dtype=torch.float64)
    assert 1e-3 < float(k3[0].expm1() - k3[0]) < 1.02e-3 and float(k3[1].expm1() - k3[1]) > 1e-3
    assert cor.k3_rejection(k3, row).kept_T.tolist() == [False, False, True]
    assert cor.k3_rejection(torch.full((3,), 0.04), row).kept_T.all(), "e^r - 1 - r, not e^r - 1 + r"


def test_a_ratio_at_a_bound_is_inside():
    row, r = torch.tensor([0, 1]), torch.tensor([math.log(0.5), math.log(2.0)], dtype=torch.float64)
    assert cor.mask_tokens(r, lower=0.5, upper=2.0).kept_T.all()
    assert cor.geometric_band(r, row, lower=0.5, upper=2.0).kept_T.all()
    assert cor.veto(r, row, lower=0.5).kept_T.all()
    k3 = r.expm1() - r
    assert cor.k3_rejection(r, row, upper=float(k3[1])).kept_T.all()


def test_what_either_of_two_corrections_truncates_is_truncated():
    first, second = cor.truncate_tokens(R, upper=5.0), cor.truncate_tokens(R, upper=2.0)
    assert first.then(second).truncated_T.tolist() == [True, False, False, False, False, True]
    assert second.then(cor.no_correction(R)).truncated_T.tolist() == second.truncated_T.tolist()


def test_weights_of_a_batch_that_is_dropped_whole_stay_zero():
    none = cor.mask_tokens(torch.full((3,), 9.0))
    assert not none.kept_T.any()
    close(none.normalised().weight_T, [0.0] * 3)
    close(none.normalised(torch.tensor([0, 0, 1])).weight_T, [0.0] * 3)


def test_vcpo_scale():
    # Equal weights: 1. One of two sequences with all the weight: ESS 1/2.
    row = torch.tensor([0, 0, 1])
    assert cor.vcpo_scale(torch.zeros(3), row) == 1.0
    skewed = torch.tensor([20.0, 20.0, -20.0])
    assert cor.vcpo_scale(skewed, row) == pytest.approx(math.sqrt(0.5))
    assert cor.vcpo_scale(skewed, row, on_policy_ess=0.55) == pytest.approx(math.sqrt(0.5 / 0.55))
    assert cor.vcpo_scale(torch.zeros(3), row, on_policy_ess=0.55) == 1.0
    with pytest.raises(NumericsError, match="on_policy_ess"):
        cor.vcpo_scale(skewed, row, on_policy_ess=0.0)
    with pytest.raises(NumericsError, match="on_policy_ess"):
        cor.vcpo_scale(skewed, row, on_policy_ess=1.5)


def test_bad_ratios_and_bounds_are_refused():
    with pytest.raises(NumericsError, match="1 of 2 log ratios"):
        cor.truncate_tokens(torch.tensor([0.0, math.nan]))
    with pytest.raises(NumericsError, match="bounds"):
        cor.mask_tokens(R, lower=2.0, upper=0.5)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(0.05, 1), st.floats(1, 20))
def test_bounds_are_on_the_ratio_and_not_on_its_inverse(values, lower, upper):
    r = torch.tensor(values, dtype=torch.float64)
    w = r.exp()
    inside = (w >= lower * (1 + 1e-12)) & (w <= upper * (1 - 1e-12))
    outside = (w < lower * (1 - 1e-12)) | (w > upper * (1 + 1e-12))
    masked = cor.mask_tokens(r, lower=lower, upper=upper)
    assert bool(masked.kept_T[inside].all()) and not bool(masked.kept_T[outside].any())
    torch.testing.assert_close(masked.weight_T[inside], w[inside])
    assert bool((masked.weight_T[outside] == 0).all())
    truncated = cor.truncate_tokens(r, lower=lower, upper=upper).weight_T
    torch.testing.assert_close(truncated, w.clamp(lower, upper))


def test_interpolated_old_policy():
    mu, now = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -2.0, -2.0])
    version = torch.tensor([4, 6, 8])
    # At the start of the step nothing has moved: the proximal policy is the current one.
    assert torch.equal(interpolated(now, mu, version, proximal_version=8, current_version=8), now)
    # One step on, v = 4: (8 - 4) / (9 - 4); v = 6: 2 / 3; v = 8: 0.
    found = interpolated(now, mu, version, proximal_version=8, current_version=9)
    torch.testing.assert_close(found, torch.tensor([-1.8, -1 - 2 / 3, -1.0]))
    far = interpolated(now - 2, mu, version, proximal_version=8, current_version=9)
    torch.testing.assert_close(far, torch.tensor([-1 - 0.8 * 3, -1 - 2 / 3 * 3, -1.0]))
    assert not interpolated(now.requires_grad_(), mu, version, proximal_version=8, current_version=9).requires_grad
    with pytest.raises(NumericsError, match="out of order"):
        interpolated(now, mu, version, proximal_version=7, current_version=9)
