"""ratios.py and diagnostics.py: hand-computed values, an independent numpy implementation, and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import NumericsError
from trueup.policy import diagnostics as d
from trueup.policy import ratios

ROW = torch.tensor([0, 0, 0, 1, 1])
R = torch.tensor([0.1, -0.2, 0.4, 0.0, -0.3], dtype=torch.float64)


def test_levels_by_hand():
    assert torch.allclose(ratios.sequence_log_ratio(R, ROW), torch.tensor([0.3, -0.3], dtype=torch.float64))
    assert torch.allclose(ratios.geometric_log_ratio(R, ROW), torch.tensor([0.1, -0.15], dtype=torch.float64))
    version = torch.tensor([4, 4, 5, 5, 5])
    segments = ratios.segment_of(ROW, version)
    assert segments.tolist() == [0, 0, 1, 2, 2] and segments.dtype == torch.long
    expected = torch.tensor([-0.1, 0.4, -0.3], dtype=torch.float64)
    assert torch.allclose(ratios.segment_log_ratio(R, ROW, version), expected)


def test_the_three_ratios_telescope():
    mu, stamped, proximal, now = torch.randn(4, 7)
    parts = ratios.PolicyLogRatios.of(behaviour_T=mu, stamped_T=stamped, proximal_T=proximal, current_T=now)
    assert torch.allclose(parts.total_T, now.double() - mu.double())
    assert torch.allclose(parts.backend_T, stamped.double() - mu.double())
    assert torch.allclose(parts.staleness_T, proximal.double() - stamped.double())


def test_values_by_hand():
    r = torch.tensor([math.log(2.0), 0.0], dtype=torch.float64)
    assert d.kl_k1(r) == pytest.approx(-math.log(2) / 2)
    assert d.kl_k2(r) == pytest.approx(math.log(2) ** 2 / 4)
    assert d.kl_k3(r) == pytest.approx((1 - math.log(2)) / 2)
    assert d.ess(r) == pytest.approx(9 / (2 * 5))
    assert d.chi2(r) == pytest.approx((4 + 1) / 2 - 1)
    assert d.clip_fraction(r, low=0.2, high=0.2) == 0.5
    assert d.ppl_ratio(R, ROW) == pytest.approx((math.exp(-0.1) + math.exp(0.15)) / 2)
    positive, negative = d.advantage_skew(r, torch.tensor([1.0, -3.0]))
    assert (positive, negative) == (pytest.approx(-1.0), pytest.approx(0.0))
    assert math.isnan(d.advantage_skew(r, torch.tensor([1.0, 1.0]))[1])
    r = torch.tensor([2.0, 3.0, 4.0, 5.0, 0.5]).log()
    positive, negative = d.advantage_skew(r, torch.tensor([0.0, 0.5, -2.0, 3.0, -1.0]))
    assert positive == pytest.approx((-2 * 0.5 - 4 * 3) / 2) and negative == pytest.approx((3 * 2 - 0.5) / 2)
    assert d.lag_histogram(torch.tensor([3, 3, 5, 6]), 5) == {-1: 1, 0: 1, 2: 2}


def test_advantage_skew_sees_what_k3_is_blind_to():
    """Swap the errors between good and bad tokens: K3 is the same number, the skew changes sign."""
    r = torch.tensor([0.3, 0.3, -0.3, -0.3], dtype=torch.float64)
    good_up, good_down = torch.tensor([1.0, 1, -1, -1]), torch.tensor([-1.0, -1, 1, 1])
    assert d.kl_k3(r) == d.kl_k3(r.clone())
    assert d.advantage_skew(r, good_up)[0] == pytest.approx(-math.expm1(0.3))
    assert d.advantage_skew(r, good_down)[0] == pytest.approx(-math.expm1(-0.3))


def numpy_diagnose(trainer, engine, row):
    r = trainer - engine
    w = np.exp(r)
    groups = [r[row == g] for g in np.unique(row)]
    sums, means = np.array([g.sum() for g in groups]), np.array([g.mean() for g in groups])

    def ess(x):
        return x.sum() ** 2 / (len(x) * (x**2).sum())

    from scipy.stats import norm

    low, high, rms = np.log(1 - 3e-4), np.log(1 + 4e-4), np.sqrt((r**2).mean())
    sd = [rms / np.sqrt(len(g)) for g in groups]
    return {
        "mean_abs": np.abs(r).mean(), "max_abs": np.abs(r).max(), "rms": rms, "mean": r.mean(), "mean_w": w.mean(),
        "k1": -r.mean(), "k2": (r**2).mean() / 2, "k3": (w - 1 - r).mean(), "chi2_token": (w**2).mean() - 1,
        "chi2_sequence": (np.exp(sums) ** 2).mean() - 1, "ppl_ratio": np.exp(-means).mean(), "ess_token": ess(w),
        "ess_sequence": ess(np.exp(sums)), "ess_geometric": ess(np.exp(means)),
        "probability_pearson": np.corrcoef(np.exp(trainer), np.exp(engine))[0, 1],
        "gspo_clip_fraction": np.mean((np.exp(means) < 1 - 3e-4) | (np.exp(means) > 1 + 4e-4)),
        "gspo_clip_fraction_expected": np.mean([norm.cdf(low / s) + norm.sf(high / s) for s in sd]),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-4, 0.05, 0.5])
def test_every_diagnostic_against_numpy(seed, scale):
    rng = np.random.default_rng(seed)
    engine = -rng.exponential(1.0, 200)
    trainer = engine + rng.normal(0, scale, 200)
    row = np.sort(rng.integers(0, 9, 200))
    ours = d.diagnose(torch.tensor(trainer), torch.tensor(engine), torch.tensor(row)).as_dict()
    theirs = numpy_diagnose(trainer, engine, row)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    for q in (0.5, 0.9, 0.99, 0.999):
        assert ours["abs_quantiles"][f"q{q:g}"] == pytest.approx(np.quantile(np.abs(trainer - engine), q))


LOGPROBS = st.lists(st.floats(-20, 0), min_size=1, max_size=40)


@given(values=LOGPROBS)
def test_equal_logprobs_give_ratio_one_and_ess_one(values):
    logprobs = torch.tensor(values, dtype=torch.float64)
    row = torch.arange(len(values)) // 3
    result = d.diagnose(logprobs, logprobs, row)
    assert result.mean_w == 1 and result.ess_token == result.ess_sequence == result.ess_geometric == 1
    assert result.k3 == result.rms == result.gspo_clip_fraction == result.gspo_clip_fraction_expected == 0
    assert result.ppl_ratio == 1 and result.chi2_token == result.chi2_sequence == 0


@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=30), order=st.randoms(use_true_random=False))
def test_permutation_changes_nothing(values, order):
    r = torch.tensor(values, dtype=torch.float64)
    row = torch.arange(len(values)) // 4
    permutation = list(range(len(values)))
    order.shuffle(permutation)
    zero = torch.zeros_like(r)
    before = d.diagnose(r, zero, row).as_dict()
    after = d.diagnose(r[permutation], zero, row[permutation]).as_dict()
    for name in set(before) - {"abs_quantiles", "probability_pearson"}:
        assert after[name] == pytest.approx(before[name], rel=1e-9, abs=1e-12), name


@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=20), padding=st.integers(0, 20))
def test_padding_changes_nothing(values, padding):
    r = torch.tensor(values, dtype=torch.float64)
    padded = torch.cat([r, torch.full((padding,), math.nan, dtype=torch.float64)])
    mask = torch.arange(len(padded)) < len(r)
    assert torch.equal(d.select(padded, mask), r)
    assert d.kl_k3(d.select(padded, mask)) == d.kl_k3(r)


@given(values=st.lists(st.floats(-400, 400), min_size=1, max_size=30))
def test_ess_lies_in_zero_one_whatever_the_weights(values):
    assert 0 < d.ess(torch.tensor(values, dtype=torch.float64)) <= 1


def test_gspo_expectation_matches_the_published_table():
    """reference: rms 0.0306 nats at T=256 gives 0.86, at T=1024 0.72; rms 0.0022 at T=64 gives 0.21."""
    for rms, length, share in ((0.0306, 256, 0.86), (0.0306, 1024, 0.72), (0.0022, 64, 0.21)):
        r = torch.full((length,), rms, dtype=torch.float64)
        row = torch.zeros(length, dtype=torch.long)
        assert d.gspo_clip_fraction_expected(r, row) == pytest.approx(share, abs=0.01)


def test_noise_ess_is_exp_of_minus_variance():
    torch.manual_seed(0)
    r = torch.randn(200_000, dtype=torch.float64) * 0.1
    assert d.ess(r) == pytest.approx(math.exp(-0.01), abs=1e-3)


def test_empty_masks_and_non_finite_values_are_refused():
    with pytest.raises(NumericsError, match="selects no tokens"):
        d.select(R, torch.zeros(5))
    with pytest.raises(NumericsError, match=r"1 of 5 .* not finite"):
        d.select(torch.tensor([0.0, math.nan, 0, 0, 0]), torch.ones(5))
    with pytest.raises(NumericsError, match="trainer logprobs for"):
        ratios.token_log_ratio(torch.zeros(3), torch.zeros(4))


def test_the_correlation_of_a_few_small_probabilities():
    p, q = torch.tensor([0.01, 0.02, 0.04, 0.03]).log(), torch.tensor([0.02, 0.01, 0.05, 0.03]).log()
    expected = np.corrcoef(p.double().exp().numpy(), q.double().exp().numpy())[0, 1]
    assert d.probability_pearson(p, q) == pytest.approx(expected) and math.isnan(d.probability_pearson(p, q * 0))
