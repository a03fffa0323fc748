"""Faults planted in an engine's mechanics are found by name; a clean engine is never called broken."""

import numpy as np
import pytest
import torch
from tests.plain_engine import PlainEngine, make_tiny_checkpoint

from trueup.knobs import CheckConfig
from trueup.parity.run import check_trace

T07 = {"temperature": 0.7, "top_p": 0.9}
PENALISED = {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}


def run(model, path, **knobs):
    return check_trace(CheckConfig(trace=path, model=model, **knobs))


def ids(report):
    return [c.id for c in report.causes]


CLEAN = [
    {"temperature": 1.0},
    T07,
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "min_p": 0.05, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.2},
    PENALISED,
]


@pytest.mark.parametrize("sampling", CLEAN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_clean_engine_agrees(tiny_model, tmp_path, sampling, dtype):
    path = PlainEngine(tiny_model, dtype=dtype).trace(tmp_path / "t.jsonl", sampling)
    report = run(tiny_model, path)
    assert report.verdict == "agree", report.as_dict()
    assert report.exit_code == 0 and not report.causes


FAULTS = [
    ("raw", {}, T07, "processed", ["S1"]),
    ("raw", {}, {"temperature": 1.3}, "processed", ["S1"]),
    ("raw", {}, PENALISED, "processed", ["S1"]),
    ("", {}, {"temperature": 0.7}, "raw", ["S2"]),
    ("", {}, T07, "raw", ["S2", "S4"]),
    ("temperature twice", {}, {"temperature": 0.7}, "processed", ["S3"]),
    ("other temperature", {"used": 1.2}, {"temperature": 0.8}, "processed", ["S3"]),
    ("other temperature", {"used": 1.0}, {"temperature": 1.3}, "processed", ["S3"]),
    ("", {}, {"temperature": 1.0, "top_p": 0.8}, "trl", ["S4"]),
    ("", {}, {"temperature": 1.0, "top_k": 5}, "verl", ["S4"]),
    ("ignores penalties", {}, PENALISED | {"temperature": 0.8}, "processed", ["S6"]),
    ("", {}, {"temperature": 1.0, "repetition_penalty": 1.4}, "trl", ["S6"]),
    ("first entry", {}, {"temperature": 1.0}, "processed", ["S8"]),
    ("placeholder", {"value": 0.0}, {"temperature": 1.0}, "processed", ["S9"]),
    ("placeholder", {"value": -9999.0}, {"temperature": 1.0}, "processed", ["S9"]),
    ("placeholder", {"value": 1.0}, T07, "processed", ["S9"]),
    ("decimals", {"digits": 2}, {"temperature": 1.0}, "processed", ["S10"]),
    ("bf16 transport", {}, {"temperature": 1.0}, "processed", ["S10"]),
    ("shift", {"by": 1}, {"temperature": 1.0}, "processed", ["T1"]),
    ("shift", {"by": -2}, {"temperature": 0.7}, "processed", ["T1"]),
    ("extra entry", {}, {"temperature": 1.0}, "processed", ["T2"]),
    ("nan", {}, {"temperature": 1.0}, "processed", ["I11"]),
]


@pytest.mark.parametrize(("fault", "settings", "sampling", "trainer", "expected"), FAULTS, ids=str)
def test_a_planted_fault_is_named(tiny_model, tmp_path, fault, settings, sampling, trainer, expected):
    path = PlainEngine(tiny_model, fault=fault, **settings).trace(tmp_path / "t.jsonl", sampling)
    report = run(tiny_model, path, trainer=trainer)
    assert report.verdict == "mismatch"
    assert sorted(ids(report)) == expected, [c.as_dict() for c in report.causes]
    assert all(c.confidence == "high" for c in report.causes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_engine_at_its_declared_temperature_has_no_other_one(tiny_model, tmp_path, dtype):
    """A trainer that compares raw logprobs sees another temperature: the declared one, so that it is S2 alone."""
    path = PlainEngine(tiny_model, dtype=dtype).trace(tmp_path / "t.jsonl", {"temperature": 0.81})
    report = run(tiny_model, path, trainer="raw")
    assert [(c.id, c.confidence) for c in report.causes] == [("S2", "high")]
    assert not report.settings[0].ambiguous and "S3" not in report.settings[0].ruled_out


@pytest.mark.parametrize("seed", range(3))
def test_a_random_wrong_temperature_is_measured(tiny_model, tmp_path, seed):
    used = float(np.round(np.random.default_rng(seed).uniform(0.5, 1.8), 2))
    declared = 0.9 if abs(used - 0.9) > 0.1 else 1.2
    engine = PlainEngine(tiny_model, fault="other temperature", used=used)
    report = run(tiny_model, engine.trace(tmp_path / "t.jsonl", {"temperature": declared}, seed=seed))
    assert "S3" in ids(report)
    fitted = float(report.causes[0].evidence.split("T'=")[1].split(",")[0].split(" ")[0])
    assert fitted == pytest.approx(used, abs=0.026)


def test_other_weights_with_a_digest_are_named_w16(tiny_model, tmp_path):
    other = make_tiny_checkpoint(tmp_path / "other", seed=5)
    from trueup.model.load import checkpoint_digest

    engine = PlainEngine(other)
    path = engine.trace(tmp_path / "t.jsonl", {"temperature": 1.0}, model_digest=checkpoint_digest(other))
    report = run(tiny_model, path)
    assert ids(report) == ["W16"]
    assert checkpoint_digest(other)[:12] in report.causes[0].evidence


def test_other_weights_without_a_digest_are_unexplained_not_guessed(tiny_model, tmp_path):
    other = make_tiny_checkpoint(tmp_path / "other", seed=6)
    report = run(tiny_model, PlainEngine(other).trace(tmp_path / "t.jsonl", T07))
    assert report.verdict == "mismatch"
    assert ids(report) == []
    assert report.settings[0].unexplained["layer"] == "unknown"


def test_kept_mass_is_the_mean_ratio_when_the_trainer_ignores_truncation(tiny_model, tmp_path):
    path = PlainEngine(tiny_model).trace(tmp_path / "t.jsonl", {"temperature": 1.0, "top_p": 0.8}, rows=20)
    setting = run(tiny_model, path, trainer="trl").settings[0]
    assert setting.gap["mean_w"] == pytest.approx(setting.kept_mass, rel=1e-4)
    assert setting.gap["mean"] < 0


@pytest.mark.parametrize(
    ("logged", "words"),
    [("tempered", "are tempered .* check with --trainer tempered"), ("processed", "are processed, rms")],
)
def test_a_logged_trainer_is_read_for_what_it_computes(tiny_model, tmp_path, logged, words):
    import json
    import re

    class Logging(PlainEngine):
        def step(self, z, prompt, done, s, rng):
            token, value = super().step(z, prompt, done, s, rng)
            self.tempered = float(self._log_softmax(z / s["temperature"])[token])
            self.log.append(self.tempered if logged == "tempered" else value)
            return token, value

    engine = Logging(tiny_model)
    engine.log = []
    path = engine.trace(tmp_path / "t.jsonl", T07, rows=6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["trainer_logprobs"] = engine.log[index::6]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    assert re.search(words, "; ".join(run(tiny_model, path).notes))


def edited(path, change):
    """Rewrite a trace row by row."""
    import json

    rows = [change(index, json.loads(line)) for index, line in enumerate(path.read_text().splitlines())]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


@pytest.mark.parametrize("seed", range(3))
def test_two_causes_that_fit_alike_are_ambiguous_and_the_true_one_is_first(tiny_model, tmp_path, seed):
    """With a wide top-k, raw logprobs and temperature 1 with top-k nearly coincide in bf16."""
    sampling = {"temperature": 0.8, "top_k": 200}
    engine = PlainEngine(tiny_model, fault="raw", dtype=torch.bfloat16)
    rng = np.random.default_rng(seed)

    def noisy(index, row):
        values = np.array(row["completion_logprobs"])
        row["completion_logprobs"] = (values + rng.normal(0, 0.05, len(values)) * (1 - np.exp(values))).tolist()
        return row

    report = run(tiny_model, edited(engine.trace(tmp_path / "t.jsonl", sampling, rows=20, seed=seed), noisy))
    setting = report.settings[0]
    assert ids(report)[0] == "S1"
    assert "S1" not in setting.untested and "S1" not in setting.ruled_out
    if report.causes[0].confidence != "high":
        assert ("S1", "S3") in setting.ambiguous


def test_marks_in_the_held_back_half_only_are_seen(tiny_model, tmp_path):
    def fill(index, row):
        if index % 2:
            row["completion_logprobs"][3] = row["completion_logprobs"][9] = -9999.0
        return row

    path = edited(PlainEngine(tiny_model).trace(tmp_path / "t.jsonl", {"temperature": 1.0}), fill)
    report = run(tiny_model, path)
    assert ids(report) == ["S9"]


def test_a_coarse_grid_in_a_sharp_trace_is_never_ruled_out(tiny_model, tmp_path):
    engine = PlainEngine(tiny_model, fault="decimals", digits=1)
    report = run(tiny_model, engine.trace(tmp_path / "t.jsonl", {"temperature": 0.2}, rows=8, length=16))
    assert "S10" in ids(report) or "S10" in report.untested
    assert "S10" not in report.ruled_out


def test_one_completion_is_judged_but_never_with_high_confidence(tiny_model, tmp_path):
    engine = PlainEngine(tiny_model, fault="raw")
    report = run(tiny_model, engine.trace(tmp_path / "t.jsonl", {"temperature": 0.6}, rows=1, length=100))
    assert ids(report) == ["S1"] and report.causes[0].confidence == "medium"


@pytest.mark.parametrize("flags", [{"--dtype": "float32"}, {"dtype": "torch.float32"}, {"dtype": "fp32"}], ids=str)
def test_the_engine_dtype_is_read_however_it_is_spelled(tmp_path, flags):
    model = make_tiny_checkpoint(tmp_path / "bf16", dtype=torch.bfloat16)
    engine = PlainEngine(model, fault="decimals", digits=2)
    path = edited(
        engine.trace(tmp_path / "t.jsonl", {"temperature": 1.0}),
        lambda i, r: r | {"engine": {"name": "x", "flags": flags}},
    )
    assert ids(run(model, path)) == ["S10"]


def test_inert_request_fields_change_no_verdict(tiny_model, tmp_path):
    other = make_tiny_checkpoint(tmp_path / "other", seed=6)
    path = PlainEngine(other).trace(tmp_path / "t.jsonl", {"temperature": 1.0, "stream": True, "user": "me"})
    assert run(tiny_model, path).verdict == "mismatch"


def test_rows_the_model_cannot_score_lose_only_themselves(tiny_model, tmp_path):
    def spoil(index, row):
        if index == 2:
            row["completion_token_ids"][0] = 10_000
        if index == 4:
            row["prompt_token_ids"] = [1] * 600
        if index == 5:
            row["sampling"] = {"temperature": 10**400}
        return row

    report = run(tiny_model, edited(PlainEngine(tiny_model).trace(tmp_path / "t.jsonl", {"temperature": 1.0}), spoil))
    assert report.verdict == "agree" and len(report.problems) == 3


def test_two_engines_of_different_precision_agree_in_either_order(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "m", dtype=torch.bfloat16)
    paths = []
    for dtype in (torch.bfloat16, torch.float32):
        engine = PlainEngine(model, dtype=dtype)
        paths.append(engine.trace(tmp_path / f"{dtype}.jsonl", {"temperature": 0.2}, rows=20))
    for first, second in (paths, paths[::-1]):
        report = run(model, first, against=str(second))
        assert report.against["verdict"] == "agree", report.against["text"]


def test_engines_of_one_trace_are_reported_apart(tiny_model, tmp_path):
    rows = []
    for version, fault in (("1", ""), ("2", "raw")):
        engine = PlainEngine(tiny_model, fault=fault)
        path = engine.trace(
            tmp_path / f"{version}.jsonl", {"temperature": 0.7}, engine={"name": "x", "version": version}
        )
        rows += path.read_text().splitlines()
    path = tmp_path / "both.jsonl"
    path.write_text("\n".join(rows))
    verdicts = {s.label: s.verdict for s in run(tiny_model, path, dtype="float32").settings}
    assert verdicts == {"temperature=0.7 [x 1 #1]": "agree", "temperature=0.7 [x 2 #2]": "mismatch"}


def test_too_few_tokens_is_inconclusive_not_green(tiny_model, tmp_path):
    path = PlainEngine(tiny_model).trace(tmp_path / "t.jsonl", {"temperature": 1.0}, rows=2, length=8)
    report = run(tiny_model, path)
    assert report.exit_code == 2 and "too few" in report.settings[0].why


def test_a_field_that_is_not_modelled_is_said_not_ignored(tiny_model, tmp_path):
    engine = PlainEngine(tiny_model)
    path = engine.trace(tmp_path / "t.jsonl", {"temperature": 1.0, "logit_bias": {"3": 2.0}})
    report = run(tiny_model, path)
    assert "logit_bias" in report.settings[0].untested["S6"]


def test_greedy_rows_are_compared_before_the_argmax(tiny_model, tmp_path):
    class Greedy(PlainEngine):
        def step(self, z, prompt, done, s, rng):
            logp = self._log_softmax(z)
            return int(logp.argmax()), float(logp.max())

    report = run(tiny_model, Greedy(tiny_model).trace(tmp_path / "t.jsonl", {"temperature": 0}))
    assert report.verdict == "agree"
    assert any("greedy" in n for n in report.notes)
