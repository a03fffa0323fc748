"""Faults that once got the name of another one: each with the name that is right, or with none."""

import math

import numpy as np
import pytest
import torch
from tests.plain_engine import make_tiny_checkpoint
from tests.trace_kit import checked, drawn, edited, log_softmax, records_of

EVERY = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Every field is sent, as the checker recommends."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    return {d: make_tiny_checkpoint(folder / str(d)[6:], dtype=d) for d in (torch.float32, torch.bfloat16)}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def named(report):
    return [(c.id, c.confidence, c.side) for c in report.causes]


def filtered(*, top_p=1.0, top_k=0):
    """A step that keeps some tokens, draws from them and reports their renormalised logprobs."""

    def step(logits_V, done, generator, row):
        logprobs_V = log_softmax(logits_V)
        order = np.argsort(-logprobs_V)
        before = np.cumsum(np.exp(logprobs_V[order])) - np.exp(logprobs_V[order])
        kept = order[(before < top_p) & ((np.arange(len(order)) < top_k) | (top_k == 0))]
        left_V = np.full_like(logprobs_V, -np.inf)
        left_V[kept] = logprobs_V[kept]
        left_V -= np.log(np.exp(left_V).sum())
        token = drawn(left_V, generator)
        return token, left_V[token]

    return step


@pytest.mark.parametrize(
    ("declared", "applied", "words"),
    [
        ({"top_p": 0.9}, {"top_p": 0.95}, "top_p=0.95, where the requests say top_p=0.9"),
        ({}, {"top_k": 50}, "top_k=50, where the requests say top_k=0"),
        ({"top_k": 20}, {"top_k": 50}, "top_k=50, where the requests say top_k=20"),
    ],
)
def test_a_filter_that_is_not_the_declared_one_is_neither_a_grammar_nor_padding(
    models, dtype, tmp_path, declared, applied, words
):
    records = records_of(models[dtype], dtype=dtype, step=filtered(**applied), sampling=EVERY | declared)
    report = checked(records, models[dtype], tmp_path)
    assert named(report) == [("S5", "high", "engine")] and words in report.causes[0].evidence
    assert (
        "is not the declared one" in report.causes[0].title and "log the fields that were sent" in report.causes[0].fix
    )


def of_small_grammar(logits_V, done, generator, row):
    logits_V = logits_V.copy()
    logits_V[40:] = -1e9
    logprobs_V = log_softmax(logits_V)
    token = drawn(logprobs_V, generator)
    return token, logprobs_V[token]


def test_a_grammar_is_still_one(models, dtype, tmp_path):
    report = checked(records_of(models[dtype], dtype=dtype, step=of_small_grammar), models[dtype], tmp_path)
    assert [c.id for c in report.causes] == ["S7"]


@pytest.mark.parametrize("temperature", [0.7, 0.8, 1.2])
def test_logprobs_divided_by_the_temperature_are_no_other_temperature(models, dtype, tmp_path, temperature):
    """Of the raw distribution, and of the tempered one once more; the draws are as declared."""

    def raw(logits_V, done, generator, row):
        token = drawn(log_softmax(logits_V / temperature), generator)
        return token, log_softmax(logits_V)[token] / temperature

    sampling = EVERY | {"temperature": temperature}
    twice = edited(
        records_of(models[dtype], dtype=dtype, sampling=sampling),
        lambda _, r: r.update(completion_logprobs=[v / temperature for v in r["completion_logprobs"]]),
    )
    for records, kind in (
        (records_of(models[dtype], dtype=dtype, step=raw, sampling=sampling), "raw"),
        (twice, "tempered"),
    ):
        report = checked(records, models[dtype], tmp_path)
        assert named(report) == [("S3", "high", "engine")], kind
        assert report.causes[0].title.startswith("logprobs are divided by the temperature")
        assert f"the {kind} logprob divided by T={temperature:g}" in report.causes[0].evidence
        assert report.settings[0].draws["verdict"] == "agree"


@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logarithms_to_another_base_are_said_to_be_that(models, dtype, tmp_path, base, temperature):
    records = edited(
        records_of(models[dtype], dtype=dtype, sampling=EVERY | {"temperature": temperature}),
        lambda _, r: r.update(completion_logprobs=[v / math.log(base) for v in r["completion_logprobs"]]),
    )
    report = checked(records, models[dtype], tmp_path)
    assert named(report) == [("S14", "high", "log")] and f"logarithms to base {base}" in report.causes[0].title
