"""parity/marks.py: single tokens that are far off, told from what stands there: edges of kept sets, and fillers."""

import math

import pytest
import torch
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.parity.compare import Residual, residual
from trueup.parity.evidence import EngineModel
from trueup.parity.facts import Facts
from trueup.parity.marks import EDGE_FLOORS, at_edge, fillers, neighbours, tied_nats, without
from trueup.policy.processing import Distribution
from trueup.types import SamplingParams

LENGTH, ROWS = 10, 8
LOGITS = logits_of(LENGTH * ROWS)
TARGETS = drawn(LOGITS)
FINE, COARSE = 1e-5, 0.05


def plain(logprobs_T, *, logits_TV=LOGITS, targets_T=TARGETS, **knobs):
    """(evidence, what the trainer's own prediction leaves) of reported numbers."""
    evidence = evidence_of(logits_TV, trace_rows(targets_T, LENGTH, logprobs_T=logprobs_T), **knobs)
    return evidence, residual(evidence, EngineModel(dist=evidence.case.trainer_distribution))


def right_numbers(logits_TV=LOGITS, targets_T=TARGETS):
    return logits_TV.log_softmax(1).gather(1, targets_T[:, None])[:, 0]


def filled(values, *, facts=None):
    """(evidence, residual, fillers found) with some numbers replaced: {token: value}."""
    logprobs_T = right_numbers()
    for token, value in values.items():
        logprobs_T[token] = value
    evidence, now = plain(logprobs_T, facts=facts)
    return evidence, now, fillers(evidence, now, now.residual_T.abs() > 0.01)


@pytest.mark.parametrize(
    ("dist", "noise", "expected"),
    [
        ({"top_p": 0.9}, COARSE, [{"top_p": 0.85}, {"top_p": 0.95}]),
        ({"top_p": 0.2}, COARSE, [{"top_p": 0.1}, {"top_p": 0.3}]),
        ({"top_p": 0.9}, FINE, [{"top_p": 0.8999}, {"top_p": 0.9001}]),
        ({"top_k": 20}, COARSE, [{"top_k": 15}, {"top_k": 25}]),
        ({"top_k": 3}, COARSE, [{"top_k": 2}, {"top_k": 4}]),
        ({"top_k": 20}, FINE, [{"top_k": 19}, {"top_k": 21}]),
        ({"top_k": 22}, COARSE, [{"top_k": 17}, {"top_k": 27}]),
        ({"top_k": 2}, FINE, [{"top_k": 1}, {"top_k": 3}]),
        ({"top_k": 1}, FINE, [{"top_k": 2}]),
        ({"min_p": 0.1}, COARSE, [{"min_p": 0.05}, {"min_p": 0.15}]),
        ({"min_p": 0.8}, COARSE, [{"min_p": 0.4}, {"min_p": 1.0}]),
        ({"min_p": 0.1}, FINE, [{"min_p": 0.0999}, {"min_p": 0.1001}]),
        ({}, COARSE, []),
        ({"top_k": 3, "min_p": 0.1}, FINE, [
            {"top_k": 2, "min_p": 0.1}, {"top_k": 4, "min_p": 0.1}, {"top_k": 3, "min_p": 0.0999},
            {"top_k": 3, "min_p": 0.1001},
        ]),
        ({"top_p": 0.9, "top_k": 20}, FINE, [
            {"top_p": 0.8999, "top_k": 20}, {"top_p": 0.9001, "top_k": 20}, {"top_p": 0.9, "top_k": 19},
            {"top_p": 0.9, "top_k": 21},
        ]),
    ],
)  # fmt: skip
def test_cuts_move_as_far_as_rounding_moves_them(dist, noise, expected):
    found = neighbours(Distribution(temperature=0.7, **dist), noise)
    assert len(found) == len(expected)
    for other, fields in zip(found, expected, strict=True):
        assert other.temperature == 0.7
        for name in ("top_p", "top_k", "min_p"):
            default = getattr(Distribution(), name)
            assert getattr(other, name) == pytest.approx(fields.get(name, default)), name


