"""parity/bias.py: which ids an engine favours or forbids, read off what it drew and reported."""

import math

import pytest
import torch
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.parity.bias import (
    BIASES,
    CANDIDATES,
    MAX_IDS,
    SHOWN,
    _missed,
    bias_variants,
    closer_bias,
    smallest_bias,
)
from trueup.parity.evidence import EngineModel
from trueup.parity.facts import Facts
from trueup.policy.processing import Distribution

LENGTH, ROWS, VOCAB = 20, 40, 20
LOGITS = logits_of(LENGTH * ROWS, VOCAB)
PLAIN = EngineModel(dist=Distribution())


def pair(biases, *, eos_ids=(), off_in=range(ROWS)):
    """(evidence of the first half of the rows, evidence of all) of an engine with biases {id: nats}, whose numbers
    show it in some rows only."""
    biased_TV = LOGITS.clone()
    for token_id, nats in biases.items():
        biased_TV[:, token_id] += nats
    targets_T = drawn(biased_TV)
    number_T, plain_T = (t.log_softmax(1).gather(1, targets_T[:, None])[:, 0] for t in (biased_TV, LOGITS))
    off_T = torch.isin(torch.arange(LENGTH * ROWS) // LENGTH, torch.tensor(list(off_in)))
    rows = trace_rows(targets_T, LENGTH, logprobs_T=torch.where(off_T, number_T, plain_T))
    facts = Facts(vocab=VOCAB, eos_ids=eos_ids)
    whole = evidence_of(LOGITS, rows, facts=facts)
    half = evidence_of(LOGITS[: LENGTH * ROWS // 2], rows[: ROWS // 2], facts=facts, whole=whole)
    return half, whole


def offered(biases, model=PLAIN, **knobs):
    return [v.model.bias for v in bias_variants(pair(biases, **knobs)[0], model)]


def test_an_engine_without_a_bias_suggests_none():
    assert offered({}) == []


@pytest.mark.parametrize("nats", [2.0, -1.5])
def test_an_id_that_is_constantly_off_is_tried_at_every_size(nats):
    sign = math.copysign(1, nats)
    assert offered({7: nats}) == [((7,), sign * b) for b in BIASES]
    variant = bias_variants(pair({7: nats})[0], PLAIN)[2]
    assert variant.detail == f"the engine adds {sign * 2:+g} nats to the logits of 1 id (7)"


def test_what_is_off_in_the_rows_that_suggested_it_alone_is_no_bias():
    assert offered({7: 2.0}, off_in=range(ROWS // 2)) == []
    assert offered({7: 2.0}, off_in=range(ROWS - 1)) != [], "three quarters of the others are enough"


def test_an_id_with_a_missing_number_is_not_constantly_off():
    half, whole = pair({7: 2.0})
    at = int((half.tokens.targets_T == 7).nonzero()[0, 0])
    for value in (math.nan, math.inf, -math.inf):
        half.tokens.engine_T[at] = value
        assert bias_variants(half, PLAIN) == [], value
    assert len(whole.tokens) == 2 * len(half.tokens)


def test_an_id_that_is_expected_often_and_never_drawn_is_forbidden():
    assert ((3,), -math.inf) in offered({3: -math.inf})
    assert ((VOCAB - 1,), -math.inf) in offered({VOCAB - 1: -math.inf}), "no id above it is drawn"
    both = [ids for ids, bias in offered({3: -math.inf, 9: -math.inf}) if bias == -math.inf]
    assert both == [(3, 9)]
    detail = bias_variants(pair({3: -math.inf, 9: -math.inf})[0], PLAIN)[0].detail
    assert detail == "the engine forbids 2 ids (3, 9)"


def test_end_ids_that_were_never_drawn_are_tried_alone_and_with_the_others():
    ends = [ids for ids, bias in offered({3: -math.inf, 9: -math.inf}, eos_ids=(9, 11, VOCAB + 5)) if math.isinf(bias)]
    assert ends == [(3, 9), (9,)], "11 was drawn, and the last id lies outside the vocabulary"


def test_an_id_that_is_rarely_expected_is_not_missed():
    rare_TV = LOGITS.clone()
    rare_TV[:, 3] = -9.0
    rows = trace_rows(drawn(rare_TV), LENGTH)
    evidence = evidence_of(rare_TV, rows)
    assert float(evidence.expected()[3]) < 6
    assert [v for v in bias_variants(evidence, PLAIN) if v.model.bias[0] == (3,)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"bias": ((1,), 1.0)},
        {"allowed": (1, 2)},
        {"shift": 1},
        {"dist": Distribution(top_k=5)},
        {"dist": Distribution(presence_penalty=1.0)},
    ],
)
def test_beside_what_changes_probabilities_itself_no_bias_is_tried(change):
    model = EngineModel(**{"dist": Distribution()} | change)
    half = pair({3: -math.inf})[0]
    assert bias_variants(half, model) == []
    assert "shift" in change or smallest_bias(half, model) == []


def test_the_least_visible_bias_is_the_smallest_on_the_rarest_id():
    half, whole = pair({5: -math.inf}, eos_ids=(5, 6))
    counts = whole.tokens.targets_T.bincount(minlength=VOCAB)
    seen = counts.masked_fill(counts <= 2, 10_000)
    assert [v.model.bias for v in smallest_bias(half, PLAIN)] == [
        ((int(seen.argmin()),), BIASES[0]),
        ((5,), -math.inf),
    ]
    drawn_all = smallest_bias(pair({}, eos_ids=(6,))[0], PLAIN)
    assert len(drawn_all) == 1, "an end that was drawn is not forbidden"
    twice = evidence_of(LOGITS[:6], trace_rows(torch.tensor([1, 1, 2, 2, 2, 3]), 6))
    assert [v.model.bias[0] for v in smallest_bias(twice, PLAIN)] == [(2,)], "twice is not often"
    once = evidence_of(LOGITS[:3], trace_rows(torch.tensor([1, 2, 3]), 3))
    assert smallest_bias(once, PLAIN) == [], "nothing occurs often enough to be noticed"


def closer(bias, step, half=None):
    half = half or pair({3: -math.inf})[0]
    variant = bias_variants(pair({3: -math.inf})[0], PLAIN)[0]
    variant = type(variant)(model=EngineModel(dist=Distribution(), bias=bias), detail="")
    return [v.model.bias for v in closer_bias(half, variant, step)]


@pytest.mark.parametrize(
    ("bias", "step", "expected"),
    [(2.0, 1.0, [1.5, 2.5]), (0.5, 1.0, [1.0]), (-2.0, 0.5, [-2.25, -1.75]), (1 / 3, 0.1, [0.2833, 0.3833])],
)
def test_a_fitted_bias_moves_by_half_a_step_and_never_to_zero(bias, step, expected):
    assert closer(((7, 8), bias), step) == [((7, 8), b) for b in expected]


def test_among_forbidden_ids_one_is_added_or_taken_away():
    half, _ = pair({3: -math.inf, 9: -math.inf, 12: -math.inf})
    found = closer(((3, 9), -math.inf), 1.0, half)
    added = [ids for ids, _ in found if len(ids) == 3]
    assert added == [(3, 9, 12)], "the only other one that was never drawn"
    assert [ids for ids, _ in found if len(ids) == 1] == [(9,), (3,)]
    assert all(bias == -math.inf for _, bias in found)
    assert {ids for ids, _ in closer(((3,), -math.inf), 1.0, half)} == {(3, 9), (3, 12)}, "one id is not taken away"
    assert closer(((3, 9), -math.inf), 0.5, half) == [], "the first round only"
    assert closer(None, 1.0, half) == []


def test_the_id_whose_probability_goes_with_what_is_left_comes_first():
    """Where a forbidden id was likely the others are raised, and nowhere else."""
    half, _ = pair({12: -math.inf})
    order = _missed(half, PLAIN, list(range(VOCAB)))
    assert order[0] == 12 and len(order) == CANDIDATES


def test_many_ids_are_shown_by_the_first_of_them():
    ids = tuple(range(SHOWN + 2))
    half, _ = pair({i: -math.inf for i in ids})
    assert bias_variants(half, PLAIN)[0].detail == f"the engine forbids {len(ids)} ids (0, 1, 2, 3, ...)"
    exact, _ = pair({i: -math.inf for i in range(SHOWN)})
    assert bias_variants(exact, PLAIN)[0].detail.endswith("4 ids (0, 1, 2, 3)")


def test_very_many_ids_are_no_bias():
    wide_TV = logits_of(4000, 200, scale=0.5)
    for count, found in ((MAX_IDS, 1), (MAX_IDS + 1, 0)):
        left_TV = wide_TV.clone()
        left_TV[:, :count] = -math.inf
        evidence = evidence_of(wide_TV, trace_rows(drawn(left_TV), 40))
        forbidden = [v.model.bias for v in bias_variants(evidence, PLAIN) if math.isinf(v.model.bias[1])]
        assert forbidden == [(tuple(range(count)), -math.inf)] * found
