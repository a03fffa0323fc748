"""How updates and batches may be made otherwise: drained updates, the ESS guard, sinks for the numbers."""

import pytest
from tests.e2e.test_train_online import config, lines

from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import read_groups
from trueup.pipeline.run import train


@pytest.mark.slow
@pytest.mark.parametrize("update", ["in_flight", "drain"])
def test_a_drained_update_waits_for_requests_and_one_in_flight_does_not(tmp_path, update):
    make_tiny(tmp_path / "tiny")
    rollout = {"update": update, "max_lag": 4, "max_tokens": 48, "concurrency": 8}
    train(config(tmp_path, train={"steps": 12}, rollout=rollout, audit={"every": 4}))
    rollouts = [r for _, group in read_groups(tmp_path / "run" / "rollouts") for r in group.rollouts]
    several = sum(len(set(r.weight_versions)) > 1 for r in rollouts)
    assert several == 0 if update == "drain" else several > 0
    assert all(a["verdict"] == "agree" for a in lines(tmp_path / "run" / "audits.jsonl"))


@pytest.mark.slow
def test_synchronous_rounds_are_made_with_one_version_and_go_on_after_a_resume(tmp_path):
    make_tiny(tmp_path / "tiny")
    rollout = {"update": "synchronous", "max_lag": 2}
    train(config(tmp_path, train={"steps": 4}, rollout=rollout))
    train(config(tmp_path, train={"steps": 9}, rollout=rollout), resume=True)
    lags = [m["lag/oldest_token/max"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert lags == [0, 1, 2] * 3
    groups = [group for _, group in read_groups(tmp_path / "run" / "rollouts")]
    versions = [{v for r in group.rollouts for v in r.weight_versions} for group in groups]
    # What follows the nine batches of four groups was begun after the last update, if the engine still came to it.
    assert versions[:36] == [{0}] * 12 + [{3}] * 12 + [{6}] * 12
    assert all(v == {9} for v in versions[36:])


@pytest.mark.slow
def test_the_ess_guard_takes_one_batch_on_policy_after_a_low_one(tmp_path):
    make_tiny(tmp_path / "tiny")
    said = []
    train(config(tmp_path, train={"steps": 8}, rollout={"max_lag": 3, "min_ess": 1.0}), announce=said.append)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    guarded = False
    for record in metrics:
        assert record["lag/oldest_token/max"] == 0 or not guarded
        guarded = record["gap/ess/token"] < 1.0 and not guarded
    assert sum("ESS guard" in line for line in said) >= 2


def test_sinks_write_into_the_run_folder(tmp_path):
    make_tiny(tmp_path / "tiny")
    train(config(tmp_path, train={"steps": 2}, monitor={"sinks": ["tensorboard", "wandb"]}))
    for files in ("tensorboard/events*", "wandb/offline-run-*/*.wandb"):
        (found,) = (tmp_path / "run").glob(files)
        assert found.stat().st_size > 1000