def top_two(gap, *, token, further=3.0, reported=0.0, noise_rms=COARSE, token_limit=0.1):
    """Whether an edge excuses token 0: a top-k of 1, the second id `gap` nats below the first, a third one `further`
    below that, `token` drawn."""
    logits_TV = torch.full((2, 4), -9.0, dtype=torch.float64)
    logits_TV[:, 0], logits_TV[:, 1], logits_TV[:, 2] = 0.0, -gap, -gap - further
    rows = trace_rows(torch.tensor([token, 0]), 2, logprobs_T=torch.tensor([reported, 0.0], dtype=torch.float64))
    evidence = evidence_of(logits_TV, rows, sampling=SamplingParams(top_k=1))
    now = residual(evidence, EngineModel(dist=evidence.case.trainer_distribution))
    excused_T = at_edge(evidence, now, noise_rms=noise_rms, token_limit=token_limit)
    assert not excused_T[1], "it is not far off"
    return bool(excused_T[0])


def test_a_token_that_a_neighbouring_kept_set_holds_lies_at_its_edge():
    assert top_two(5.0, token=1)
    assert not top_two(5.0, token=2), "two ranks away"
    assert top_two(5.0, token=1, noise_rms=FINE), "the comparison with the cut itself may turn out otherwise"
    assert not top_two(5.0, token=2, noise_rms=FINE)


def test_in_16_bits_a_token_may_lie_some_floors_below_the_cut():
    beyond = EDGE_FLOORS * COARSE - 0.2
    assert top_two(0.2, token=2, further=beyond - 0.01) and not top_two(0.2, token=2, further=beyond + 0.01)
    assert not top_two(0.2, token=2, further=beyond - 0.01, noise_rms=FINE)


def test_a_kept_token_that_is_far_off_is_excused_by_the_set_that_explains_its_number():
    """The engine kept two tokens where the trainer keeps one: the number is that of a set of two."""
    of_two = -math.log1p(math.exp(-0.5))
    assert top_two(0.5, token=0, reported=of_two)
    fine = {"noise_rms": FINE}
    off = EDGE_FLOORS * COARSE
    assert top_two(0.5, token=0, reported=of_two - off + 0.01) and not top_two(
        0.5, token=0, reported=of_two - off - 0.01
    )
    assert top_two(0.5, token=0, reported=of_two + 0.09, **fine)
    assert not top_two(0.5, token=0, reported=of_two - 0.11, **fine)


def test_ties_at_the_cut_of_top_k_are_kept_by_one_side_only():
    """Both keep the likeliest; the trainer its equals as well: up to log 2 for two of them."""
    logits_TV = torch.tensor([[0.0, 0.0, -1.0], [0.0, -5.0, -9.0]], dtype=torch.float64)
    for reported, excused in ((0.0, True), (-math.log(2) - math.log(2) - 0.2, False)):
        rows = trace_rows(torch.tensor([0, 0]), 2, logprobs_T=torch.tensor([reported, 0.0], dtype=torch.float64))
        evidence = evidence_of(logits_TV, rows, sampling=SamplingParams(top_k=1))
        now = residual(evidence, EngineModel(dist=evidence.case.trainer_distribution))
        assert at_edge(evidence, now, noise_rms=FINE, token_limit=0.1).tolist() == [excused, False]


def test_without_a_kept_set_there_is_no_edge():
    evidence, now = plain(right_numbers() + 3.0)
    assert not at_edge(evidence, now, noise_rms=COARSE, token_limit=0.1).any()


def test_a_sentinel_is_known_at_its_first_occurrence():
    evidence, now, found = filled({13: -9999.0})
    assert found.counts == {-9999.0: 1} and found.at_T.nonzero()[:, 0].tolist() == [13] and found.certain
    cause = found.cause(evidence, now)
    assert (cause.id, cause.layer, cause.side, cause.confidence) == ("S9", "semantic", "log", "high")
    assert cause.title.startswith("missing logprobs are filled") and cause.fix.startswith("fail or mask")
    assert "of 80 tokens 1 carry exactly -9999, which their probability rules out" in cause.evidence
    assert "(first line 2 token 3)" in cause.evidence and cause.explained == pytest.approx(1.0)


def test_a_zero_is_a_filler_where_the_token_was_not_certain():
    token = int(right_numbers().argmin())
    _, _, found = filled({token: 0.0})
    assert found.counts == {0.0: 1} and not found.certain
    logits_TV, targets_T = LOGITS.clone(), TARGETS.clone()
    logits_TV[5, targets_T[5]] = -torch.inf
    logits_TV[5, targets_T[5]] = logits_TV[5].logsumexp(0) + 2.6
    logprobs_T = right_numbers(logits_TV)
    assert -0.1 < logprobs_T[5] < -0.05
    logprobs_T[5] = 0.0
    evidence, now = plain(logprobs_T, logits_TV=logits_TV)
    assert fillers(evidence, now, now.residual_T.abs() > 0.01) is None, "a coarse grid gives 0 to it as well"


