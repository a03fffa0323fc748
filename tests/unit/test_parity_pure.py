"""Floor, judgement, recipe linter, evidence: the pure parts of parity, on made-up numbers."""

import math

import pytest
import torch

from trueup.knobs import LimitsConfig
from trueup.parity.against import shared_tokens
from trueup.parity.evidence import Case, EngineModel, Evidence, Tokens, render, snap
from trueup.parity.floor import SHAPE_TOKENS, SMALLEST_ROW, Floor, NoiseShape, judge, predict, rows_beyond
from trueup.parity.invariants import broken_invariants, positive_logprobs
from trueup.parity.recipe import Recipe, lint
from trueup.policy.logprobs import TokenScores
from trueup.policy.processing import Distribution
from trueup.trace import EngineInfo, TraceRow
from trueup.types import LogprobKind, SamplingParams

LIMITS = LimitsConfig()
N = 2000
ROW = torch.arange(N) // 40


def normal(scale, seed=0, n=N):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def floor(rms=0.05):
    return Floor(rms=rms, trainer_rms=rms, engine_rms=rms, basis="")


def test_the_floor_adds_both_sides_in_squares():
    reference = normal(1.0)
    trainer, engine = reference + normal(0.03, 1), reference + normal(0.04, 2)
    predicted = predict(trainer, engine, reference, row_T=ROW, basis="b", min_floor=1e-5)
    assert predicted.rms == pytest.approx(0.05, rel=0.05)
    assert predicted.trainer_rms == pytest.approx(0.03, rel=0.05)
    same = predict(trainer, trainer, reference, row_T=ROW, basis="b", min_floor=1e-5)
    assert same.rms == pytest.approx(math.sqrt(2) * same.trainer_rms)
    assert predict(reference, reference, reference, row_T=ROW, basis="b", min_floor=1e-5).rms == 1e-5
    outside = torch.full_like(reference, -math.inf)
    assert math.isnan(predict(outside, engine, reference, row_T=ROW, basis="b", min_floor=1e-5).rms)


