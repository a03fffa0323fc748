"""What the embedded engine reports, against transformers' own forward pass and against the distribution itself."""

import numpy as np
import pytest
import torch
from scipy import stats
from tests.engine_kit import KINDS, prompt, request, row_of

from trueup.engines.base import GenerationRequest
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.model.tiny import make_tiny
from trueup.types import LogprobKind, SamplingParams

FLOAT32 = EngineOptions(dtype=torch.float32, slots=32)


@pytest.fixture(scope="module")
def engine(smollm2):
    running = EmbeddedEngine(smollm2, FLOAT32)
    yield running
    running.close()


@pytest.fixture(scope="module")
def transformers_model(smollm2):
    """Untouched by trueup: transformers' own attention, head and generation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def processed(logits, seen_prompt, done, sampling):
    """The distribution a token is drawn from, written out plainly in float64."""
    z = logits.double().numpy().copy()
    for v in set(seen_prompt) | set(done):
        z[v] = z[v] / sampling.repetition_penalty if z[v] > 0 else z[v] * sampling.repetition_penalty
    for v in set(done):
        z[v] -= sampling.frequency_penalty * done.count(v) + sampling.presence_penalty
    if sampling.temperature == 0:
        return z
    z /= sampling.temperature
    if sampling.min_p:
        z[z < z.max() + np.log(sampling.min_p)] = -np.inf
    if sampling.top_k:
        z[z < np.sort(z)[-sampling.top_k]] = -np.inf
    if sampling.top_p < 1:
        order = np.argsort(-z, kind="stable")
        p = np.exp(z[order] - z.max())
        p /= p.sum()
        z[order[np.cumsum(p) - p >= sampling.top_p]] = -np.inf
    return z


def log_softmax(z):
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


QUICK = ("plain", "nucleus", "penalties")


@pytest.mark.smollm2
@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_float32_logprobs_equal_transformers(engine, transformers_model, kind):
    asked = [request(10 + 15 * i, seed=i, tokens=40, **KINDS[kind]) for i in range(4)]
    gaps = []
    for group in engine.generate(asked):
        for rollout in group:
            ids = rollout.prompt.token_ids + rollout.token_ids
            with torch.no_grad():
                logits = transformers_model(torch.tensor([ids[:-1]])).logits[0]
            first = len(rollout.prompt.token_ids) - 1
            for t, token in enumerate(rollout.token_ids):
                raw = log_softmax(logits[first + t].double().numpy())[token]
                gaps.append(rollout.raw_logprobs[t] - raw)
                if rollout.logprob_kind == LogprobKind.PROCESSED:
                    done = list(rollout.token_ids[:t])
                    z = processed(logits[first + t], rollout.prompt.token_ids, done, rollout.sampling)
                    gaps.append(rollout.behaviour_logprobs[t] - log_softmax(z)[token])
    gaps = np.abs(gaps)
    print(f"{kind}: {len(gaps)} logprobs, mean |r| {gaps.mean():.2e}, max {gaps.max():.2e}")
    assert len(gaps) >= 160 and gaps.mean() <= 2e-5 and gaps.max() <= 1e-3


@pytest.mark.slow
@pytest.mark.smollm2
def test_greedy_equals_transformers_greedy_on_32_prompts(engine, transformers_model):
    asked = [request(6 + 3 * i, seed=i, tokens=24, temperature=0.0) for i in range(32)]
    for group in engine.generate(asked):
        rollout = group[0]
        ids = torch.tensor([rollout.prompt.token_ids])
        expected = transformers_model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, min_new_tokens=24,
            eos_token_id=None, pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        assert list(rollout.token_ids) == expected.tolist()


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "greedy"])
def test_sampled_frequencies_follow_the_processed_distribution(tmp_path, kind):
    """Chi-squared over the first token of 4,000 completions; a sampler at another temperature must fail it."""
    path = make_tiny(tmp_path / "tiny")
    running = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=64))
    sampling = SamplingParams(**{"max_tokens": 1, "seed": 7} | KINDS[kind])
    try:
        asked = [GenerationRequest(prompt=prompt(12), sampling=sampling, n=250, ignore_eos=True)]
        asked = [
            GenerationRequest(prompt=a.prompt, n=a.n, ignore_eos=True, sampling=SamplingParams(
                **{"max_tokens": 1, "seed": 1000 + i} | KINDS[kind])) for a in asked for i in range(16)
        ]  # fmt: skip
        drawn = [r.token_ids[0] for group in running.generate(asked) for r in group]
    finally:
        running.close()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([asked[0].prompt.token_ids])).logits[0, -1]
    p = np.exp(log_softmax(processed(logits, asked[0].prompt.token_ids, [], sampling)))
    assert chi_squared(drawn, p) > 1e-4
    hotter = np.exp(log_softmax(processed(logits / 1.3, asked[0].prompt.token_ids, [], sampling)))
    if (p > 0).sum() > 2 and np.abs(hotter - p).max() > 0.05:
        assert chi_squared(drawn, hotter) < 1e-4


def chi_squared(drawn, p):
    """p-value of the counts, tokens expected fewer than five times taken together; 0 if an impossible one was drawn."""
    counts = np.bincount(drawn, minlength=len(p))
    if counts[p == 0].any():
        return 0.0
    expected = p * len(drawn)
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] < 1e-9:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue)


@pytest.mark.smollm2
def test_scoring_in_chunks_equals_scoring_at_once(smollm2, engine):
    rollout = engine.generate([request(40, tokens=60)])[0][0]
    small = EmbeddedEngine(smollm2, EngineOptions(dtype=torch.float32, slots=2, step_tokens=16))
    try:
        chunked = small.score([row_of(rollout)])[0].logprobs
    finally:
        small.close()
    assert np.abs(np.array(chunked) - np.array(rollout.raw_logprobs)).max() < 1e-4