def test_a_zero_is_a_filler_by_less_than_other_numbers_are():
    right_T = right_numbers()
    token = int(torch.where(right_T < -0.2, right_T, -math.inf).argmax())
    assert -0.9 < float(right_T[token]) < -0.2
    evidence, now, found = filled({token: 0.0})
    assert found.counts == {0.0: 1} and found.cause(evidence, now).explained == pytest.approx(1.0)


def test_only_tokens_that_are_off_carry_a_filler():
    logits_TV = LOGITS.clone()
    logits_TV[9, TARGETS[9]] = 1e3
    logprobs_T = right_numbers(logits_TV)
    assert logprobs_T[9] == 0
    token = int(logprobs_T.argmin())
    logprobs_T[token] = 0.0
    evidence, now = plain(logprobs_T, logits_TV=logits_TV)
    assert fillers(evidence, now, now.residual_T.abs() > 0.01).at_T.nonzero()[:, 0].tolist() == [token]


@pytest.mark.parametrize(
    ("value", "copies", "found"), [(-3.3, 1, False), (-3.3, 2, True), (-3.0, 1, True), (5.5, 2, True)]
)
def test_a_filler_is_whole_or_repeats(value, copies, found):
    far = (right_numbers() - value).abs().argsort(descending=True)[:copies].tolist()
    fill = filled(dict.fromkeys(far, value))[2]
    assert (fill is not None) == found
    if fill is not None:
        assert fill.counts == {value: copies} and fill.certain == (value > 0)
        assert sorted(fill.at_T.nonzero()[:, 0].tolist()) == sorted(far)


def test_numbers_near_their_own_are_on_a_grid_and_no_fillers():
    logprobs_T = right_numbers()
    token = int((logprobs_T - logprobs_T.round()).abs().argmax())
    assert abs(float(logprobs_T[token].round())) >= 1
    near = {token: float(logprobs_T[token].round())}
    assert filled(near)[2] is None
    assert filled(near | {1: -9999.0})[2].counts == {-9999.0: 1}, "whatever else is off"


def test_several_values_are_told_with_their_counts_and_places():
    where = {3: -999.0, 14: -999.0, 25: -999.0, 36: -999.0, 47: 1.0}
    evidence, now, found = filled(where)
    cause = found.cause(evidence, now)
    assert "4 carry exactly -999, 1 carry exactly 1, which" in cause.evidence
    assert "(first line 1 token 3, line 2 token 4, line 3 token 5)" in cause.evidence and "line 4" not in cause.evidence
    off = now.residual_T.abs()
    assert cause.explained == pytest.approx(float(off[list(where)].sum() / off.sum()))


def test_constants_at_last_tokens_of_one_kind_are_left_to_the_search():
    """The engine put the token there itself, at the length limit or the end: T7."""
    lasts = [row * LENGTH + LENGTH - 1 for row in range(ROWS)]
    targets_T = TARGETS.clone()
    targets_T[lasts] = 4

    def found(tokens):
        logprobs_T = right_numbers(targets_T=targets_T)
        logprobs_T[tokens] = 0.0
        evidence, now = plain(logprobs_T, targets_T=targets_T)
        return fillers(evidence, now, now.residual_T.abs() > 0.01)

    assert found(lasts) is None and found(lasts[:2]) is None
    assert found([*lasts, 4]) is not None and found(lasts[:1]) is not None, "one is no pattern"
    assert filled(dict.fromkeys(lasts, 0.0))[2] is not None, "tokens of many kinds were sampled"


def test_constants_at_end_tokens_alone_are_a_trainers_padding():
    end = int(TARGETS.bincount().argmax())
    ends = dict.fromkeys((end == TARGETS).nonzero()[:, 0].tolist(), -9999.0)
    assert len(ends) > 2 and any(token % LENGTH != LENGTH - 1 for token in ends)
    assert filled(ends, facts=Facts(eos_ids=(end,), batch_rows=4))[2] is None
    assert filled(ends, facts=Facts(eos_ids=(end,)))[2] is not None, "an engine pads nothing"
    assert filled(ends, facts=Facts(batch_rows=4))[2] is not None, "they end nothing"


def clamped(limit):
    right_T = right_numbers()
    return filled({t: limit for t in (right_T < limit).nonzero()[:, 0].tolist()})


