"""What may go wrong around a run: it says so, waits no longer than its timeouts, loses nothing, and can be resumed."""

import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.e2e.test_train_online import children_of, config, lines, toml

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.errors import TrainingError
from trueup.model.tiny import make_tiny
from trueup.pipeline import fleet as fleet_module
from trueup.pipeline import run as run_module
from trueup.pipeline.evaluate import evaluate
from trueup.pipeline.rollout_log import read_groups
from trueup.pipeline.run import train
from trueup.tasks.prompts import PromptSource
from trueup.tasks.repeat import Repeat
from trueup.tasks.scoring import ScoringPool


def assert_whole(run, *, batches, groups):
    """Every group once in the log and in at most one batch; a version for every batch that gave a gradient."""
    records, metrics = lines(run / "batches.jsonl"), lines(run / "metrics.jsonl")
    assert [b["batch"] for b in records] == [m["batch"] for m in metrics] == list(range(1, batches + 1))
    taken = [n for b in records for n in b["groups"]]
    assert len(set(taken)) == len(taken) == batches * groups
    logged = dict(read_groups(run / "rollouts"))
    assert set(taken) <= set(logged)
    prompts = [g.rollouts[0].prompt.prompt_id for g in logged.values()]
    assert len(set(prompts)) == len(prompts)
    made = ["skipped" not in m for m in metrics]
    assert [m["version"] for m in metrics] == list(itertools.accumulate(made))
    assert [b["version"] for b in records] == [0, *itertools.accumulate(made[:-1])]
    served = [u["version"] for u in lines(run / "updates.jsonl") if u["version"]]
    assert served == list(range(1, metrics[-1]["version"] + 1))


class Unreliable(Repeat):
    """Raises for some completions; never comes back for one."""

    def __init__(self, hung: Path) -> None:
        self.hung = hung

    def score(self, answer, completion):
        if random.Random(completion).random() < 0.1:
            raise ZeroDivisionError("the scorer's own fault")
        if not self.hung.exists():
            self.hung.touch()
            time.sleep(600)
        return super().score(answer, completion)


@pytest.mark.slow
def test_a_reward_that_raises_or_hangs_costs_its_group_and_its_timeout(tmp_path):
    make_tiny(tmp_path / "tiny")
    summary = train(config(tmp_path, task={"score_timeout_s": 0.5}), task=Unreliable(tmp_path / "hung"))
    assert summary["steps"] == 6 and (tmp_path / "hung").exists()
    assert summary["counts"]["failed_groups"] > 0 and summary["counts"]["unscored"] > 0
    assert_whole(tmp_path / "run", batches=6, groups=4)


