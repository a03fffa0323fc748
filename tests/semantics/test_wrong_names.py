"""Faults that once got the name of another one: each with the name that is right, or with none."""

import json
import math
import shutil

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
    (name,) = applied
    assert report.causes[0].title == f"the engine's {name} is not what was declared"
    assert "log the fields that were sent" in report.causes[0].fix


def test_an_engine_that_goes_by_its_own_settings_is_said_to(models, dtype, tmp_path):
    """T=1 and top-p 0.9 in the place of T=0.7: neither raw logprobs nor forbidden ids."""
    sampling = EVERY | {"temperature": 0.7}
    records = records_of(models[dtype], dtype=dtype, step=filtered(top_p=0.9), sampling=sampling)
    report = checked(records, models[dtype], tmp_path)
    assert named(report) == [("S5", "high", "engine")] and report.settings[0].draws["verdict"] == "agree"
    assert "temperature=1, top_p=0.9, where the requests say temperature=0.7, top_p=1" in report.causes[0].evidence


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


def test_one_replica_among_good_ones_has_its_own_cause(models, tmp_path):
    """What is wrong with it is found in its rows, applied to them alone, and too few tokens accuse nobody."""
    model = models[torch.float32]
    records = records_of(model)

    def shifted(row, record):
        record["replica"] = "a" if row < 12 else "b" if row < 19 else "c"
        if record["replica"] == "b":
            values = record["completion_logprobs"]
            record["completion_logprobs"] = values[1:] + values[:1]
        if record["replica"] == "c":
            for name in ("completion_token_ids", "completion_logprobs"):
                record[name] = record[name][:10]

    report = checked(edited(records, shifted), model, tmp_path)
    assert [c.id for c in report.causes] == ["W9", "T1"] and "b off, a within" in report.causes[0].evidence
    assert report.settings[0].unexplained is None and report.settings[0].fixed["rms"] < 1e-3

    def rounded(row, record):
        record["replica"] = f"r{row % 4}"
        if row % 4 == 1:
            record["completion_logprobs"] = torch.tensor(record["completion_logprobs"]).bfloat16().tolist()

    report = checked(edited(records, rounded), model, tmp_path)
    assert [c.id for c in report.causes] == ["W9", "S10"] and "r1 off" in report.causes[0].evidence


def test_replicas_that_are_all_alike_are_not_divided(models, tmp_path):
    """0.14 nats of noise in each of eight: chance puts some of them just within the limits."""
    model, noise = models[torch.bfloat16], np.random.default_rng(1)
    records = records_of(model, rows=16, length=24, dtype=torch.bfloat16)

    def noisy(row, record):
        record["replica"] = f"r{row % 8}"
        values = np.array(record["completion_logprobs"])
        record["completion_logprobs"] = (values + 0.14 * noise.standard_normal(len(values))).tolist()

    report = checked(edited(records, noisy), model, tmp_path)
    assert report.verdict == "mismatch" and "W9" not in [c.id for c in report.causes]


@pytest.mark.parametrize("value", [0.0, -100.0])
def test_numbers_lost_at_the_last_tokens_are_not_appended_ends(models, tmp_path, value):
    model = models[torch.float32]
    records = edited(records_of(model), lambda _, r: r["completion_logprobs"].__setitem__(-1, value))
    report = checked(records, model, tmp_path)
    assert named(report) == [("S9", "high", "log")] and "T7" not in report.ruled_out


def test_another_digest_names_other_weights_only_where_these_rows_are_off(models, tmp_path):
    model, other = models[torch.float32], make_tiny_checkpoint(tmp_path / "other", seed=5)

    def wild(row, record):
        record["model_digest"] = "f" * 64
        if row in (2, 7, 11):
            record["completion_logprobs"][10 + row] -= 1.3

    report = checked(edited(records_of(model), wild), model, tmp_path)
    assert report.verdict == "mismatch" and not report.causes
    foreign = edited(records_of(other, rows=8), lambda _, r: r.update(model_digest="e" * 64))
    right = records_of(model, rows=12)
    for records in (foreign + right, right + foreign):
        report = checked(records, model, tmp_path)
        assert [c.id for c in report.causes] == ["W16"] and "eeeeeeeeeeee" in report.causes[0].evidence


