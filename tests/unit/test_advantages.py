"""Advantages and filters against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import NumericsError
from trueup.policy import advantages as adv

# Two prompts: rewards 1, 0, 0, 1 and 3, 5; interleaved, because groups need not lie together.
REWARD = torch.tensor([1.0, 3.0, 0.0, 0.0, 5.0, 1.0], dtype=torch.float64)
GROUP = torch.tensor([7, 2, 7, 7, 2, 7])


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_group_mean():
    close(adv.group_mean(REWARD, GROUP), [0.5, -1.0, -0.5, -0.5, 1.0, 0.5])


def test_leave_one_out():
    # For reward 1 of 1, 0, 0, 1 the others' mean is 1/3; for 3 of 3, 5 it is 5.
    close(adv.leave_one_out(REWARD, GROUP), [2 / 3, -2.0, -2 / 3, -2 / 3, 2.0, 2 / 3])
    close(adv.leave_one_out(torch.tensor([4.0]), torch.tensor([0])), [0.0])


def test_std_normalised_divides_by_n_minus_1():
    first, second = math.sqrt(1 / 3), math.sqrt(2.0)  # 4 x 0.25 / 3 and (1 + 1) / 1
    close(
        adv.std_normalised(REWARD, GROUP, eps=0.0),
        [0.5 / first, -1 / second, -0.5 / first, -0.5 / first, 1 / second, 0.5 / first],
    )
    close(adv.std_normalised(REWARD, GROUP)[:1], [0.5 / (first + 1e-4)])
    close(adv.std_normalised(torch.tensor([1.0, 1.0]), torch.tensor([0, 0])), [0.0, 0.0])


def test_batch_normalised_by_advantages_and_by_rewards():
    centred = [0.5, -1.0, -0.5, -0.5, 1.0, 0.5]
    spread = math.sqrt((4 * 0.25 + 2) / 5)
    close(adv.batch_normalised(REWARD, GROUP, eps=0.0), [a / spread for a in centred])
    mean = 10 / 6
    of_rewards = math.sqrt(sum((r - mean) ** 2 for r in REWARD.tolist()) / 5)
    close(adv.batch_normalised(REWARD, GROUP, spread_of="rewards", eps=0.0), [a / of_rewards for a in centred])
    with pytest.raises(NumericsError, match="spread_of"):
        adv.batch_normalised(REWARD, GROUP, spread_of="both")
    pair = adv.batch_normalised(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), eps=0.0)
    close(pair, [-1 / math.sqrt(2), 1 / math.sqrt(2)])


def test_the_spread_of_a_batch_is_that_of_the_sequences_that_take_part():
    reward, group = torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    kept = torch.tensor([True] * 3 + [False] * 3)
    close(adv.batch_normalised(reward, group, kept_S=kept, eps=0.0), [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    spread = math.sqrt(2 / 5)  # an advantage of exactly 0 counts, that of a group that takes part above all
    close(adv.batch_normalised(reward, group, eps=0.0), [-1 / spread, 0.0, 1 / spread, 0.0, 0.0, 0.0])


def test_zero_variance_groups_are_dropped_whole():
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert adv.varies(reward, torch.tensor([0, 0, 1, 1, 2, 2])).tolist() == [False, False, True, True, False, False]


def test_overlong_completions_are_dropped():
    assert adv.not_overlong(["stop", "length", "stop"]).tolist() == [True, False, True]
    assert adv.not_overlong([]).dtype == torch.bool


def test_no_positive_resampling_at_exactly_nine_in_ten():
    rates = adv.PassRates()
    rates.record("easy", [1.0] * 9)
    rates.record("easy", [0.0])
    rates.record("hard", [1.0] * 8 + [0.0, 0.99])
    assert rates.rate("easy") == 0.9 and rates.retired("easy")
    assert rates.rate("hard") == 0.8 and not rates.retired("hard")
    assert rates.rate("new") is None and not rates.retired("new")
    again = adv.PassRates()
    again.restore(rates.to_json())
    assert again.counts == rates.counts


@pytest.mark.parametrize(
    "function", [adv.group_mean, adv.leave_one_out, adv.std_normalised, adv.batch_normalised, adv.varies]
)
def test_bad_input_is_refused(function):
    for reward, group, text in (
        (torch.empty(0), torch.empty(0).long(), "empty"),
        (torch.ones(2), torch.zeros(3).long(), "rewards for"),
        (torch.tensor([1.0, math.nan]), torch.zeros(2).long(), "finite"),
    ):
        with pytest.raises(NumericsError, match=text):
            function(reward, group)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=30), st.floats(-3, 3))
def test_every_advantage_ignores_a_prompt_wide_bonus(pairs, bonus):
    reward = torch.tensor([r for r, _ in pairs], dtype=torch.float64)
    group = torch.tensor([g for _, g in pairs])
    for function in (adv.group_mean, adv.leave_one_out, adv.batch_normalised):
        torch.testing.assert_close(
            function(reward, group), function(reward + bonus * (group == 1), group), rtol=1e-6, atol=1e-6
        )
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, group, adv.group_mean(reward, group))
    assert float(sums.abs().max()) < 1e-9


@pytest.mark.parametrize(("reward", "count"), [(0.1, 3), (0.1, 8), (0.7, 8), (1.1, 7), (1 / 3, 6)])
@pytest.mark.parametrize("kind", [adv.group_mean, adv.leave_one_out, adv.std_normalised, adv.batch_normalised])
def test_equal_rewards_of_any_value_are_worth_exactly_nothing(reward, count, kind):
    """A residue of rounding would be a gradient, and Adam makes a full step of any gradient."""
    rewards = torch.full((2 * count,), reward, dtype=torch.float64)
    groups = torch.arange(2).repeat_interleave(count)
    assert not bool(kind(rewards, groups).any())