def test_a_lower_limit_is_told_from_a_filler():
    evidence, now, found = clamped(-2.5)
    cause = found.cause(evidence, now)
    count = int((right_numbers() < -2.51).sum())
    assert cause.id == "S14" and cause.title == "logprobs are clamped at -2.5" and cause.explained == 1.0
    assert f"{count} of 80 tokens carry exactly -2.5, the lowest number" in cause.evidence and cause.side == "log"
    assert (cause.layer, cause.confidence) == ("semantic", "high") and "without a lower limit" in cause.fix
    assert cause.evidence.count(", line ") == 2, "the first three places"
    right_T = right_numbers()
    likelier = int(torch.where(right_T < -1.6, right_T, -math.inf).argmax())
    evidence, now, found = filled({t: -2.5 for t in [*found.at_T.nonzero()[:, 0].tolist(), likelier]})
    assert found.cause(evidence, now).id == "S9", "one of them is more likely than that"
    evidence, now, found = filled({int(right_T.argmin()): -2.0})
    assert found.cause(evidence, now).id == "S9", "there are lower numbers"


def test_a_filler_that_is_nowhere_off_is_none():
    evidence, now = plain(right_numbers())
    assert fillers(evidence, now, torch.zeros(LENGTH * ROWS, dtype=torch.bool)) is None


def test_marked_numbers_become_missing_and_nothing_else_changes():
    rows = trace_rows(TARGETS, LENGTH, logprobs_T=right_numbers())
    evidence = evidence_of(LOGITS, rows)
    at_T = torch.zeros(len(TARGETS), dtype=torch.bool)
    at_T[[0, 12]] = True
    left = without(rows, evidence, at_T)
    assert all(a is b for a, b in zip(left[2:], rows[2:], strict=True)), "rows without a mark are the same"
    for row, token in ((0, 0), (1, 2)):
        values, before = left[row].completion_logprobs, rows[row].completion_logprobs
        assert (
            math.isnan(values[token]) and values[:token] + values[token + 1 :] == before[:token] + before[token + 1 :]
        )
        assert left[row].completion_token_ids == rows[row].completion_token_ids


def test_residuals_that_cannot_be_compared_do_not_count_as_explained():
    evidence, _, found = filled({int(right_numbers().argmin()): 0.0})
    now = residual(evidence, EngineModel(dist=Distribution()))
    unusable = [t for t in range(40, 60) if not found.at_T[t]]
    usable_T = now.usable_T.clone()
    usable_T[unusable] = False
    wild_T = now.residual_T.clone()
    wild_T[unusable] = 1e6
    cause = found.cause(evidence, Residual(residual_T=wild_T, usable_T=usable_T, edge_T=now.edge_T, row_T=now.row_T))
    assert cause.explained == pytest.approx(1.0, abs=1e-3)


def test_a_kept_set_that_ties_make_larger_may_be_off_by_its_size():
    """Four equal logits where top-k says two: the trainer keeps all of them, at half of what an engine reports."""
    logits_TV = torch.zeros(LENGTH, 20, dtype=torch.float64)
    logits_TV[:, :4] = 5.0
    logits_TV[1:, 1:4] = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    evidence, _ = plain(torch.zeros(LENGTH), logits_TV=logits_TV, targets_T=torch.zeros(LENGTH, dtype=torch.long))
    found = tied_nats(evidence, Distribution(top_k=2)).tolist()
    assert found[0] == pytest.approx(math.log(2)) and found[1:] == [-math.inf] * (LENGTH - 1)


@pytest.mark.parametrize(("noise_rms", "excused"), [(COARSE, True), (FINE, False)])
def test_several_near_ties_below_the_cut_are_excused_in_16_bits_only(noise_rms, excused):
    """Rank six of a top-k of three, within rounding of the third: in float32 one more neighbour may come, no others."""
    logits_TV = torch.zeros(LENGTH, 20, dtype=torch.float64)
    logits_TV[:, :6] = 5.0 - 1e-5 * torch.arange(6, dtype=torch.float64)
    targets_T = torch.zeros(LENGTH, dtype=torch.long)
    targets_T[4] = 5
    values_T = torch.full((LENGTH,), -math.log(3), dtype=torch.float64)
    evidence, now = plain(values_T, logits_TV=logits_TV, targets_T=targets_T, sampling=SamplingParams(top_k=3))
    assert now.edge_T.tolist() == [at == 4 for at in range(LENGTH)]
    assert bool(at_edge(evidence, now, noise_rms=noise_rms, token_limit=0.01)[4]) == excused
