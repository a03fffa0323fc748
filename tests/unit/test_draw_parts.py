"""parity/draw_parts.py: which part of the tokens is called odd, by its most likely tokens and by its surprise."""

import math
from dataclasses import replace

import pytest
import torch
from tests.table_kit import trace_rows

from trueup.parity.draw_parts import LARGE, WORTH_COUNTING, Drawn, _judged, odd_parts
from trueup.parity.evidence import Tokens
from trueup.parity.floor import normal_quantile

RATE = 0.01


def part(tokens=LARGE, *, offset=0.0, tops=None):
    """Tokens of which half are the most likely one; `offset` nats each more surprising than expected."""
    top_T = torch.arange(tokens) < (tokens // 2 if tops is None else tops)
    return Drawn(
        top_T=top_T, chance_T=torch.full((tokens,), 0.5, dtype=torch.float64),
        offset_T=torch.full((tokens,), offset, dtype=torch.float64), variance_T=torch.ones(tokens).double(),
        context_T=torch.arange(tokens),
    )  # fmt: skip


def judged(own, *, skew=1.0, noise_rms=0.0, chance=1.0):
    return _judged(own, RATE, skew, noise_rms, lambda chance_T, count: chance)


@pytest.mark.parametrize(("z", "word"), [(2.62, "more"), (-2.62, "less"), (8.0, "more"), (2.5, ""), (-2.5, "")])
def test_the_surprise_of_a_large_part_is_held_to_its_rate_on_both_sides(z, word):
    assert 2.5 < normal_quantile(RATE / 2) < 2.62
    chance, what = judged(part(offset=z / math.sqrt(LARGE)))
    assert what == (f"tokens are {word} surprising than their distribution (z {z:+.1f})" if word else "")
    assert chance == pytest.approx(math.erfc(abs(z) / math.sqrt(2)) if word else 1.0)
    assert judged(part(LARGE - 1, offset=1.0))[1] == "", "the surprise of a small part says nothing"


def test_a_skewed_surprise_and_the_engine_s_noise_have_their_share():
    offset = 4.0 / math.sqrt(LARGE)
    assert judged(part(offset=offset), skew=1.5)[0] == pytest.approx(math.erfc(4.0 / 1.5 / math.sqrt(2)))
    assert judged(part(offset=offset), skew=1.6)[1] == ""
    assert "z +3.7" in judged(part(offset=offset), noise_rms=math.sqrt(0.3 / math.sqrt(LARGE)))[1]
    assert "z -3.7" in judged(part(offset=-offset), noise_rms=math.sqrt(0.3 / math.sqrt(LARGE)))[1]
    certain = replace(part(offset=1e-4), variance_T=torch.zeros(LARGE).double())
    assert "more surprising" in judged(certain)[1], "without variance any surprise is too much"


def test_only_counts_that_stand_out_are_summed_exactly():
    out = math.ceil(WORTH_COUNTING * math.sqrt(100 / 4)) + 1
    found = judged(part(100, tops=50 + out), chance=RATE / 2)
    assert found == (RATE / 2, f"{50 + out} of 100 tokens are the most likely one, where 50 were expected")
    assert judged(part(100, tops=50 + out), chance=2 * RATE)[1] == ""
    assert judged(part(100, tops=50 + out - 2), chance=0.0)[1] == ""


def odd(own, length, chance_of):
    """(which parts are called odd, those parts) of rows of so many tokens."""
    rows = trace_rows(torch.zeros(len(own.top_T), dtype=torch.long), length)
    usable_T = torch.ones(len(own.top_T), dtype=torch.bool)
    found = odd_parts(own, Tokens.of(rows), usable_T, rate=RATE, skew=1.0, noise_rms=0.0, chance_of=chance_of)
    return [p.words.split(":")[0] for p in found], found


@pytest.mark.parametrize(("share", "called"), [(0.9, ["line 1"]), (1.1, [])])
def test_the_rate_is_shared_by_the_parts_of_a_division(share, called):
    """Four rows, odd in either direction: each may come out by chance once in 2 * 4 / rate cases."""
    top_T = (torch.arange(400) % 2 == 0) | (torch.arange(400) < 100)
    chance = share * RATE / 2 / 4
    names, found = odd(
        replace(part(400), top_T=top_T), 100,
        lambda chance_T, count: chance if len(chance_T) == 100 and count > 75 else 1.0,
    )  # fmt: skip
    assert names == called and all((p.tokens, p.top_tokens) == (100, 100) for p in found)


def test_halves_of_completions_are_parts_and_one_row_is_none():
    own = replace(part(400), top_T=torch.arange(400) % 20 < 10)
    for up, half in ((1, "first"), (-1, "second")):

        def chance_of(chance_T, count, up=up):
            return 0.0 if len(chance_T) == 200 and up * (count - 100) > 0 else 1.0

        assert odd(own, 20, chance_of)[0] == [f"the {half} halves of the completions"]
    whole = odd(part(40, tops=40), 40, lambda chance_T, count: 0.0 if len(chance_T) == 40 else 1.0)[0]
    assert not whole, "one row is the whole"
