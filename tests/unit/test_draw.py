"""policy/draw.py: noise, inverse transform sampling, and scores that equal the trainer's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trueup.errors import NumericsError
from trueup.policy import draw as draw_module
from trueup.policy.draw import draw, sample_seed, uniform
from trueup.policy.head import STREAM_BLOCK, Head
from trueup.policy.logprobs import token_scores, token_scores_under
from trueup.policy.processing import Distribution, History, SeenTokens

DISTS = [
    Distribution(),
    Distribution(temperature=0.7, top_p=0.9),
    Distribution(top_k=20),
    Distribution(temperature=1.3, min_p=0.05),
    Distribution(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
]


def states(count=40, width=64, vocab=4096, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randn(vocab, width, generator=generator) * 0.3


def test_noise_is_uniform_and_a_pure_function_of_seed_and_position():
    values = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3 and len(set(values)) == 3600
    assert all(0 <= v < 1 for v in values)
    assert uniform(5, 3) == uniform(5, 3) != uniform(3, 5)
    assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 0.06
    # A value that must never change: recorded rollouts are redrawn with it.
    assert uniform(12345, 6) == pytest.approx(0.8614693659228845, abs=1e-15)
    assert sample_seed(9, 0) == 9 and len({sample_seed(9, n) for n in range(100)}) == 100
    assert all(0 <= sample_seed(-5, n) < 2**63 for n in range(1, 5))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dist", DISTS, ids=str)
def test_scores_equal_the_one_code_path_bit_for_bit(dist, tiled):
    hidden, weight = states()
    head = Head(weight_VD=weight, tiled=tiled)
    noise = torch.tensor([uniform(1, t) for t in range(40)], dtype=torch.float64)
    history = History(row_T=torch.zeros(40, dtype=torch.long), prompts=(torch.arange(50),))
    seen = SeenTokens.of(history, torch.arange(40)) if dist.penalises else None
    drawn = draw(hidden, head, dist, noise, seen=seen)
    raw = token_scores(hidden, head, drawn.token_ids_T)
    assert torch.equal(drawn.raw.logprobs_T, raw.logprobs_T)
    if not dist.penalises:
        own = token_scores_under(hidden, head, drawn.token_ids_T, dists=[dist])[0]
        assert torch.equal(drawn.processed.logprobs_T, own.logprobs_T)
        assert torch.equal(drawn.processed.log_kept_mass_T, own.log_kept_mass_T)
    assert bool(torch.isfinite(drawn.processed.logprobs_T).all())  # never outside the kept set


@pytest.mark.parametrize("dist", DISTS[:4], ids=str)
def test_a_tiled_row_does_not_depend_on_its_neighbours(dist):
    hidden, weight = states()
    head = Head(weight_VD=weight, tiled=True)
    noise = torch.tensor([uniform(2, t) for t in range(40)], dtype=torch.float64)
    together = draw(hidden, head, dist, noise)
    for rows in ([0], [39], [3, 17], list(range(0, 40, 3))):
        alone = draw(hidden[rows], head, dist, noise[rows])
        assert torch.equal(alone.token_ids_T, together.token_ids_T[rows])
        assert torch.equal(alone.processed.logprobs_T, together.processed.logprobs_T[rows])
        scored = token_scores(hidden[rows], head, alone.token_ids_T, dist=dist)
        assert torch.equal(scored.logprobs_T, together.processed.logprobs_T[rows])


@pytest.mark.slow
@given(noise=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 20))
@settings(max_examples=60)
def test_the_token_is_where_the_cumulative_distribution_passes_the_noise(noise, seed):
    vocab = STREAM_BLOCK + 50  # two blocks
    hidden, weight = states(count=1, vocab=vocab, seed=seed)
    dist = Distribution(temperature=0.8, top_p=0.95)
    token = int(draw(hidden, Head(weight_VD=weight), dist, torch.tensor([noise], dtype=torch.float64)).token_ids_T[0])
    ids = torch.arange(vocab)
    scored = token_scores(hidden.expand(vocab, -1), Head(weight_VD=weight), ids, dist=dist).logprobs_T
    cumulative = scored.double().exp().cumsum(0)
    assert math.isfinite(float(scored[token]))
    before = float(cumulative[token - 1]) if token else 0.0
    assert before - 1e-5 <= noise <= float(cumulative[token]) + 1e-5


@pytest.mark.parametrize("dist", [*DISTS[:4], Distribution(temperature=2.5)], ids=str)
@pytest.mark.parametrize("block", [7, 16, 64])
def test_a_vocabulary_of_several_blocks_is_walked_through_like_one(dist, block, monkeypatch):
    """The last block is not full; the numbers are those of a cumulative sum in float64."""
    monkeypatch.setattr(draw_module, "STREAM_BLOCK", block)
    hidden, weight = states(count=1, vocab=50)
    noise = torch.cat([torch.linspace(0, 1, 401, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53]).double()])
    drawn = draw(hidden.expand(len(noise), -1), Head(weight_VD=weight), dist, noise).token_ids_T
    ids, one = torch.arange(50), Head(weight_VD=weight.double(), matmul_dtype=torch.float64)
    logprobs = token_scores(hidden.double().expand(50, -1), one, ids, dist=dist).logprobs_T
    cumulative = logprobs.exp().cumsum(0)
    expected = torch.searchsorted(cumulative, noise * cumulative[-1], right=True).clamp_max(
        int(ids[logprobs > -1e9][-1])
    )
    clear = (cumulative[None] / cumulative[-1] - noise[:, None]).abs().amin(1) > 1e-6  # float32 sums decide the others
    assert int(clear.sum()) > 390 and torch.equal(drawn[clear], expected[clear])
    kept = torch.isfinite(logprobs)
    assert bool(kept[drawn].all()) and {int(drawn[0]), int(drawn[-1])} == {int(ids[kept][0]), int(ids[kept][-1])}


def test_greedy_and_errors():
    hidden, weight = states()
    head = Head(weight_VD=weight)
    drawn = draw(hidden, head, Distribution(), None)
    assert torch.equal(drawn.token_ids_T, (hidden @ weight.T).argmax(1)) and drawn.processed is None
    with pytest.raises(NumericsError, match="pass seen"):
        draw(hidden, head, DISTS[-1], None)
    noise = torch.full((40,), 0.5, dtype=torch.float64)
    for bad in (hidden * float("nan"), hidden * float("inf")):
        with pytest.raises(NumericsError, match="not finite"):
            draw(bad, head, DISTS[1], noise)
    with pytest.raises(NumericsError, match="not finite"):
        draw(hidden, Head(weight_VD=weight * float("nan")), Distribution(), None)
