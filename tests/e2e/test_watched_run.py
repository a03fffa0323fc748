"""A run that watches its backend: faults planted in the live engine are named, a clean engine is not, and what a ratio
is made of is told apart."""

import json
import os
import signal

import pytest
from tests.e2e.test_train_online import config, lines

from trueup.errors import MismatchError
from trueup.model.tiny import make_tiny
from trueup.pipeline import watch as watch_module
from trueup.pipeline.run import train

SYSTEM = "Answer with the last letter of the word you are given, four times over, and nothing else at all."
"""Long enough that every prompt begins with a prefix that the engine caches."""
EVERY = 4
STEPS = 400
"""More than a run can take while an audit looks for a cause."""


def watched(folder, **sections):
    values = {
        "train": {"steps": 40, "groups": 8},
        "task": {"name": "repeat", "held_out": 16, "system": SYSTEM},
        "sampling": {"temperature": 0.8},
        "rollout": {"max_tokens": 8, "eval_every": 40},
        "audit": {"every": EVERY, "tokens": 200},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return config(folder, **values)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param("raw_logprobs", "S1", marks=pytest.mark.slow),
        ("ignored_sync", "W1"),
        ("colder_draws factor=3", "S3"),
        pytest.param("stale_prefixes", "W12", marks=pytest.mark.slow),
    ],
)
def test_a_fault_planted_in_a_live_run_is_named_and_stops_it(tmp_path, fault, cause):
    make_tiny(tmp_path / "tiny")
    planted = 10
    with pytest.raises(MismatchError, match=cause):
        train(watched(tmp_path, train={"steps": STEPS}, engine={"faults": [fault], "faults_from": planted}))
    (alarm,) = lines(tmp_path / "run" / "alarms.jsonl")
    assert alarm["id"] == cause and alarm["fix"]
    audits = lines(tmp_path / "run" / "audits.jsonl")
    assert all(a["verdict"] == "agree" for a in audits if a["batch"] <= planted)
    if alarm["by"] == "audit":
        # Named by the first audit of rollouts that the broken engine made, and dated to the batch they came in with.
        assert audits[-1]["batch"] <= planted + 2 * EVERY
        assert planted < alarm["first_batch"] <= audits[-1]["batch"]
    assert len(lines(tmp_path / "run" / "batches.jsonl")) < STEPS


@pytest.mark.slow
def test_a_cause_that_was_accepted_is_written_down_and_the_run_goes_on(tmp_path):
    make_tiny(tmp_path / "tiny")
    settings = watched(tmp_path, train={"steps": 12}, engine={"faults": ["raw_logprobs"]})
    with pytest.raises(MismatchError, match="S1"):
        train(settings)
    summary = train(settings, resume=True, accepted=["S1"])
    assert summary["preflight_verdict"] == "mismatch" and summary["steps"] == 12
    assert [a.split()[0] for a in summary["alarms"]] == ["S1"]
    assert json.loads((tmp_path / "run" / "parity" / "accepted.json").read_text()) == ["S1"]


@pytest.mark.slow
@pytest.mark.parametrize("clear_cache", [True, False])
def test_backend_stays_at_its_floor_while_staleness_grows_with_lag(tmp_path, clear_cache):
    """Lags are compared inside an audit: how far the policy moves in a batch changes from batch to batch."""
    make_tiny(tmp_path / "tiny")
    rollout = {"max_lag": 4, "max_tokens": 32, "clear_cache": clear_cache, "concurrency": 12}
    audit = {"every": 1, "tokens": 1000}
    settings = watched(tmp_path, train={"steps": 14}, rollout=rollout, audit=audit, optimizer={"lr": 2e-4})
    summary = train(settings)
    audits = lines(tmp_path / "run" / "audits.jsonl")
    assert len(audits) == 14 and all(a["verdict"] == "agree" for a in audits) and not summary["alarms"]
    nearest, furthest = [], []
    for audit in audits:
        assert audit["components"]["backend"]["rms"] <= audit["floor"]["rms"]
        assert clear_cache is False or audit["components"]["stale_kv"]["max_abs"] < 1e-4
        parts = [part for part in audit["components"]["by_lag"] if part["tokens"] >= 30]
        assert all(part["backend"]["rms"] <= audit["floor"]["rms"] for part in parts)
        if len(parts) > 1:
            nearest.append(parts[0]["staleness"]["rms"])
            furthest.append(parts[-1]["staleness"]["rms"])
    if not clear_cache:
        assert any(a["replayed"] for a in audits) and any(
            a["components"]["stale_kv"]["rms"] > a["floor"]["rms"] for a in audits
        )
    assert nearest and sum(furthest) > 1.2 * sum(nearest)


@pytest.mark.slow
def test_bitwise_and_on_policy_every_ratio_is_exactly_one(tmp_path):
    make_tiny(tmp_path / "tiny")
    train(watched(tmp_path, train={"steps": 6, "bitwise": True}, rollout={"max_lag": 0}, audit={"every": 3}))
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 6
    for record in metrics:
        assert record["lag/oldest_token/max"] == 0
        assert record["gap/log_ratio/max_abs"] == 0.0 and record["policy/ratio/max"] == 1.0
        assert record["gap/ratio/mean"] == 1.0 and record["gap/ess/token"] == 1.0
    for audit in lines(tmp_path / "run" / "audits.jsonl"):
        assert audit["components"]["backend"]["max_abs"] == 0.0


def test_the_summary_and_the_picture_come_from_the_folder(tmp_path):
    from trueup.pipeline.summary import summarise

    make_tiny(tmp_path / "tiny")
    summary = train(watched(tmp_path, train={"steps": 8}))
    run = tmp_path / "run"
    assert (run / "curves.png").stat().st_size > 10_000
    again = summarise(run)
    assert all(summary[name] == value for name, value in again.items())
    assert json.loads((run / "summary.json").read_text())["audits"] == 2


@pytest.mark.slow
def test_an_auditor_that_is_killed_is_started_again_and_asked_again(tmp_path, monkeypatch):
    """Once while it is still starting, once with an audit under way."""
    make_tiny(tmp_path / "tiny")
    pids, said = [], []

    class Remembered(watch_module.AuditProcess):
        def __init__(self, run):
            super().__init__(run)
            pids.append(self.pid)
            if len(pids) == 1:
                os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(watch_module, "AuditProcess", Remembered)

    def on_batch(metrics):
        if len(pids) == 2 and len(lines(tmp_path / "run" / "batches.jsonl")) == 5:
            os.kill(pids[-1], signal.SIGKILL)

    summary = train(watched(tmp_path, train={"steps": 12}), on_batch=on_batch, announce=said.append)
    assert len(pids) == 3 and sum("auditor process ended" in line for line in said) == 2
    assert [a["batch"] for a in lines(tmp_path / "run" / "audits.jsonl")] == [4, 8, 12] and not summary["alarms"]
