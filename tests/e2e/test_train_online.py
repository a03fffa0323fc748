"""`trueup train` with engines of its own: what a run leaves behind, and that nothing in it is lost or used twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.engine_kit import row_of

from trueup.config import build_config
from trueup.errors import ConfigError, MismatchError
from trueup.model.load import load_model
from trueup.model.packed import open_policy, packed_hidden_states
from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import read_groups
from trueup.pipeline.run import train
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores
from trueup.weights.store import WeightStore


def config(folder, **sections):
    values = {
        "train": {
            "model": str(folder / "tiny"), "run": str(folder / "run"), "steps": 6, "groups": 4, "dtype": "float32",
            "threads": 1, "checkpoint_every": 2,
        },
        "task": {"name": "repeat", "held_out": 16},
        "rollout": {"group_size": 4, "max_tokens": 6, "max_lag": 1, "concurrency": 4, "eval_every": 3},
        "objective": {"kind": "reinforce", "entropy": 0.01},
        "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_config(values)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("max_lag", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_from_preflight_to_summary(tmp_path, max_lag):
    make_tiny(tmp_path / "tiny")
    shown, said = [], []
    summary = train(
        config(tmp_path, rollout={"max_lag": max_lag, "keep_weights": 20}),
        announce=said.append, on_batch=shown.append,
    )  # fmt: skip
    run = tmp_path / "run"
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["preflight_verdict"] == "agree" and summary["steps"] == 6 and summary["lag_max"] <= max_lag
    assert json.loads((run / "parity" / "preflight.json").read_text())["verdict"] == "agree"
    assert any("preflight  agree" in line for line in said) and len(shown) == 6
    batches, metrics = lines(run / "batches.jsonl"), lines(run / "metrics.jsonl")
    assert [b["batch"] for b in batches] == [m["batch"] for m in metrics] == list(range(1, 7))
    # Every group is in the log once, in at most one batch, of the lag that was written down.
    groups = dict(read_groups(run / "rollouts"))
    taken = [n for b in batches for n in b["groups"]]
    assert len(set(taken)) == len(taken) == 24
    prompts = [g.rollouts[0].prompt.prompt_id for g in groups.values()]
    assert len(set(prompts)) == len(prompts)
    for batch, metric in zip(batches, metrics, strict=True):
        lags = [batch["version"] - groups[n].oldest_version for n in batch["groups"]]
        assert max(lags) == metric["lag/oldest_token/max"] <= max_lag
    # Versions: every token carries one that was published, and these weights made it.
    store = WeightStore(run / "weights")
    model = open_policy(load_model(tmp_path / "tiny", dtype=torch.float32), bitwise=False)
    start = {n: p.clone() for n, p in model.lm.named_parameters()}
    for number in taken:
        for rollout in groups[number].rollouts[:1]:
            if len(set(rollout.weight_versions)) > 1:
                continue
            version = rollout.weight_versions[0]
            source = start if version == 0 else load_model(store.folder(version), dtype=torch.float32).stored_tensors()
            with torch.no_grad():
                for name, parameter in model.lm.named_parameters():
                    parameter.copy_(source[name])
                hidden = packed_hidden_states(model, [row_of(rollout)])
            scores = token_scores(hidden, Head.of(model, torch.float32), torch.tensor(rollout.token_ids))
            gap = scores.logprobs_T - torch.tensor(rollout.behaviour_logprobs)
            assert float(gap.abs().max()) < 1e-4
    evaluations = lines(run / "evaluations.jsonl")
    assert [e["batch"] for e in evaluations] == [0, 3, 6]
    assert evaluations[0]["reward"] == summary["heldout_reward_start"]
    assert [u["version"] for u in lines(run / "updates.jsonl")] == sorted({m["version"] for m in metrics} - {0})


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path):
    make_tiny(tmp_path / "tiny")
    train(config(tmp_path, train={"steps": 3}))
    before = lines(tmp_path / "run" / "batches.jsonl")
    summary = train(config(tmp_path), resume=True)
    batches = lines(tmp_path / "run" / "batches.jsonl")
    assert batches[:3] == before and len(batches) == 6 and summary["steps"] == 6
    taken = [n for b in batches for n in b["groups"]]
    assert len(set(taken)) == len(taken)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6


def test_a_backend_that_disagrees_does_not_start(tmp_path, monkeypatch):
    """The engine is served another checkpoint than the one that is trained: the gate names it and no step is taken."""
    from trueup.pipeline import launch

    make_tiny(tmp_path / "tiny")
    other = make_tiny(tmp_path / "other", seed=3)
    command = launch.EmbeddedProcess._command

    def another(self):
        return [part.replace(str(tmp_path / "tiny"), str(other)) for part in command(self)]

    monkeypatch.setattr(launch.EmbeddedProcess, "_command", another)
    with pytest.raises(MismatchError, match="does not agree with the trainer"):
        train(config(tmp_path))
    assert not (tmp_path / "run" / "batches.jsonl").exists()
    assert json.loads((tmp_path / "run" / "parity" / "preflight.json").read_text())["verdict"] == "mismatch"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.steps is missing"):
        train(build_config({"train": {"model": "x", "run": str(tmp_path / "run")}}))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "trainer"])
def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(tmp_path, monkeypatch, victim):
    """kill -9 in the middle of a batch, more than once; versions and batches are those of a run without it."""
    from trueup.pipeline import fleet as fleet_module
    from trueup.pipeline import run as run_module

    make_tiny(tmp_path / "tiny")
    pids = {}

    class Remembering(run_module.TrainerProcess):
        def __init__(self, path):
            super().__init__(path)
            pids["trainer"] = self.pid

    monkeypatch.setattr(run_module, "TrainerProcess", Remembering)

    def started(config, path, engine_processes=fleet_module.engine_processes):
        found = engine_processes(config, path)
        pids["engine"] = lambda: found[0].pid
        return found

    monkeypatch.setattr(fleet_module, "engine_processes", started)
    killed = []

    def on_batch(metrics):
        if len(killed) < 3:
            pid = pids[victim]() if callable(pids[victim]) else pids[victim]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    summary = train(config(tmp_path, train={"steps": 6, "checkpoint_every": 2}), on_batch=on_batch)
    run = tmp_path / "run"
    assert len(set(killed)) == 3
    batches, metrics = lines(run / "batches.jsonl"), lines(run / "metrics.jsonl")
    assert [b["batch"] for b in batches] == [m["batch"] for m in metrics] == list(range(1, 7))
    groups = dict(read_groups(run / "rollouts"))
    taken = [n for b in batches for n in b["groups"]]
    assert len(set(taken)) == len(taken) == 24 and set(taken) <= set(groups)
    prompts = [g.rollouts[0].prompt.prompt_id for g in groups.values()]
    assert len(set(prompts)) == len(prompts)
    assert [m["version"] for m in metrics] == sorted(m["version"] for m in metrics)
    assert summary["version"] == metrics[-1]["version"] == 6
    assert summary["engine_restarts"] == (3 if victim == "engine" else 0)
    # What was trained is what the recorded batches give: a trainer on the log alone has the same weights.
    from trueup.pipeline.rollout_log import LogReader
    from trueup.pipeline.trainer import Trainer
    from trueup.weights.store import load_tensors

    torch.set_num_threads(1)
    again = Trainer(config(tmp_path))
    for batch in batches:
        again.step(LogReader(run / "rollouts").read(batch["groups"]))
    store = WeightStore(run / "weights")
    published = load_tensors(store.open(6))
    assert all(torch.equal(again.weights.published()[name], value) for name, value in published.items())


def toml(folder, **train):
    """The same configuration as a file, and the command that runs it."""
    content = config(folder, train=train).model_dump(mode="json", exclude_none=True)
    keep = {name: content[name] for name in ("train", "task", "rollout", "objective", "optimizer")}
    file = folder / "run.toml"
    text = []
    for name, section in keep.items():
        text.append(f"[{name}]")
        text += [f"{key} = {json.dumps(value)}" for key, value in section.items() if value != {}]
    file.write_text("\n".join(text) + "\n")
    return [sys.executable, "-m", "trueup.cli", "train", str(file)]


def children_of(run):
    """Processes that work on a run, found by their command lines."""
    found = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True, check=False).stdout.split()
    return [int(pid) for pid in found]


@pytest.mark.slow
@pytest.mark.parametrize("moments", [4, pytest.param(10, marks=pytest.mark.long)])
def test_kill_9_of_the_run_at_random_moments(tmp_path, moments):
    """Resumed each time: no group is lost from or twice in the log, and no process is left behind."""
    make_tiny(tmp_path / "tiny")
    steps = 4 * moments
    command, run = toml(tmp_path, steps=steps, checkpoint_every=3), tmp_path / "run"
    chooser, killed, seen = random.Random(time.time_ns()), 0, set()
    for _ in range(40):
        more = ["--resume"] if (run / "config.json").is_file() else []
        process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        before = (run / "batches.jsonl").stat().st_size if (run / "batches.jsonl").is_file() else 0
        deadline = time.monotonic() + 120
        while killed < moments and process.poll() is None and time.monotonic() < deadline:
            if (run / "batches.jsonl").is_file() and (run / "batches.jsonl").stat().st_size > before:
                break
            time.sleep(0.01)
        time.sleep(chooser.random() * 0.5)
        if killed < moments and process.poll() is None:
            process.kill()
            killed += 1
        stderr = process.communicate(timeout=300)[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if (run / "rollouts").is_dir():
            logged = dict(read_groups(run / "rollouts"))
            assert seen <= set(logged), "a group was lost"
            seen = set(logged)
        if process.returncode == 0:
            break
        time.sleep(1.0)
    assert killed == moments and process.returncode == 0
    batches = lines(run / "batches.jsonl")
    taken = [n for b in batches for n in b["groups"]]
    assert [b["batch"] for b in batches] == list(range(1, steps + 1)) and len(set(taken)) == len(taken) == 4 * steps
    prompts = [g.rollouts[0].prompt.prompt_id for g in dict(read_groups(run / "rollouts")).values()]
    assert len(set(prompts)) == len(prompts)
    metrics = lines(run / "metrics.jsonl")
    assert [m["batch"] for m in metrics] == list(range(1, steps + 1))
    assert [m["version"] for m in metrics] == sorted(m["version"] for m in metrics)
    assert all(m.get("lag/oldest_token/max", 0) <= 1 for m in metrics)
    deadline = time.monotonic() + 20
    while children_of(run) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not children_of(run)
