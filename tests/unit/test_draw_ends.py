"""parity/draw_ends.py: end tokens that should have been drawn and were not; and policies that have no favourite."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import poisson
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity.draw_ends import missing_ends
from trueup.parity.draw_origins import origin_of
from trueup.parity.draws import judge_draws
from trueup.parity.evidence import EngineModel
from trueup.parity.facts import Facts
from trueup.types import SamplingParams

VOCAB, END, LENGTH, ROWS = 20, 7, 40, 64
LOGITS = logits_of(LENGTH * ROWS, VOCAB)
LOGITS[:, END] = LOGITS.logsumexp(1) - 4.6
"""At each step an end has a probability of one in a hundred."""


def completions(targets_T, *, stripped=False):
    """Rows of tokens that end with END, or after LENGTH; `stripped`: the end is left out of the log."""
    rows, kept = [], []
    for at, row in enumerate(trace_rows(targets_T, LENGTH)):
        ids = row.completion_token_ids
        ended = END in ids
        count = ids.index(END) + (not stripped) if ended else LENGTH
        ids, reason = ids[:count], "stop" if ended else "length"
        if count:
            kept += range(at * LENGTH, at * LENGTH + count)
            rows.append(
                replace(row, completion_token_ids=ids, completion_logprobs=(0.0,) * count, finish_reason=reason)
            )
    return rows, LOGITS[kept]


SUPPRESSED = LOGITS.masked_fill(torch.arange(VOCAB) == END, -torch.inf)


def judged(rows, logits_TV, *, ends=(END,), sampling=None, **knobs):
    facts = Facts(vocab=VOCAB, eos_ids=ends)
    evidence = evidence_of(logits_TV, rows, facts=facts, sampling=sampling)
    model = EngineModel(dist=evidence.case.processed)

    def by(model):
        return judge_draws(evidence, model, LimitsConfig(), noise_rms=0.0, token_limit=0.01, **knobs)

    draws = by(model)
    return draws, origin_of(evidence, draws, model, by) if draws.verdict == "mismatch" else None


def test_an_end_token_that_is_never_drawn_is_missed():
    rows, logits_TV = completions(drawn(SUPPRESSED))
    expected = float(logits_TV.softmax(1)[:, END].sum())
    draws, origin = judged(rows, logits_TV)
    assert draws.verdict == "mismatch" and draws.no_ends
    assert f"0 of {len(logits_TV)} tokens end a completion, where {expected:.0f} were expected" in draws.why
    assert origin.id == "S13" and "end tokens" in origin.title and "min_tokens" in origin.fix


@pytest.mark.parametrize("stripped", [False, True])
def test_completions_that_end_as_often_as_they_should_agree(stripped):
    """Also where the log leaves the end tokens out: the finish reason says that there was one."""
    draws, _ = judged(*completions(drawn(LOGITS), stripped=stripped))
    assert draws.verdict == "agree" and not draws.no_ends


def test_hundreds_of_honest_logs_agree():
    logs = (completions(drawn(LOGITS, seed=seed), stripped=bool(seed % 2)) for seed in range(100, 300))
    assert {judged(rows, logits_TV)[0].no_ends for rows, logits_TV in logs} == {False}


def test_ends_are_not_counted_where_a_log_could_not_show_them():
    rows, logits_TV = completions(drawn(SUPPRESSED))
    unnamed = [replace(rows[0], finish_reason=None), *rows[1:]]
    assert judged(unnamed, logits_TV)[0].verdict == "agree"
    assert judged(rows, logits_TV, ends=())[0].verdict == "agree"
    assert judged(rows, logits_TV, whatever_length=True)[0].verdict == "agree"
    within, logits_TV = completions(drawn(LOGITS, top_k=3))
    assert not judged(within, logits_TV, sampling=SamplingParams(top_k=3))[0].no_ends


def test_an_aborted_completion_has_not_ended():
    rows, logits_TV = completions(drawn(SUPPRESSED))
    assert judged([replace(r, finish_reason="abort") for r in rows], logits_TV)[0].no_ends
    assert not judged([replace(r, finish_reason="stop") for r in rows], logits_TV)[0].no_ends


def test_a_policy_without_a_favourite_is_not_called_greedy():
    flat_TV = torch.zeros(LENGTH * ROWS, VOCAB, dtype=torch.float64)
    targets_T = torch.randint(0, VOCAB, (len(flat_TV),), generator=torch.Generator().manual_seed(0))
    draws, _ = judged(trace_rows(targets_T, LENGTH), flat_TV)
    assert draws.verdict == "agree" and draws.top_tokens == draws.top_expected == len(flat_TV)


def test_completions_that_ended_without_an_end_token_are_counted():
    """Four finish reasons say that one was met, where 25 ends were expected."""
    rows, logits_TV = completions(drawn(SUPPRESSED))
    rows = [replace(r, finish_reason="stop") if at < 4 else r for at, r in enumerate(rows)]
    draws, origin = judged(rows, logits_TV)
    assert (
        draws.no_ends and origin.id == "S13" and draws.why.startswith(f"4 of {len(logits_TV)} tokens end a completion")
    )
    last, logits_TV = completions(drawn(SUPPRESSED))
    last[-1] = replace(last[-1], finish_reason="stop")
    assert judged(last, logits_TV)[0].why.startswith(f"1 of {len(logits_TV)} tokens end")


def test_where_two_of_five_completions_ended_too_few_may_have():
    """Only where most of them ended are ends surely not what is missing."""
    likely_TV = LOGITS.clone()
    likely_TV[:, END] = LOGITS.masked_fill(torch.arange(VOCAB) == END, -torch.inf).logsumexp(1) - 3.2
    rows = [
        replace(r, finish_reason="stop" if at % 5 < 2 else "length")
        for at, r in enumerate(completions(drawn(SUPPRESSED))[0])
    ]
    assert len(rows) == ROWS and judged(rows, likely_TV)[0].no_ends


@pytest.mark.parametrize(("share", "missed"), [(0.99, False), (1.01, True)])
def test_ends_are_missed_at_the_rate_of_a_poisson_number(share, missed):
    """Ten ends; an engine whose rounding may make ends less likely by that much is excused."""
    rows, logits_TV = completions(drawn(SUPPRESSED))
    rows = [replace(r, finish_reason="stop") if at < 10 else r for at, r in enumerate(rows)]
    evidence = evidence_of(logits_TV, rows, facts=Facts(vocab=VOCAB, eos_ids=(END,)))
    model, fresh_T = EngineModel(dist=evidence.case.processed), torch.ones(len(logits_TV), dtype=torch.bool)
    expected = float(logits_TV.softmax(1)[:, END].sum())
    assert expected > 20
    rate = share * poisson.cdf(10, expected)
    assert bool(missing_ends(evidence, model, fresh_T, rate=rate, noise_rms=0.0)) == missed
    rate = share * poisson.cdf(10, expected * math.exp(-0.3))
    assert bool(missing_ends(evidence, model, fresh_T, rate=rate, noise_rms=0.3)) == missed
    assert not missing_ends(evidence, model, fresh_T, rate=1.0, noise_rms=math.log(expected / 10.5))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_log_without_its_end_tokens_agrees_however_likely_ends_were(seed):
    """What is left was drawn from the other tokens: it is more surprising than the whole distribution says."""
    likely_TV = logits_of(20 * 400, VOCAB, seed=seed)
    likely_TV[:, END] = likely_TV.logsumexp(1) - 1.5
    rows, kept = [], []
    for at, row in enumerate(trace_rows(drawn(likely_TV, seed=10 + seed), 20)):
        ids = row.completion_token_ids
        count = ids.index(END) if END in ids else len(ids)
        if count:
            kept += range(20 * at, 20 * at + count)
            reason = "stop" if END in ids else "length"
            ids, values = ids[:count], (0.0,) * count
            rows.append(replace(row, completion_token_ids=ids, completion_logprobs=values, finish_reason=reason))
    draws, _ = judged(rows, likely_TV[kept])
    assert draws.verdict == "agree" and draws.tokens > 1000