def test_what_one_engine_showed_excludes_nothing_for_another(models, tmp_path):
    model, noise = models[torch.float32], np.random.default_rng(0)

    def padded(logits_V, done, generator, row):
        logprobs_V = log_softmax(np.concatenate([logits_V, np.zeros(64)]))[: len(logits_V)]
        token = drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    def noisy(_, record):
        values = np.array(record["completion_logprobs"])
        record["completion_logprobs"] = (values + 0.2 * noise.standard_normal(len(values))).tolist()

    first = edited(records_of(model), noisy)
    second = edited(records_of(model, step=padded), lambda _, r: r["engine"].update(name="other"))
    for records in (first + second, second + first):
        report = checked(records, model, tmp_path)
        assert [c.id for c in report.causes] == ["T10"] and report.causes[0].confidence == "high"


@pytest.mark.parametrize("field", ["min_tokens", "min_new_tokens", "suppress_tokens", "regex", "no_repeat_ngram_size"])
def test_a_field_that_changes_the_distribution_is_said_to_be_unknown(models, tmp_path, field):
    """Fields of Hugging Face, SGLang and vLLM: an engine that did what it was told is not to blame."""
    model = models[torch.float32]

    def without_some(logits_V, done, generator, row):
        logits_V = logits_V.copy()
        logits_V[80:120] = -np.inf
        logprobs_V = log_softmax(logits_V)
        token = drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    records = records_of(model, step=without_some)
    report = checked(edited(records, lambda _, r: r["sampling"].update({field: 30})), model, tmp_path)
    assert report.exit_code == 2 and f"{field} changes the distribution" in report.settings[0].why
    report = checked(edited(records_of(model), lambda _, r: r["sampling"].update(num_beams=1)), model, tmp_path)
    assert report.verdict == "agree"


def test_without_do_sample_draws_are_greedy(models, tmp_path):
    def greedy(logits_V, done, generator, row):
        token = int(logits_V.argmax())
        return token, log_softmax(logits_V)[token]

    records = records_of(models[torch.float32], step=greedy, sampling={"temperature": 1.0, "do_sample": False})
    assert checked(records, models[torch.float32], tmp_path).verdict == "agree"


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"temperature": 0.05}, {"temperature": 0.1}])
def test_clean_draws_in_16_bits_where_rounding_decides_are_no_fault(models, tmp_path, sampling):
    """Equals at the cut of top-k, and flips that all copies of a prompt share."""
    model = models[torch.bfloat16]
    for seed in range(3):
        prompts = torch.randint(3, 320, (8, 6), generator=torch.Generator().manual_seed(seed)).tolist()
        step = filtered(**sampling) if "top_k" in sampling else None
        records = records_of(
            model, prompts=[p for p in prompts for _ in range(8)], length=12, dtype=torch.bfloat16, seed=seed,
            step=step, sampling=EVERY | sampling,
        )  # fmt: skip
        report = checked(records, model, tmp_path)
        assert report.verdict == "agree", (seed, report.settings[0].why, named(report))


def test_one_replica_that_draws_greedily_with_right_numbers_is_named(models, tmp_path):
    def step(logits_V, done, generator, row):
        logprobs_V = log_softmax(logits_V)
        token = int(logprobs_V.argmax()) if row in (3, 13) else drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    model = models[torch.float32]
    records = records_of(model, rows=40, length=48, step=step)
    report = checked(edited(records, lambda i, r: r.update(replica="odd" if i in (3, 13) else "even")), model, tmp_path)
    (cause,) = report.causes
    assert cause.id == "S3" and "replica odd: 96 of 96 tokens" in cause.evidence
    assert not {"S3", "S13"} & {*report.ruled_out, *report.not_seen}


def test_one_replica_with_padded_rows_is_found_under_the_floor_of_all(models, tmp_path):
    """8 nats off in each of its completions, 0.2 in the others': the rms of all is a third of the floor."""

    def padded(logits_V, done, generator, row):
        shifted_V = np.concatenate([logits_V, np.zeros(192)]) if row % 4 == 1 else logits_V
        logprobs_V = log_softmax(shifted_V)[: len(logits_V)]
        token = drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    model = models[torch.bfloat16]
    records = records_of(model, rows=24, length=200, dtype=torch.bfloat16, step=padded)
    report = checked(edited(records, lambda i, r: r.update(replica=f"r{i % 4}")), model, tmp_path)
    assert [c.id for c in report.causes] == ["W9", "T10"] and "r1 off, r0, r2, r3 within" in report.causes[0].evidence
    assert "replica r1: bias" in report.settings[0].why


