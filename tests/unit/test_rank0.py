"""types.py, trace.py, config.py, errors.py, env.py: what is accepted, what is refused and in which words."""

import json
import math
import os
import re

import pytest

from trueup import env
from trueup.config import build_config, dump_config, known_keys, load_config
from trueup.errors import ConfigError, RecordError, TraceError
from trueup.trace import MAX_LINE_BYTES, SCHEMA, read_trace, write_trace
from trueup.types import (
    LogprobKind,
    Prompt,
    Rollout,
    RolloutGroup,
    SamplingParams,
    parse_sampling,
)

PROMPT = Prompt(prompt_id="p", task="t", token_ids=(1, 2))


def rollout(**changes):
    fields = {
        "prompt": PROMPT, "token_ids": (3, 4), "behaviour_logprobs": (-0.5, -0.1),
        "logprob_kind": LogprobKind.PROCESSED, "weight_versions": (7, 8),
        "sampling": SamplingParams(), "finish_reason": "stop", "engine": "e",
    }  # fmt: skip
    return Rollout(**(fields | changes))


def test_a_rollout_knows_its_versions():
    group = RolloutGroup(rollouts=(rollout(), rollout(weight_versions=(9, 9))), rewards=(1.0, 0.0))
    assert group.oldest_version == 7 and group.spans_update


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behaviour_logprobs": (-0.5,)}, "1 entries for 2"),
        ({"behaviour_logprobs": (-0.5, math.nan)}, "finite"),
        ({"behaviour_logprobs": (-0.5, 0.01)}, "at most 0"),
        ({"token_ids": (), "behaviour_logprobs": (), "weight_versions": ()}, "at least one"),
        ({"token_ids": (3, -4)}, "non-negative"),
        ({"weight_versions": (1,)}, "weight_versions has 1"),
        ({"weight_versions": (1, -1)}, "integers >= 0"),
        ({"raw_logprobs": (-1.0, math.inf)}, "raw_logprobs must be finite"),
    ],
)
def test_a_bad_rollout_is_refused_at_birth(change, message):
    with pytest.raises(RecordError, match=message):
        rollout(**change)


def test_slack_above_zero_is_a_ten_thousandth():
    assert rollout(behaviour_logprobs=(-0.5, 9e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"temperature": -1}, "temperature"),
        ({"temperature": math.inf}, "temperature"), ({"top_k": -2}, "top_k"), ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition"), ({"presence_penalty": 3}, "presence"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": True}, "temperature"), ({"seed": 1.5}, "seed"),
        ({"temperature": 10**400}, "temperature"), ({"top_k": 10**400}, "top_k"),
        ({"temperature": 1e-320}, "temperature"),
        ({"temperature": 1e200}, "temperature"),
    ],
)  # fmt: skip
def test_sampling_ranges(change, message):
    with pytest.raises(RecordError, match=message):
        SamplingParams(**change)


def test_sampling_is_read_as_an_engine_reads_it():
    params, unmodelled = parse_sampling(
        {"temperature": 0.7, "top_k": -1, "min_p": None, "n": 4, "logit_bias": {"1": 2}}
    )
    assert params == SamplingParams(temperature=0.7) and unmodelled == ("logit_bias",)
    assert parse_sampling({"logit_bias": {}, "min_tokens": 0, "stream": True, "user": "me"})[1] == ()


GOOD = {
    "engine": {"name": "x"}, "sampling": {"temperature": 1.0}, "prompt_token_ids": [1], "completion_token_ids": [2, 3],
    "completion_logprobs": [-1.0, -2.0],
}  # fmt: skip


