"""parity/decoding.py: which contexts an engine is asked to continue, to see whether decoding itself is off."""

import torch
from tests.table_kit import evidence_of, logits_of, trace_rows

from trueup.engines.probe_http import Answer
from trueup.parity.decoding import CONTEXTS, EARLIEST, first_steps
from trueup.parity.scorer import FP32, Scorer

LENGTH = 16


class Asked:
    """In the place of a server: remembers what it was asked, and answers with two tokens."""

    def __init__(self):
        self.asks = []

    def generate(self, asks, *, together):
        assert not together
        self.asks += asks
        return [Answer(ids=(3, 4), logprobs=(-2.0, -2.0)) for _ in asks]


def asked(tiny_model, rows, *, length=LENGTH, salt="s"):
    ids_T = torch.randint(5, 50, (rows * length,), generator=torch.Generator().manual_seed(0))
    client, made = Asked(), trace_rows(ids_T, length)
    case = evidence_of(logits_of(len(ids_T)), made).case
    seen = first_steps(client, Scorer(path=tiny_model, trainer=FP32, engine=FP32), case, made, salt=salt)
    return client.asks, seen, made


def test_each_context_is_new_to_the_prefix_cache(tiny_model):
    """One completion is cut in several places: the beginnings that they share would come out of the cache, and what
    is left of a prompt then may be a decoding step."""
    asks, seen, made = asked(tiny_model, rows=8)
    assert len(asks) == CONTEXTS and len({a.salt for a in asks}) == CONTEXTS
    whole = {made[i].prompt_token_ids + made[i].completion_token_ids for i in range(8)}
    assert all(any(w[: len(a.prompt)] == a.prompt != w for w in whole) and a.max_tokens == 2 for a in asks)
    assert len({a.prompt for a in asks}) == CONTEXTS
    assert seen is not None and seen.second_rms >= seen.second_mean_abs > 0


def test_few_rows_are_cut_in_four_places_and_short_ones_not_at_all(tiny_model):
    asks, _, _ = asked(tiny_model, rows=2, salt=None)
    assert sorted({len(a.prompt) - 1 for a in asks}) == [4, 8, 12, 15] and {a.salt for a in asks} == {None}
    short, seen, _ = asked(tiny_model, rows=4, length=EARLIEST)
    assert short == [] and seen is None


def test_many_rows_are_cut_once_each(tiny_model):
    asks, _, _ = asked(tiny_model, rows=CONTEXTS + 8)
    assert len(asks) == CONTEXTS and {len(a.prompt) - 1 for a in asks} == {LENGTH // 2}
