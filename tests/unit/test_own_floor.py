"""parity/attribution.py: a cause that makes a model round more coarsely is judged against that model's own rounding."""

from dataclasses import replace

import pytest
import torch
from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity.attribution import Attributor
from trueup.parity.evidence import EXACT, EngineModel
from trueup.parity.floor import predict
from trueup.parity.grouping import Setting
from trueup.parity.hypotheses import Hypothesis, Variant
from trueup.parity.hypotheses.configuration import DENSE, every_neighbour
from trueup.parity.scorer import Arithmetic, Scorer
from trueup.parity.setting import SettingJudge
from trueup.policy.processing import Distribution

LENGTH, ROWS = 25, 16
INTACT, CHANGED = logits_of(LENGTH * ROWS), logits_of(LENGTH * ROWS, seed=5)
SIMULATED = replace(EXACT, simulation=("window", 12.0))
TRAINER_NATS, CHANGED_NATS = 0.01, 0.2


def rounded_to(nats, seed):
    return nats * torch.randn(LENGTH * ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs(logits_TV, targets_T):
    return logits_TV.log_softmax(1).gather(1, targets_T[:, None])[:, 0]


def search(engine_nats, *, own_nats=CHANGED_NATS, trainer_T=TRAINER_NATS):
    """An engine that computes what the table CHANGED says, and rounds it to `engine_nats`."""
    targets_T = drawn(CHANGED)
    rows = trace_rows(targets_T, LENGTH, logprobs_T=logprobs(CHANGED, targets_T) + rounded_to(engine_nats, 3))

    def part(chosen):
        at_T = torch.cat([torch.arange((r.line - 1) * LENGTH, r.line * LENGTH) for r in chosen])
        intact, changed = (evidence_of(table[at_T], chosen) for table in (INTACT, CHANGED))
        return replace(intact, ask=lambda source, dists: (intact if source.plain else changed).ask(source, dists))

    def floor_of(model):
        size = trainer_T if model.source.plain else own_nats
        exact_T = torch.zeros(LENGTH * ROWS, dtype=torch.float64)
        row_T = torch.arange(ROWS).repeat_interleave(LENGTH)
        noise = [rounded_to(size / 2**0.5, seed) for seed in (1, 2)]
        return predict(*noise, exact_T, row_T=row_T, basis="", min_floor=1e-5, lines=[r.line for r in rows])

    cause = Hypothesis(
        id="I9", layer="inference", title="window", fix="", simulates=True,
        variants=lambda evidence, model: [Variant(model=replace(model, source=SIMULATED), detail="window 12")],
    )  # fmt: skip
    fit, held = part(rows[::2]), part(rows[1::2])
    return Attributor(fit=fit, held=held, hypotheses=[cause], floor_of=floor_of, limits=LimitsConfig()).run(
        mismatch=True
    )


def test_what_a_cause_leaves_may_be_the_rounding_of_the_model_that_it_makes():
    found = search(CHANGED_NATS / 2**0.5)
    assert [f.hypothesis.id for f in found.findings] == ["I9"] and found.judgement.within
    assert found.floor.rms == pytest.approx(CHANGED_NATS, rel=0.1)
    assert found.judgement.rms > 5 * TRAINER_NATS


def test_the_trainer_s_rounding_is_the_measure_where_it_is_enough():
    found = search(TRAINER_NATS / 2**0.5)
    assert found.judgement.within and found.floor.rms == pytest.approx(TRAINER_NATS, rel=0.1)


def test_more_than_both_is_no_rounding():
    found = search(CHANGED_NATS / 2**0.5, own_nats=2 * TRAINER_NATS)
    assert not found.judgement.within


def test_a_cause_that_leaves_much_is_not_excused_by_a_model_that_rounds_coarsely():
    """Its own rounding counts only for a change that takes away nearly all of the gap."""
    found = search(1.0, own_nats=5.0)
    assert not found.judgement.within and found.floor.rms == pytest.approx(TRAINER_NATS, rel=0.1)


def test_a_tail_that_is_heavy_does_not_excuse_what_a_cause_leaves_in_all_other_tokens():
    """One token in a hundred is far off by rounding, and a cause that leaves five times the others is not complete."""
    spikes_T = torch.where(torch.arange(LENGTH * ROWS) % 100 == 7, 100.0, 1.0) * TRAINER_NATS
    found = search(5 * TRAINER_NATS, own_nats=spikes_T, trainer_T=spikes_T)
    assert not found.judgement.within and [f.confidence for f in found.findings] == ["medium"]
    assert ["rounding puts" in reason for reason in found.judgement.reasons] == [True]
    assert search(TRAINER_NATS, own_nats=spikes_T, trainer_T=spikes_T).judgement.within


def test_a_changed_model_is_run_in_the_precision_that_is_asked_for(tiny_model):
    coarse = Arithmetic(body=torch.bfloat16, head=torch.float32)
    scorer = Scorer(path=tiny_model, trainer=coarse, engine=coarse)
    targets_T = torch.randint(0, 50, (120,), generator=torch.Generator().manual_seed(0))
    rows = trace_rows(targets_T, 30)
    evidence = scorer.evidence(evidence_of(INTACT, rows).case, rows)
    exact, reference, trainer, engine = (
        evidence.scores(replace(SIMULATED, precision=name), Distribution()).logprobs_T
        for name in ("exact", "reference", "trainer", "engine")
    )
    intact = evidence.scores(EXACT, Distribution()).logprobs_T
    assert torch.equal(exact, reference) and torch.equal(trainer, engine)
    rounding, change = ((a - exact).square().mean().sqrt() for a in (engine, intact))
    assert 0 < 20 * rounding < change


@pytest.mark.parametrize("body", [torch.float32, torch.bfloat16])
def test_an_imitated_rounding_is_held_against_the_trainer_s(tiny_model, body):
    """It runs in float32 alone, so that it has no rounding of its own in another precision."""
    side = Arithmetic(body=body, head=torch.float32)
    rows = trace_rows(torch.randint(0, 50, (120,), generator=torch.Generator().manual_seed(0)), 30)
    setting = Setting(case=evidence_of(INTACT, rows).case, rows=tuple(rows))
    judge = SettingJudge(Scorer(path=tiny_model, trainer=side, engine=side), LimitsConfig())
    imitated, altered = (
        EngineModel(dist=Distribution(), source=replace(EXACT, simulation=(name, value)))
        for name, value in (("residual_truncated", 0.0), ("window", 4.0))
    )
    intact = judge.floor(setting, EngineModel(dist=Distribution()))
    assert judge.floor(setting, imitated) == intact
    assert judge.floor(setting, altered).engine_rms != intact.engine_rms


@pytest.mark.parametrize(("value", "first", "last"), [(16, 11, 21), (8, 5, 11), (1, 2, 2), (256, 171, 336)])
def test_neighbours_of_a_window_are_every_number_or_evenly_spread(value, first, last):
    near = every_neighbour(value)
    assert (near[0], near[-1]) == (first, last) and value not in near and len(near) <= DENSE + 1
    assert value > 24 or near == [n for n in range(first, last + 1) if n != value]


def test_a_setting_is_scored_once_by_each_side(tiny_model, monkeypatch):
    """Floor, comparison and search look at the same tokens: none computes again what another knows."""
    asked = []
    score = Scorer._score

    def counted(self, source, hidden_TD, tokens, dists, **options):
        asked.extend((source.precision, dist, len(tokens)) for dist in dists)
        return score(self, source, hidden_TD, tokens, dists, **options)

    monkeypatch.setattr(Scorer, "_score", counted)
    side = Arithmetic(body=torch.bfloat16, head=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = trace_rows(torch.randint(3, 300, (400,), generator=generator), 40)
    scorer = Scorer(path=tiny_model, trainer=side, engine=side)
    rows = [replace(r, completion_logprobs=tuple(values)) for r, values in zip(rows, scorer.afresh(rows), strict=True)]
    asked.clear()
    case = replace(evidence_of(INTACT, rows).case, drawn=False)
    judge, setting = SettingJudge(scorer, LimitsConfig()), Setting(case=case, rows=tuple(rows))
    assert judge.judge(setting).report.verdict == "agree"
    sides = [(precision, dist) for precision, dist, tokens in asked if tokens == 400]
    assert {"trainer", "engine", "reference"} <= {precision for precision, _ in sides} and len(sides) == len(set(sides))
