"""Faults that a second attacker planted and that came out as "agree", under another name, or on the wrong side."""

import numpy as np
import pytest
import torch
from tests.plain_engine import make_tiny_checkpoint
from tests.trace_kit import checked, drawn, edited, log_softmax, records_of, sampled

EVERY = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("attacked") / "model")


def named(report):
    return [(c.id, c.confidence, c.side) for c in report.causes]


def drawn_otherwise(change):
    """A step that draws from changed logits and reports the raw logprob; `change(logits, tokens so far)`."""

    def step(logits_V, done, generator, row):
        token = drawn(log_softmax(change(logits_V.copy(), done)), generator)
        return token, log_softmax(logits_V)[token]

    return step


def without_high_ids(logits_V, done):
    logits_V[256:] = -np.inf
    return logits_V


def without_repeats(logits_V, done):
    logits_V[done] = -np.inf
    return logits_V


def within_95_percent(logits_V, done):
    order_V = np.argsort(-logits_V)
    p_V = np.exp(log_softmax(logits_V))[order_V]
    logits_V[order_V[p_V.cumsum() - p_V >= 0.95]] = -np.inf
    return logits_V


@pytest.mark.parametrize("change", [without_high_ids, without_repeats, within_95_percent])
def test_draws_that_only_a_bet_shows_are_no_agreement(model, tmp_path, change):
    report = checked(records_of(model, rows=40, step=drawn_otherwise(change), sampling=EVERY), model, tmp_path)
    assert named(report) == [("S13", "high", "engine")] and "S13" not in report.ruled_out


@pytest.mark.parametrize("temperature", [1 / 1.2, 0.6667, 1 / 3, 1.234567])
def test_a_temperature_with_many_digits_is_a_temperature_and_not_a_scale_of_logits(model, tmp_path, temperature):
    records = edited(records_of(model, step=sampled(temperature)), lambda _, r: r.update(sampling=EVERY))
    report = checked(records, model, tmp_path)
    assert named(report) == [("S3", "high", "engine")] and f"T'={temperature:g}" in report.causes[0].evidence


def test_greedy_tokens_reported_at_another_temperature_are_s3(model, tmp_path):
    def step(logits_V, done, generator, row):
        token = int(logits_V.argmax())
        return token, log_softmax(logits_V / 0.5)[token]

    report = checked(records_of(model, step=step, sampling={"temperature": 0.0}), model, tmp_path)
    assert named(report) == [("S3", "high", "engine")] and "reported at T'=0.5" in report.causes[0].evidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_not_fillers(model, tmp_path, dtype):
    """In 16 bits they repeat by themselves, and of 2,000 float32 numbers two are sometimes equal."""
    served = model if dtype == torch.float32 else make_tiny_checkpoint(tmp_path / "bf16", dtype=dtype)

    def step(logits_V, done, generator, row):
        token = drawn(log_softmax(logits_V), generator)
        return token, float(torch.tensor(logits_V[token]).to(dtype))

    report = checked(records_of(served, rows=20, length=60, step=step, dtype=dtype), served, tmp_path)
    assert report.exit_code == 1 and "S9" not in [c.id for c in report.causes]


@pytest.mark.parametrize("fill", [0.0, None])
def test_tokens_of_a_tool_logged_without_a_mask_do_not_accuse_the_sampler(model, tmp_path, fill):
    prompts = torch.randint(3, 320, (16, 8), generator=torch.Generator().manual_seed(2)).tolist()
    first = records_of(model, prompts=prompts, length=20, seed=1)
    generator = torch.Generator().manual_seed(4)
    tools = [torch.randint(3, 320, (10,), generator=generator).tolist() for _ in first]
    contexts = [r["prompt_token_ids"] + r["completion_token_ids"] + t for r, t in zip(first, tools, strict=True)]
    second = records_of(model, prompts=contexts, length=20, seed=2)
    whole = [
        dict(
            one, completion_token_ids=one["completion_token_ids"] + tool + two["completion_token_ids"],
            completion_logprobs=one["completion_logprobs"] + [fill] * 10 + two["completion_logprobs"],
        )
        for one, tool, two in zip(first, tools, second, strict=True)
    ]  # fmt: skip
    report = checked(whole, model, tmp_path)
    assert named(report) == [("S9" if fill == 0.0 else "I11", "high", "log")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: np.full_like(v, v.mean()), "the mean of"), (lambda v: np.full_like(v, v.sum()), "the sum of"),
        (lambda v: v - v.mean(), "the distance from the mean"), (lambda v: v / len(v), "the share in the mean"),
    ],
)  # fmt: skip
def test_numbers_of_whole_completions_are_named_as_such(model, tmp_path, change, words):
    def of_all(_, record):
        record["completion_logprobs"] = change(np.array(record["completion_logprobs"])).tolist()

    report = checked(edited(records_of(model), of_all), model, tmp_path)
    assert named(report) == [("S14", "high", "log")] and words in report.causes[0].evidence


def test_a_declared_bias_that_acts_on_the_draws_alone_is_no_agreement(model, tmp_path):
    def biased(logits_V, done):
        logits_V[5] += 6
        return logits_V

    sampling = EVERY | {"logit_bias": {"5": 6}}
    report = checked(records_of(model, rows=40, step=drawn_otherwise(biased), sampling=sampling), model, tmp_path)
    assert named(report) == [("S6", "high", "engine")] and "logit_bias changes what is drawn" in report.causes[0].title


def test_a_declared_bias_that_does_nothing_is_no_fault(model, tmp_path):
    report = checked(records_of(model, rows=40, sampling=EVERY | {"logit_bias": {"5": 0}}), model, tmp_path)
    assert report.exit_code == 0


def test_a_trainer_s_column_of_zeros_is_the_trainer_s_fault(model, tmp_path):
    records = edited(records_of(model), lambda _, r: r.update(trainer_logprobs=[0.0] * 40))
    report = checked(records, model, tmp_path)
    assert named(report) == [("S9", "high", "trainer")] and "trainer_logprobs" in report.causes[0].fix