class Breaks(Repeat):
    """Scores so many completions and raises ever after."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def score(self, answer, completion):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("the scorer's own fault")
        return super().score(answer, completion)


def test_a_reward_that_raises_ever_after_stops_the_run_with_its_words(tmp_path):
    make_tiny(tmp_path / "tiny")
    with pytest.raises(TrainingError, match=r"groups in a row came to nothing.*the scorer's own fault"):
        train(config(tmp_path), task=Breaks(60))


def test_an_evaluation_without_a_reward_says_why(tmp_path):
    settings = config(tmp_path)
    task = Breaks(0)
    source = PromptSource(task, make_tiny(tmp_path / "tiny"), chat=True)
    engine = EmbeddedEngine(tmp_path / "tiny", EngineOptions(dtype=torch.float32))
    scoring = ScoringPool(task, workers=1, timeout_s=5.0)
    try:
        with pytest.raises(TrainingError, match=r"none of 4 held-out completions has a reward.*the scorer's own fault"):
            evaluate([engine], source, source.held_out(4), scoring, settings.sampling, settings.rollout)
    finally:
        scoring.close()
        engine.close()


@pytest.mark.slow
def test_an_engine_that_hangs_is_killed_and_replaced(tmp_path, monkeypatch):
    """Stopped, not ended: it keeps its port open and answers nothing."""
    make_tiny(tmp_path / "tiny")
    monkeypatch.setattr(fleet_module, "HUNG_S", 3.0)
    pids, said = [], []

    def started(settings, path, engine_processes=fleet_module.engine_processes):
        found = engine_processes(settings, path)
        pids.append(lambda: found[0].pid)
        return found

    monkeypatch.setattr(fleet_module, "engine_processes", started)

    def on_batch(metrics):
        if len(lines(tmp_path / "run" / "batches.jsonl")) == 2:
            os.kill(pids[0](), signal.SIGSTOP)

    summary = train(config(tmp_path), on_batch=on_batch, announce=said.append)
    assert summary["engine_restarts"] == 1 and any("answers nothing" in line for line in said)
    assert_whole(tmp_path / "run", batches=6, groups=4)


@pytest.mark.slow
def test_ctrl_c_saves_the_batch_under_way_and_the_run_goes_on(tmp_path):
    make_tiny(tmp_path / "tiny")
    command, run = toml(tmp_path, steps=14), tmp_path / "run"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(lines(run / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Traceback" not in err and not children_of(run)
    done = lines(run / "batches.jsonl")
    assert 3 <= len(done) < 14 and json.loads((run / "summary.json").read_text())["interrupted"] is True
    # The trainer's own checkpoint is of the very batch: nothing is trained on again.
    states = [json.loads(p.read_text()) for p in run.glob("checkpoints/v*/state.json")]
    assert max(state["batches"] for state in states) == len(done)
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert lines(run / "batches.jsonl")[: len(done)] == done
    assert_whole(run, batches=14, groups=4)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_it_goes_on_elsewhere(tmp_path):
    """A real one: a file system of 5 MB, which rollouts, weights and checkpoints fill."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount of its own (unshare -rm) for a file system that is full")
    make_tiny(tmp_path / "tiny")
    disk, run = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    command = toml(tmp_path, steps=20, checkpoint_every=5)
    script = f'mount -t tmpfs -o size=5m tmpfs "{disk}" && "$@"; code=$?; cp -a "{disk}/run" "{run}"; exit $code'
    small = ["unshare", "-rm", "sh", "-c", script, "sh", *command, "--run", str(disk / "run"),
             "--set=rollout.keep_weights=40"]  # fmt: skip
    failed = subprocess.run(small, capture_output=True, text=True, timeout=300, check=False)
    assert failed.returncode == 2, failed.stderr
    assert "No space left" in failed.stderr and "Traceback" not in failed.stderr
    logged = dict(read_groups(run / "rollouts"))
    again = subprocess.run(
        [*command, "--run", str(run), "--set=rollout.keep_weights=40", "--resume"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    after = dict(read_groups(run / "rollouts"))
    assert all(after[number] == group for number, group in logged.items())
    assert_whole(run, batches=20, groups=4)


@pytest.mark.slow
def test_a_batch_is_trained_once_when_the_trainer_dies_after_its_checkpoint_and_before_its_answer(
    tmp_path, monkeypatch
):
    make_tiny(tmp_path / "tiny")
    lost = []

    class Unheard(run_module.TrainerProcess):
        def answer(self, timeout_s):
            content = super().answer(timeout_s)
            if content is not None and content["batches"] == 3 and not lost:
                lost.append(content)
                self.kill()
                raise self._gone()
            return content

    monkeypatch.setattr(run_module, "TrainerProcess", Unheard)
    summary = train(config(tmp_path, train={"steps": 5, "checkpoint_every": 3}))
    assert len(lost) == 1 and summary["steps"] == 5
    assert_whole(tmp_path / "run", batches=5, groups=4)
    assert lines(tmp_path / "run" / "metrics.jsonl")[2].items() >= lost[0]["metrics"].items()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [pytest.param("engine", marks=pytest.mark.long), "trainer"])
def test_kill_9_of_a_process_at_ten_random_moments(tmp_path, monkeypatch, victim):
    make_tiny(tmp_path / "tiny")
    pids, killed = {}, set()

    class Remembering(run_module.TrainerProcess):
        def __init__(self, path):
            super().__init__(path)
            pids["trainer"] = self.pid

    def started(settings, path, engine_processes=fleet_module.engine_processes):
        found = engine_processes(settings, path)
        pids["fleet"] = found
        return found

    monkeypatch.setattr(run_module, "TrainerProcess", Remembering)
    monkeypatch.setattr(fleet_module, "engine_processes", started)
    over = threading.Event()

    def killer():
        """Most times once there was another batch, now and then while the process is still starting.

        Twice in a row at most: a trainer that ends six times without a batch ends the run, and starting takes seconds.
        """
        seen = early = 0
        while len(killed) < 10 and not over.wait(random.uniform(0.0, 1.0)):
            pid = pids.get("trainer") if victim == "trainer" else pids["fleet"][0].pid if "fleet" in pids else None
            file = tmp_path / "run" / "batches.jsonl"
            batches = len(file.read_bytes().splitlines()) if file.is_file() else 0
            if not batches or pid in {*killed, None}:
                continue
            early = 0 if batches > seen else early
            if batches > seen or (early < 2 and random.random() < 0.1):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                early += batches == seen
                seen = batches

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    try:
        summary = train(config(tmp_path, train={"steps": 150, "checkpoint_every": 3}, rollout={"eval_every": 100}))
    finally:
        over.set()
        thread.join(10)
    assert len(killed) == 10
    assert summary["steps"] == 150 and summary["lag_max"] <= 1
    if victim == "engine":
        assert summary["engine_restarts"] >= 10
    assert_whole(tmp_path / "run", batches=150, groups=4)