def test_a_trace_round_trips(tmp_path):
    path = tmp_path / "t.jsonl"
    write_trace(path, [GOOD | {"completion_logprobs": [-0.1, -1e-7]}])
    row = read_trace(path).rows[0]
    assert row.completion_logprobs == (-0.1, -1e-7) and row.engine.name == "x" and row.line == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": "trueup.trace/1", "engine"', "not valid JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ("[1, 2]", "expected one JSON object per line, got the list"),
        (json.dumps(GOOD | {"sampling": None}), "sampling is missing"),
        (json.dumps(GOOD | {"completion_logprobs": None}), "completion_logprobs is missing"),
        (json.dumps(GOOD | {"completion_token_ids": [1, "2"]}), "not a token id"),
        (json.dumps(GOOD | {"completion_token_ids": [1, -2]}), "not a token id"),
        (json.dumps(GOOD | {"completion_token_ids": [1, 2**40]}), "not a token id"),
        (json.dumps(GOOD | {"prompt_token_ids": [True]}), "not a token id"),
        (json.dumps(GOOD | {"prompt_token_ids": []}), "prompt_token_ids is empty"),
        ("9" * 5000, "not valid JSON|expected one JSON object"),
    ],
    ids=range(11),
)
def test_bad_rows_are_explained_and_the_rest_is_kept(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text(line + "\n" + json.dumps(GOOD | {"schema": SCHEMA}) + "\n")
    trace = read_trace(path)
    assert len(trace.rows) == 1 and trace.rows[0].line == 2
    assert trace.problems[0].dropped and re.search(message, trace.problems[0].message)
    path.write_text(line + "\n")
    with pytest.raises(TraceError, match="no usable row"):
        read_trace(path)


def test_odd_values_are_read_as_evidence_not_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"sampling":{},"prompt_token_ids":[1],"completion_token_ids":[1,2,3],"completion_logprobs":[NaN,null,-1e999]}'
    )
    trace = read_trace(path)
    values = trace.rows[0].completion_logprobs
    assert math.isnan(values[0]) and math.isnan(values[1]) and values[2] == -math.inf
    assert {p.message.split(" ")[0] for p in trace.problems} == {"schema", "engine", "completion_logprobs[1]"}


def test_unreadable_files_fail_in_one_line(tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    for path, message in ((empty, "empty"), (tmp_path, "folder"), (tmp_path / "none", "does not exist")):
        with pytest.raises(TraceError, match=message):
            read_trace(path)
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(TraceError, match="no usable row"):
        read_trace(binary)


def test_an_endless_line_is_not_read_whole(tmp_path):
    path = tmp_path / "long"
    with path.open("wb") as out:
        out.write(json.dumps(GOOD).encode() + b"\n")
        out.truncate(3 * MAX_LINE_BYTES)
    trace = read_trace(path)
    assert len(trace.rows) == 1 and "longer than" in trace.problems[-1].message


def test_config_defaults_sets_and_files(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[check]\ntrainer = "trl"\n[check.limits]\nrms_factor = 2.0\n')
    config = load_config(file, sets=["check.limits.min_tokens=10", "check.dtype=float32"])
    assert (config.check.trainer, config.check.limits.rms_factor, config.check.limits.min_tokens) == ("trl", 2.0, 10)
    assert json.loads(dump_config(config))["check"]["dtype"] == "float32"
    assert "check.limits.rms_factor" in known_keys()
    with pytest.raises(Exception, match="frozen"):
        config.check.trainer = "raw"


@pytest.mark.parametrize(
    ("values", "sets", "message"),
    [
        ({"check": {"trianer": "trl"}}, [], r"unknown key 'check.trianer' \(did you mean 'check.trainer'"),
        ({"chekc": {"trainer": "trl"}}, [], "did you mean 'check.trainer'"),
        ({}, ["check.dytpe=float32"], "did you mean 'check.dtype'"),
        ({"check": {"trainer": "wrong"}}, [], "check.trainer"),
        ({"check": {"limits": {"rms_factor": -1}}}, [], "check.limits.rms_factor: .*greater than 0"),
        ({"sampling": {"top_p": 0}}, [], "sampling.top_p"),
        ({"check": "no section"}, [], "unknown key 'check'"),
        ({}, ["novalue"], "expected name=value"),
    ],
    ids=range(8),
)
def test_config_errors_name_the_key(values, sets, message):
    with pytest.raises(ConfigError, match=message):
        build_config(values, sets=sets)


def test_config_files_that_cannot_be_read(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("[check\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")


def test_env_describes_versions_without_importing_them():
    description = env.describe()
    assert description["packages"]["torch"] and description["cores"] >= 1


def test_threads_spin_for_a_moment_unless_the_user_decided(monkeypatch):
    for name in env.WAITING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    env.limit_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    env.limit_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