def test_first_tokens_that_are_reported_otherwise_are_no_agreement(models, tmp_path):
    """The path that computes prompts forgets the temperature: 32 tokens of 5,120, under the floor of a bf16 engine."""

    def forgetful(logits_V, done, generator, row):
        logprobs_V = log_softmax(logits_V / 0.7)
        token = drawn(logprobs_V, generator)
        return token, (logprobs_V if done else log_softmax(logits_V))[token]

    model = models[torch.bfloat16]
    sampling = EVERY | {"temperature": 0.7}
    records = records_of(model, rows=32, length=160, dtype=torch.bfloat16, step=forgetful, sampling=sampling)
    report = checked(records, model, tmp_path)
    assert report.exit_code == 1 and "the 32 first tokens are off by rms" in report.settings[0].why
    assert "S1" not in report.ruled_out
    clean = records_of(model, rows=32, length=160, dtype=torch.bfloat16, sampling=sampling)
    judgement = checked(clean, model, tmp_path).settings[0].judgement
    assert judgement["first_rms"] < judgement["first_rms_limit"]


def test_greedy_tokens_whose_logprobs_are_all_0_are_told_from_lost_numbers(models, dtype, tmp_path):
    def step(logits_V, done, generator, row):
        return int(logits_V.argmax()), 0.0

    sampling = EVERY | {"temperature": 0.0}
    records = records_of(models[dtype], rows=24, length=24, dtype=dtype, step=step, sampling=sampling)
    report = checked(records, models[dtype], tmp_path)
    assert named(report) == [("S3", "high", "engine")] and "after the argmax" in report.causes[0].title
    assert report.settings[0].draws["verdict"] == "agree"


def test_an_end_token_that_the_sampler_never_draws_is_missed_beside_right_numbers(models, dtype, tmp_path):
    """Sampled with the end suppressed (min_tokens, a banned id), reported raw: every number is right."""
    end, model = 83, tmp_path / "model"
    shutil.copytree(models[dtype], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))

    def endless(logits_V, done, generator, row):
        token = drawn(log_softmax(np.where(np.arange(len(logits_V)) == end, -np.inf, logits_V)), generator)
        return token, log_softmax(logits_V)[token]

    records = records_of(model, rows=64, length=40, dtype=dtype, step=endless)
    report = checked(edited(records, lambda i, r: r.update(finish_reason="length")), model, tmp_path)
    assert named(report) == [("S13", "high", "engine")] and "0 of 2560 tokens end" in report.causes[0].evidence
    assert not {"S6", "S7", "S13"} & {*report.ruled_out, *report.not_seen}


def test_an_appended_end_says_nothing_of_how_the_others_were_drawn(models, dtype, tmp_path):
    """Its surprise of ten nats and more in each completion would be draws at another temperature."""
    rarest = 5

    def ended(row, record):
        record["completion_token_ids"][-1], record["completion_logprobs"][-1] = rarest, 0.0

    model = models[dtype]
    report = checked(edited(records_of(model, rows=40, length=16, dtype=dtype), ended), model, tmp_path)
    assert named(report) == [("T7", "high", "log")]
    assert report.settings[0].draws["verdict"] == "agree" and report.settings[0].draws["tokens"] == 40 * 15


@pytest.mark.parametrize(("slope", "length"), [(0.02, 40), (0.05, 20), (0.05, 40)])
def test_a_temperature_that_grows_with_the_position_gets_no_name(models, dtype, tmp_path, slope, length):
    """A constant temperature is too high for the first tokens of each completion and too low for the last ones."""

    def heated(logits_V, done, generator, row):
        logprobs_V = log_softmax(logits_V / (1 + slope * len(done)))
        token = drawn(logprobs_V, generator)
        return token, logprobs_V[token]

    records = records_of(models[dtype], rows=16, dtype=dtype, length=length, step=heated, sampling=EVERY)
    report = checked(records, models[dtype], tmp_path)
    assert report.exit_code == 1 and not report.causes and report.settings[0].unexplained is not None
