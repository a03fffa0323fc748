"""Objectives against hand-computed values, their gradients against finite differences in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import NumericsError
from trueup.policy import objectives as obj
from trueup.policy.objectives import Aggregation

ROW = torch.tensor([0, 0, 0, 1, 1, 2])
"""Three sequences of 3, 2 and 1 tokens; the first two share a prompt."""
GROUP = torch.tensor([0, 0, 1])
RATIO = torch.tensor([1.1, 0.7, 1.5, 0.7, 1.5, 1.0], dtype=torch.float64)
ADVANTAGE = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, 0.5], dtype=torch.float64)
OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1, -4.0], dtype=torch.float64)
NEW = OLD + RATIO.log()


def close(actual, expected):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def leaf(values):
    return values.clone().requires_grad_()


def gradient(function, values):
    x = leaf(values)
    function(x).loss_T.sum().backward()
    return x.grad


def test_ppo_by_hand():
    # A > 0: min(rA, 1.2 A) binds above; A < 0: max binds below 0.8.
    found = obj.ppo(NEW, OLD, ADVANTAGE)
    close(found.loss_T, [-2.2, -1.4, -2.4, 0.8, 1.5, -0.5])
    assert found.clipped_T.tolist() == [False, False, True, True, False, False]
    close(found.log_ratio_T, RATIO.log())
    # Its gradient by log pi is -r A where it is not clipped, and 0 where it is.
    close(gradient(lambda x: obj.ppo(x, OLD, ADVANTAGE), NEW), [-2.2, -1.4, 0.0, 0.0, 1.5, -0.5])


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    old, advantage = torch.zeros(3, dtype=torch.float64), torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
    new = torch.tensor([math.log(5.0), math.log(2.0), math.log(5.0)], dtype=torch.float64)
    found = obj.ppo(new, old, advantage, dual=3.0)
    close(found.loss_T, [3.0, 2.0, -1.2])
    assert found.clipped_T.tolist() == [True, False, True]
    close(gradient(lambda x: obj.ppo(x, old, advantage, dual=3.0), new), [0.0, 2.0, 0.0])
    half = obj.ppo(new, old, advantage / 2, dual=3.0)
    close(half.loss_T, [1.5, 1.0, -0.6])
    assert half.clipped_T.tolist() == [True, False, True]
    none = obj.ppo(new, old, torch.zeros_like(advantage), dual=3.0)
    assert not bool(none.loss_T.any()) and not bool(none.clipped_T.any())


def test_grpo_and_dr_grpo_are_ppo_and_dapo_clips_higher():
    for function in (obj.grpo, obj.dr_grpo):
        close(function(NEW, OLD, ADVANTAGE).loss_T, [-2.2, -1.4, -2.4, 0.8, 1.5, -0.5])
    close(obj.dapo(NEW, OLD, ADVANTAGE).loss_T, [-2.2, -1.4, -2.56, 0.8, 1.5, -0.5])
    for function in (obj.ppo, obj.grpo, obj.dr_grpo, obj.dapo):
        close(function(NEW, OLD, ADVANTAGE, low=0.1, high=0.4).loss_T, [-2.2, -1.4, -2.8, 0.9, 1.5, -0.5])


def test_bounds_that_are_not_given_are_those_of_the_papers():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([5.5, 0.01, 1.00035, 1.00045], dtype=torch.float64).log()
    for function in (obj.reinforce, obj.cispo):
        found = function(new, old, -torch.ones(4, dtype=torch.float64))
        close(found.loss_T, [5.0 * float(new[0]), *(new.exp() * new)[1:].tolist()])
        assert found.clipped_T.tolist() == [True, False, False, False]
        close(found.log_ratio_T, new)
    row, up, down = torch.arange(4), torch.ones(4, dtype=torch.float64), -torch.ones(4, dtype=torch.float64)
    assert obj.gspo(new, old, up, row).clipped_T.tolist() == [True, False, False, True]
    low = torch.tensor([0.99965, 0.99975], dtype=torch.float64).log()
    assert obj.gspo(low, old[:2], down[:2], row[:2]).clipped_T.tolist() == [True, False]


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_values_for_other_tokens_are_refused(at):
    given_T = [NEW, OLD, ADVANTAGE, ROW]
    given_T[at] = given_T[at][:-1]
    with pytest.raises(NumericsError, match="values for"):
        obj.gspo(*given_T)
    if at < 3:
        for function in (obj.ppo, obj.cispo):
            with pytest.raises(NumericsError, match="values for"):
                function(*given_T[:3])
    if at < 2:
        with pytest.raises(NumericsError, match="values for"):
            obj.kl_term(*given_T[:2])


def test_gspo_by_hand():
    ratios = [(1.1 * 0.7 * 1.5) ** (1 / 3), (0.7 * 1.5) ** 0.5, 1.0]
    found = obj.gspo(NEW, OLD, ADVANTAGE, ROW, low=0.02, high=0.03)
    assert ratios[0] > 1.03 and 0.98 < ratios[1] < 1.03  # the first is clipped
    close(found.loss_T, [-2 * 1.03] * 3 + [ratios[1]] * 2 + [-0.5])
    assert found.clipped_T.tolist() == [True] * 3 + [False] * 3
    # d s / d log pi_t = s / n for every token of the sequence, summed here over its n equal losses.
    grad = gradient(lambda x: obj.gspo(x, OLD, ADVANTAGE, ROW, low=0.02, high=0.03), NEW)
    close(grad, [0.0] * 3 + [ratios[1]] * 2 + [-0.5])


def test_cispo_and_reinforce_by_hand():
    found = obj.cispo(NEW, OLD, ADVANTAGE, max_ratio=1.2, min_ratio=0.8)
    weight = torch.tensor([1.1, 0.8, 1.2, 0.8, 1.2, 1.0], dtype=torch.float64)
    close(found.loss_T, -weight * ADVANTAGE * NEW)
    assert found.clipped_T.tolist() == [False, True, True, True, True, False]
    close(gradient(lambda x: obj.cispo(x, OLD, ADVANTAGE, max_ratio=1.2, min_ratio=0.8), NEW), -weight * ADVANTAGE)
    capped = torch.tensor([1.1, 0.7, 1.3, 0.7, 1.3, 1.0], dtype=torch.float64)
    close(gradient(lambda x: obj.reinforce(x, OLD, ADVANTAGE, max_ratio=1.3), NEW), -capped * ADVANTAGE)


def test_cispo_without_a_bound_is_reinforce():
    """Its gradient is that of -(pi/old) A: importance-weighted REINFORCE; on policy, -A grad log pi."""
    unbounded = gradient(lambda x: obj.cispo(x, OLD, ADVANTAGE, max_ratio=math.inf), NEW)
    x = leaf(NEW)
    (-(x - OLD).exp() * ADVANTAGE).sum().backward()
    close(unbounded, x.grad)
    close(gradient(lambda x: obj.cispo(x, NEW, ADVANTAGE, max_ratio=math.inf), NEW), -ADVANTAGE)
    close(unbounded, gradient(lambda x: obj.reinforce(x, OLD, ADVANTAGE, max_ratio=math.inf), NEW))


def test_the_dapo_mask_zeroes_a_gradient_that_cispo_keeps():
    assert gradient(lambda x: obj.dapo(x, OLD, ADVANTAGE), NEW)[2] == 0
    assert gradient(lambda x: obj.cispo(x, OLD, ADVANTAGE, max_ratio=1.28), NEW)[2] == pytest.approx(-1.28 * 2)


def frozen_weight(x, old, advantage):
    """What CISPO differentiates, with its stopped weight held at the point of NEW."""
    return -(NEW - old).exp().clamp(0.8, 1.2) * advantage * x


FUNCTIONS = {
    "ppo": lambda x: obj.ppo(x, OLD, ADVANTAGE).loss_T,
    "ppo dual": lambda x: obj.ppo(x, OLD, ADVANTAGE, dual=1.2).loss_T,
    "grpo": lambda x: obj.grpo(x, OLD, ADVANTAGE).loss_T,
    "dr_grpo": lambda x: obj.dr_grpo(x, OLD, ADVANTAGE).loss_T,
    "dapo": lambda x: obj.dapo(x, OLD, ADVANTAGE).loss_T,
    "gspo": lambda x: obj.gspo(x, OLD, ADVANTAGE, ROW, low=0.02, high=0.03).loss_T,
    "kl k1": lambda x: obj.kl_term(x, OLD, estimator="k1"),
    "kl k2": lambda x: obj.kl_term(x, OLD, estimator="k2"),
    "kl k3": lambda x: obj.kl_term(x, OLD),
    "kl weighted": lambda x: obj.kl_term(x, OLD - 0.3, weight_T=(x - OLD).exp()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("how", Aggregation)
def test_gradients_against_finite_differences(name, how):
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()

    def loss(x):
        return obj.aggregate(FUNCTIONS[name](x), how, mask_T=mask, row_T=ROW, group_S=GROUP, fixed_length=5)

    assert torch.autograd.gradcheck(loss, leaf(NEW), eps=1e-7, atol=1e-6, rtol=1e-6)


def test_the_gradient_of_a_stopped_weight_against_finite_differences():
    x = leaf(NEW)
    obj.cispo(x, OLD, ADVANTAGE, min_ratio=0.8, max_ratio=1.2).loss_T.sum().backward()
    for t in range(len(NEW)):
        step = torch.zeros_like(NEW)
        step[t] = 1e-6
        difference = frozen_weight(NEW + step, OLD, ADVANTAGE) - frozen_weight(NEW - step, OLD, ADVANTAGE)
        assert float(x.grad[t]) == pytest.approx(float(difference.sum()) / 2e-6, rel=1e-7)


def test_kl_terms_by_hand():
    reference = NEW + torch.tensor([0.0, math.log(2.0), -math.log(2.0), 0.0, 0.0, 0.0], dtype=torch.float64)
    log2 = math.log(2.0)
    close(obj.kl_term(NEW, reference, estimator="k1")[:3], [0.0, -log2, log2])
    close(obj.kl_term(NEW, reference, estimator="k2")[:3], [0.0, log2**2 / 2, log2**2 / 2])
    close(obj.kl_term(NEW, reference)[:3], [0.0, 1 - log2, -0.5 + log2])
    close(obj.kl_term(NEW, reference, weight_T=RATIO)[:3], [0.0, 0.7 * (1 - log2), 1.5 * (-0.5 + log2)])
    with pytest.raises(NumericsError, match="k1, k2 or k3"):
        obj.kl_term(NEW, reference, estimator="k4")


def test_losses_in_float32_are_aggregated_in_float32():
    loss = torch.tensor([1.0, 3.0])
    found = obj.aggregate(
        loss, Aggregation.TOKEN, mask_T=loss > 0, row_T=torch.tensor([0, 1]), group_S=torch.tensor([0, 1])
    )
    assert found.dtype == torch.float32 and float(found) == 2.0


def test_aggregation_by_hand():
    loss = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 100.0], dtype=torch.float64)
    every = torch.ones(6, dtype=torch.bool)
    arguments = {"row_T": ROW, "group_S": GROUP}
    close(obj.aggregate(loss, Aggregation.TOKEN, mask_T=every, **arguments), 136 / 6)
    close(obj.aggregate(loss, Aggregation.SEQUENCE, mask_T=every, **arguments), (2 + 15 + 100) / 3)
    close(obj.aggregate(loss, Aggregation.PROMPT, mask_T=every, **arguments), (36 / 5 + 100) / 2)
    close(obj.aggregate(loss, Aggregation.FIXED, mask_T=every, fixed_length=4, **arguments), 136 / 12)
    close(obj.aggregate(loss, Aggregation.FIXED, mask_T=every, fixed_length=1, **arguments), 136 / 3)
    some = torch.tensor([True, False, True, False, False, True])  # the second sequence is masked out
    close(obj.aggregate(loss, Aggregation.TOKEN, mask_T=some, **arguments), 104 / 3)
    close(obj.aggregate(loss, Aggregation.SEQUENCE, mask_T=some, **arguments), (2 + 100) / 2)
    close(obj.aggregate(loss, Aggregation.PROMPT, mask_T=some, **arguments), (2 + 100) / 2)
    close(obj.aggregate(loss, Aggregation.FIXED, mask_T=some, fixed_length=4, **arguments), 104 / 8)


def test_a_masked_token_may_hold_anything():
    loss = torch.tensor([1.0, math.inf, 3.0, 10.0, math.nan, 100.0], dtype=torch.float64)
    mask = torch.isfinite(loss)
    assert obj.aggregate(loss, Aggregation.TOKEN, mask_T=mask, row_T=ROW, group_S=GROUP) == 114 / 4


def test_aggregation_needs_tokens_and_a_length():
    with pytest.raises(NumericsError, match="no token counts"):
        obj.token_weights(Aggregation.TOKEN, torch.zeros(6), ROW, GROUP)
    with pytest.raises(NumericsError, match="fixed length"):
        obj.token_weights(Aggregation.FIXED, torch.ones(6), ROW, GROUP)
    with pytest.raises(NumericsError, match="values for"):
        obj.ppo(NEW, OLD[:3], ADVANTAGE)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.sampled_from([*Aggregation]), st.randoms())
def test_weights_of_parts_add_up_to_the_whole(lengths, how, chooser):
    """Whatever the split into micro-batches: the weights belong to tokens, so that parts add up exactly."""
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    group = torch.tensor([i // 2 for i in range(len(lengths))])
    mask = torch.tensor([chooser.random() < 0.8 for _ in range(len(row))])
    mask[0] = True
    weight = obj.token_weights(how, mask, row, group, fixed_length=6)
    assert bool((weight[~mask] == 0).all()) and bool((weight[mask] > 0).all())
    if how != Aggregation.FIXED:
        assert float(weight.sum()) == pytest.approx(1.0)
    loss = torch.tensor([chooser.random() for _ in range(len(row))], dtype=torch.float64)
    parts = sum(float((weight * loss)[row == r].sum()) for r in range(len(lengths)))
    whole = obj.aggregate(loss, how, mask_T=mask, row_T=row, group_S=group, fixed_length=6)
    assert parts == pytest.approx(float(whole))


def test_a_prompt_whose_tokens_are_all_masked_is_in_no_mean():
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    weight = obj.token_weights(Aggregation.PROMPT, mask, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 3]))
    close(weight, [0.25, 0.25, 0.25, 0.25, 0.0, 0.0])