def test_a_prediction_holds_the_noise_of_both_sides_its_bias_and_each_row():
    reference, row = normal(1.0), ROW.clone()
    trainer, engine = normal(0.03, 1) + 0.02, normal(0.04, 2)
    trainer[ROW == 7], trainer[3] = math.nan, -math.inf
    lines = [1 + r // 2 for r in range(50)]  # two turns of each conversation, of which one line has no numbers
    trainer[ROW == 6] = math.nan
    found = predict(
        reference + trainer, reference + engine, reference, row_T=row, basis="b", min_floor=1e-5, lines=lines
    )
    usable = torch.isfinite(trainer)
    difference, both = (trainer - engine)[usable], (trainer + engine)[usable]
    assert (found.trainer_rms, found.engine_rms) == (
        pytest.approx(float(trainer[usable].square().mean().sqrt())),
        pytest.approx(float(engine[usable].square().mean().sqrt())),
    )
    assert found.rms == pytest.approx(math.hypot(found.trainer_rms, found.engine_rms)) and found.basis == "b"
    assert found.bias == pytest.approx(float((difference + difference.square() / 2).mean()))
    noise, rows = torch.cat([difference, both]), torch.cat([row[usable], row[usable] + 50])
    expected = NoiseShape.of(noise, rows)
    for name in ("tail_start", "tail_share", "tail_scale", "kurtosis", "quartile", "row_spread"):
        assert getattr(found.shape, name) == pytest.approx(getattr(expected, name)), name
    assert sorted(found.rows) == [line for line in range(1, 26) if line != 4]
    here = usable & ((ROW == 0) | (ROW == 1))
    assert found.rows[1] == pytest.approx(float((trainer[here] ** 2 + engine[here] ** 2).mean().sqrt()))
    assert found.of_rows([1, 4]).tolist()[0] == found.rows[1] and math.isnan(found.of_rows([4])[0])
    assert found.of_rows([1]).dtype == torch.float64
    small = Floor(rms=1.0, trainer_rms=1.0, engine_rms=1.0, basis="", rows={5: 0.1, 6: 0.9})
    assert small.of_rows([5, 6]).tolist() == [SMALLEST_ROW, 0.9]
    assert "rows" not in found.as_dict() and found.as_dict()["basis"] == "b"


def test_of_equal_sides_a_second_engine_rounds_as_much_again():
    reference, error = normal(1.0), normal(0.03, 1) + 0.01
    found = predict(reference + error, reference + error, reference, row_T=ROW, basis="", min_floor=1e-5)
    expected = NoiseShape.of(math.sqrt(2) * (reference + error - reference), ROW)
    assert found.bias == 0 and found.shape == expected and found.rows == {}
    nothing = predict(torch.full_like(error, math.nan), error, reference, row_T=ROW, basis="b", min_floor=1e-5)
    assert nothing.basis == "b" and math.isnan(nothing.trainer_rms) and math.isnan(nothing.engine_rms)
    lowest = predict(reference, reference, reference, row_T=ROW, basis="", min_floor=1e-5, lines=range(50))
    assert lowest.rows == dict.fromkeys(range(50), 1e-5)


def test_the_shape_of_noise_is_read_off_a_sample():
    noise = normal(0.1) * torch.where(ROW % 2 == 0, 3.0, 1.0)
    shape = NoiseShape.of(noise, ROW)
    size = noise.abs() / noise.square().mean().sqrt()
    ordered = size.sort(descending=True).values
    assert shape.tail_share == 0.05 and shape.tail_start == pytest.approx(float(ordered[100]))
    assert shape.tail_scale == pytest.approx(max(0.38, float((ordered[:100] - ordered[100]).mean())))
    assert shape.kurtosis == pytest.approx(float(size.pow(4).mean()))
    assert shape.quartile == pytest.approx(float(size.quantile(0.75)))
    squares = torch.stack([size[row == ROW].square().mean() for row in range(50)])
    assert shape.row_spread == pytest.approx(float(squares.log().std())) and shape.row_spread > 0.5
    two = torch.arange(64) // 32
    assert NoiseShape.of(noise[:64], two).row_spread > 0 == NoiseShape.of(noise[:64], 0 * two).row_spread
    assert NoiseShape.of(noise[:SHAPE_TOKENS], ROW[:SHAPE_TOKENS]) != NoiseShape()
    for few in (noise[: SHAPE_TOKENS - 1], noise[:0], torch.zeros(200)):
        assert NoiseShape.of(few, ROW[: len(few)]) == NoiseShape()
    assert NoiseShape.of(noise[:64], two).tail_share == 10 / 64, "at least so many tokens"


def test_rows_that_are_off_by_themselves_are_listed():
    r = normal(0.04)
    r[ROW == 7], r[ROW == 9] = 0.3, math.nan
    assert rows_beyond(r, ROW, floor(), LIMITS) == [7]
    own = Floor(rms=0.05, trainer_rms=0.05, engine_rms=0.05, basis="", rows={107: 1.0})
    assert rows_beyond(r, ROW, own, LIMITS, lines=[100 + i for i in range(50)]) == [], "its own prediction is wide"
    assert rows_beyond(torch.full_like(r, math.nan), ROW, floor(), LIMITS) == []


def test_noise_at_the_floor_passes_and_twice_the_floor_fails():
    assert judge(normal(0.05), ROW, floor(), LIMITS).within
    verdict = judge(normal(0.1), ROW, floor(), LIMITS)
    assert not verdict.within and "2.0 times the predicted floor" in verdict.reasons[0]


def test_a_bias_hidden_in_a_wide_floor_is_found():
    verdict = judge(normal(0.04) + 0.02, ROW, floor(), LIMITS)
    assert verdict.rms < 0.05 and any("bias" in r for r in verdict.reasons)


def test_the_mean_of_pure_noise_is_no_bias():
    """For equal distributions mean w is 1, so mean r is -rms^2/2, not 0."""
    r = normal(0.3, n=200_000) - 0.3**2 / 2
    verdict = judge(r, torch.arange(200_000) // 40, floor(0.3), LIMITS)
    assert not verdict.reasons and abs(verdict.bias) < 0.002


def test_a_few_wild_tokens_are_a_tail():
    r = normal(0.04)
    r[::150] = 1.0
    assert any("tokens beyond" in reason for reason in judge(r, ROW, floor(), LIMITS).reasons)


@pytest.mark.parametrize("count, nats", [(1, 1.0), (2, 8.0), (3, 0.5)])
def test_one_token_far_off_is_no_rounding(count, nats):
    r = normal(0.04, n=288)
    r[:count] = nats
    verdict = judge(r, torch.arange(288) // 18, floor(), LIMITS)
    assert verdict.far_tokens == count and f"{count} of 288 tokens beyond" in verdict.reasons[-1]


@pytest.mark.parametrize("rows, of, floors", [(4, 16, 3.0), (4, 16, 4.0), (3, 64, 6.0), (2, 64, 14.0), (1, 16, 5.0)])
def test_a_fault_in_few_rows_is_an_alarm(rows, of, floors):
    """One stale replica of eight behind one URL: most rows are clean."""
    for seed in range(20):
        r, row = normal(0.9 * 0.07, seed, n=of * 32), torch.arange(of * 32) // 32
        r[row < rows] *= floors / 0.9
        assert judge(r, row, floor(0.07), LIMITS).reasons, seed


def test_a_row_is_held_against_its_own_prediction():
    """Half of the rows are of confident tokens, which round ten times less: what is normal elsewhere is not there."""
    scale = torch.where(ROW % 2 == 0, 0.1, 0.01)
    reference, lines = torch.zeros(N), [100 + i for i in range(50)]
    predicted = predict(
        normal(1.0, 1) * scale, normal(1.0, 2) * scale, reference, row_T=ROW, lines=lines, basis="", min_floor=1e-5
    )
    r = (normal(1.0, 3) - normal(1.0, 4)) * scale
    assert judge(r, ROW, predicted, LIMITS, lines=lines).within
    r[ROW == 7] += 0.25
    verdict = judge(r, ROW, predicted, LIMITS, lines=lines)
    assert (verdict.far_rows, verdict.worst_row) == (1, 107) and "line 107" in verdict.reasons[0]


def test_rows_that_were_not_predicted_are_held_against_all_of_them():
    """A float64 reference is made of some rows only; the others are not half as noisy for that."""
    row, lines = torch.arange(64 * 400) // 400, range(1, 65)
    some = torch.isin(row, torch.arange(0, 64, 4))
    for seed in range(20):
        ours, theirs = normal(0.05, 3 * seed, n=len(row)), normal(0.05, 3 * seed + 1, n=len(row))
        unknown = torch.where(some, 0.0, math.nan)
        predicted = predict(
            ours + unknown, theirs, torch.zeros(len(row)), row_T=row, lines=lines, basis="", min_floor=1e-5
        )
        assert set(predicted.rows) == set(range(1, 65, 4))
        assert judge(ours - theirs - 0.05**2, row, predicted, LIMITS, lines=lines).within, seed


def test_an_offset_counts_by_what_a_completion_makes_of_it():
    """0.012 nats a token hide in the floor of short completions and are 49 nats over 4,096 tokens."""
    for length, alarm, limit in ((32, False, 0.5 / 32), (4096, True, 4e-4)):
        tokens = 64 * length
        r = normal(0.05, n=tokens) + 0.012
        verdict = judge(r, torch.arange(tokens) // length, floor(0.07), LIMITS)
        assert bool(verdict.reasons) == alarm and verdict.bias_limit == pytest.approx(limit, rel=0.1)


def test_the_tail_is_continued_beyond_the_sample():
    """Exponential noise: the largest of n tokens lies at log n, whatever the sample held."""
    noise = torch.empty(20_000).double().exponential_(generator=torch.Generator().manual_seed(0))
    shape = NoiseShape.of(noise, torch.arange(20_000) // 40)
    rms = math.sqrt(2)
    for tokens in (100, 1_000_000):
        assert shape.exceeded_by(1, tokens=tokens, rate=1e-3) * rms == pytest.approx(math.log(tokens / 1e-3), rel=0.1)
    assert shape.exceeded_by(3, tokens=1000, rate=1e-3) < shape.exceeded_by(1, tokens=1000, rate=1e-3)


def test_too_few_or_no_tokens_are_never_within():
    assert not judge(normal(0.01, n=10), ROW[:10], floor(), LIMITS).within
    assert not judge(torch.full((5,), math.nan), ROW[:5], floor(), LIMITS).within


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_heavy_tailed_noise_in_a_few_sequences_is_no_alarm(sequences):
    """A clean engine whose per-token error varies widely: the limits must widen, not collapse."""
    alarms = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.randn(200, dtype=torch.float64, generator=generator).exp() * 0.03
        error, other = (torch.randn(200, dtype=torch.float64, generator=generator) * scale for _ in range(2))
        row = torch.arange(200) * sequences // 200
        lines = range(sequences)
        expected = predict(error, other, torch.zeros(200), row_T=row, lines=lines, basis="", min_floor=1e-5)
        again, more = (torch.randn(200, dtype=torch.float64, generator=generator) * scale for _ in range(2))
        alarms += bool(judge(again - more, row, expected, LIMITS, lines=lines).reasons)
    assert alarms <= 1


def test_false_alarms_are_rare():
    alarms = sum(bool(judge(normal(1.25 * 0.05, seed), ROW, floor(), LIMITS).reasons) for seed in range(500))
    assert alarms <= 1


def trace_row(prompt=(1,), ids=(2, 3), logprobs=(-1.0, -2.0), sampling=None, line=1):
    return TraceRow(
        line=line, engine=EngineInfo(), sampling=sampling or {"temperature": 1.0}, prompt_token_ids=prompt,
        completion_token_ids=ids, completion_logprobs=logprobs,
    )  # fmt: skip


def test_invariants_name_length_and_non_finite():
    rows = [trace_row(logprobs=(-1.0,)), trace_row(logprobs=(-1.0, math.nan), line=2), trace_row(line=3)]
    found = {b.id: b for b in broken_invariants(rows)}
    assert found["T2"].detail.startswith("1 of 3 rows, difference -1; line 1")
    assert "line 2, token 1" in found["I11"].detail
    assert positive_logprobs([trace_row(logprobs=(5e-5, 0.2))]) == 1


def evidence(values, engine, rows):
    tokens = Tokens(
        targets_T=torch.zeros(len(values), dtype=torch.long), row_T=torch.tensor(rows),
        position_T=torch.zeros(len(values)), engine_T=torch.tensor(engine, dtype=torch.float64),
        version_T=torch.full((len(values),), -1),
        prompts=(), lines=(1, 2),
    )  # fmt: skip
    scores = TokenScores(**{n: torch.tensor(values) for n in TokenScores.__dataclass_fields__})
    case = Case(engine=EngineInfo(), sampling=SamplingParams(), trainer=LogprobKind.PROCESSED)
    return Evidence(
        case=case, tokens=tokens, ask=lambda source, dists: [scores for _ in dists],
        mass=lambda source, temperature, ids: torch.zeros(len(values)), expected=lambda: torch.zeros(1),
        ask_spread=lambda source, dist: scores, places=lambda source, temperature: None,
    )  # fmt: skip


def test_rendering_shifts_inside_rows_only():
    e = evidence([-1.0, -2.0, -3.0, -4.0], [0.0] * 4, [0, 0, 1, 1])
    shifted = render(e, EngineModel(dist=Distribution(), shift=1))
    assert shifted[0] == -2 and shifted[2] == -4 and torch.isnan(shifted[[1, 3]]).all()
    back = render(e, EngineModel(dist=Distribution(), shift=-1))
    assert back[1] == -1 and back[3] == -3 and torch.isnan(back[[0, 2]]).all()


def test_rendering_grids_and_constants():
    assert snap(torch.tensor([-1.23456], dtype=torch.float64), "2 decimals").item() == pytest.approx(-1.23)
    assert snap(torch.tensor([-1.2345678], dtype=torch.float64), "bf16").item() == -1.234375
    e = evidence([-1.0, -2.0], [-9999.0, -2.5], [0, 0])
    assert render(e, EngineModel(dist=Distribution(), constant=-9999.0)).tolist() == [-9999.0, -2.0]


def test_shared_tokens_stop_where_completions_part():
    first = [trace_row(ids=(2, 3, 4), logprobs=(-1.0, -2.0, -3.0)), trace_row(prompt=(9,))]
    second = [
        trace_row(ids=(2, 3, 7), logprobs=(-1.1, -2.1, -0.5)),
        trace_row(prompt=(9,), sampling={"temperature": 0.5}),
    ]
    rows, theirs = shared_tokens(first, second)
    assert [r.completion_token_ids for r in rows] == [(2, 3)] and theirs == [(-1.1, -2.1)]


V1, V0 = EngineInfo(name="vllm", api="V1"), EngineInfo(name="vllm", api="V0")
HOT, CUT = SamplingParams(temperature=0.7), SamplingParams(top_p=0.9)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(engine=V1, sampling=HOT, trainer=LogprobKind.PROCESSED, updates_in_flight=False), ["S1"]),
        (Recipe(engine=V1, sampling=HOT, trainer=LogprobKind.PROCESSED, logprobs_mode="processed_logprobs"), []),
        (Recipe(engine=V1, sampling=SamplingParams(), trainer=LogprobKind.PROCESSED), []),
        (Recipe(engine=V0, sampling=HOT, trainer=LogprobKind.PROCESSED), []),
        (Recipe(engine=V0, sampling=CUT, trainer=LogprobKind.TEMPERED), ["S4"]),
        (Recipe(engine=V0, sampling=HOT, trainer=LogprobKind.RAW), ["S2"]),
        (Recipe(engine=V0, sampling=SamplingParams(presence_penalty=1.0), trainer=LogprobKind.TEMPERED), ["S6"]),
        (
            Recipe(engine=V1, sampling=SamplingParams(), trainer=LogprobKind.PROCESSED, logprobs_mode="raw_logits"),
            ["S1"],
        ),
    ],
    ids=range(8),
)
def test_lint_on_logprob_semantics(recipe, expected):
    assert [a.id for a in lint(recipe)] == expected
    assert all(a.fix and a.message for a in lint(recipe))


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ({"prefix_caching": True, "updates_in_flight": True}, True),
        ({"prefix_caching": None, "updates_in_flight": True}, True),
        ({"prefix_caching": True, "updates_in_flight": True, "cache_cleared": True}, False),
        ({"prefix_caching": True, "updates_in_flight": True, "cache_salted": True}, False),
        ({"prefix_caching": False, "updates_in_flight": True}, False),
        ({"prefix_caching": True, "updates_in_flight": False}, False),
    ],
    ids=range(6),
)
def test_lint_on_stale_caches(flags, warns):
    recipe = Recipe(engine=V1, sampling=SamplingParams(), trainer=LogprobKind.PROCESSED, **flags)
    assert ("W12" in [a.id for a in lint(recipe)]) == warns
