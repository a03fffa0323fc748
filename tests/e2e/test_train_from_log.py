"""`trueup train --from-log` as a user runs it: the same weights however it was interrupted, clear errors."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.semantics.test_trainer import sample
from typer.testing import CliRunner

from trueup.cli import app
from trueup.model.load import load_model
from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import RolloutLog
from trueup.weights.store import WeightStore, load_tensors, open_snapshot

BATCH = 2
GROUPS = 24
KILLS = 10


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A tiny policy in bfloat16 and a log of what it sampled."""
    folder = tmp_path_factory.mktemp("recorded")
    path = make_tiny(folder / "tiny", dtype=torch.bfloat16)
    log = RolloutLog(folder / "rollouts")
    for group in sample(path, dtype=torch.bfloat16, groups=GROUPS):
        log.append(group)
    log.close()
    return folder


def command(recorded, run, *more, every=1, rate="1e-4"):
    sets = {"groups": BATCH, "checkpoint_every": every, "threads": 2, "epochs": 2}
    return [
        sys.executable, "-m", "trueup.cli", "train", "--from-log", str(recorded / "rollouts"), "--model",
        str(recorded / "tiny"), "--run", str(run), *(f"--set=train.{n}={v}" for n, v in sets.items()),
        f"--set=optimizer.lr={rate}", "--set=objective.kl=0.01", *more,
    ]  # fmt: skip


def train(recorded, run, *more, prefix=(), **how):
    return subprocess.run(
        [*prefix, *command(recorded, run, *more, **how)], capture_output=True, text=True, timeout=300, check=False
    )


def refused(recorded, run, *more):
    """The line that a command which is refused leaves behind; in this process, for a new one takes seconds to start."""
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, command(recorded, run, *more)[3:])
    torch.set_num_threads(threads)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (more, done.output, done.exception)
    return done.stderr


def final(run):
    """Everything a finished run holds but its times: newest checkpoint, published weights, metrics."""
    store = WeightStore(run / "checkpoints")
    state = load_tensors(store.open(store.versions()[-1]))
    published = load_tensors(open_snapshot(run / json.loads((run / "summary.json").read_text())["weights"]))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return state, published, metrics


def assert_equal_runs(first, second):
    for one, other in zip(first[:2], second[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert first[2] == second[2]


@pytest.fixture(scope="module")
def uninterrupted(recorded, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = train(recorded, run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_run_leaves_everything_behind(recorded, uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert (summary["batches"], summary["version"], summary["skipped_batches"]) == (12, 12, 0)
    assert summary["optimizer_steps"] == 24 and summary["tokens"] == 24 * 4 * 24
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["recipe"]["kind"] == "grpo" and config["recipe"]["low"] == 0.2 and config["recipe"]["kl"] == 0.01
    assert json.loads((uninterrupted / "env.json").read_text())["packages"]["torch"]
    assert len(list((uninterrupted / "checkpoints").glob("v*"))) == 2
    _, published, metrics = final(uninterrupted)
    assert [line["batch"] for line in metrics] == list(range(1, 13))
    # What was published is a checkpoint of its own, of the forward pass's values.
    model = load_model(uninterrupted / summary["weights"], dtype=torch.bfloat16)
    assert all(torch.equal(model.stored_tensors()[name], value) for name, value in published.items())
    start = load_model(recorded / "tiny", dtype=torch.bfloat16).stored_tensors()
    assert any(not torch.equal(start[name], value) for name, value in published.items())


def test_the_same_log_gives_the_same_bits_again(recorded, uninterrupted, tmp_path):
    assert train(recorded, tmp_path / "run", every=5).returncode == 0
    assert_equal_runs(final(uninterrupted), final(tmp_path / "run"))


def test_a_run_in_two_parts_is_the_run_in_one(recorded, uninterrupted, tmp_path):
    run = tmp_path / "run"
    assert train(recorded, run, "--set=train.steps=5", every=3).returncode == 0
    assert json.loads((run / "summary.json").read_text())["batches"] == 5
    done = train(recorded, run, "--resume", every=3)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["resumed_after_batch"] == 5
    assert_equal_runs(final(uninterrupted), final(run))


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(recorded, uninterrupted, tmp_path):
    """Killed while it trains, writes a checkpoint, or publishes; resumed each time until it is done."""
    chooser = random.Random(time.time_ns())
    run, killed, moments = tmp_path / "run", 0, []
    while killed < KILLS or not (run / "summary.json").is_file():
        if (run / "summary.json").is_file():  # done before the tenth kill: the rest of them in a run of its own
            assert_equal_runs(final(uninterrupted), final(run))
            shutil.rmtree(run)
        more = ("--resume",) if (run / "config.json").is_file() else ()
        process = subprocess.Popen(command(recorded, run, *more), stderr=subprocess.PIPE, start_new_session=True)
        lines, wait = _lines(run), chooser.choice([0, 0, 1, 2])
        while killed < KILLS and process.poll() is None and _lines(run) < lines + wait + 1:
            time.sleep(0.001)
        time.sleep(chooser.random() * 0.12)
        if killed < KILLS and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
            moments.append(_lines(run))
        stderr = process.communicate(timeout=300)[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), stderr
    assert_equal_runs(final(uninterrupted), final(run))
    assert len(set(moments)) > 2, moments


def _lines(run):
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


@pytest.mark.slow
def test_a_full_disk_stops_with_a_message_and_the_run_goes_on_once_there_is_room(recorded, uninterrupted, tmp_path):
    """A real one: a small file system that fills up while the run writes its checkpoints."""
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        pytest.skip("needs a mount of its own (unshare -rm) for a file system that is full")
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    # The run begins on the small disk, fails there, and is copied out of it: what it left must be enough to go on.
    script = f'mount -t tmpfs -o size=3m tmpfs "{disk}" && "$@"; code=$?; cp -a "{disk}/run" "{run}"; exit $code'
    failed = train(recorded, disk / "run", "--set=train.keep_checkpoints=5",
                   prefix=["unshare", "-rm", "sh", "-c", script, "sh"])  # fmt: skip
    assert failed.returncode == 2, failed.stderr
    assert "cannot be written" in failed.stderr and "No space left" in failed.stderr and "resume" in failed.stderr
    assert "Traceback" not in failed.stderr
    kept = WeightStore(run / "checkpoints").versions()
    assert kept and not list((run / "checkpoints").glob(".*"))
    done = train(recorded, run, "--set=train.keep_checkpoints=5", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["resumed_after_batch"] == kept[-1]
    assert_equal_runs(final(uninterrupted), final(run))


def test_errors_a_user_can_act_on(recorded, uninterrupted, tmp_path):
    other = make_tiny(tmp_path / "other", dtype=torch.bfloat16, seed=1)
    wide = make_tiny(tmp_path / "wide", dtype=torch.bfloat16, hidden_size=32)
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    empty = tmp_path / "empty"
    empty.mkdir()
    short = RolloutLog(tmp_path / "short")
    short.append(sample(recorded / "tiny", dtype=torch.bfloat16, groups=1)[0])
    short.close()
    damaged = tmp_path / "damaged"
    shutil.copytree(recorded / "rollouts", damaged)
    content = bytearray((damaged / "000000.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "000000.jsonl").write_bytes(bytes(content))
    for more, text in (
        (["--run", str(uninterrupted)], "holds a run already"),
        (["--run", str(tmp_path / "absent"), "--resume"], "holds no run to resume"),
        (["--run", str(copy), "--resume", "--set=objective.low=0.1"], "objective.low is 0.1 now"),
        (["--run", str(copy), "--resume", "--model", str(other)], "train.model is"),
        (["--run", str(tmp_path / "a"), "--from-log", str(empty)], "holds no segments"),
        (["--run", str(tmp_path / "a"), "--from-log", str(tmp_path / "short")], "fewer than 2 groups"),
        (["--run", str(tmp_path / "a"), "--from-log", str(damaged)], "is damaged: its checksum"),
        (["--run", str(tmp_path / "a"), "--model", str(empty)], "no config.json"),
        (["--run", str(tmp_path / "a"), "--set=train.grops=3"], "did you mean 'train.groups'"),
    ):
        assert text in refused(recorded, tmp_path / "run", *more), more
    # The same path, another model in it: of the same shape, and of another one.
    for model in (other, wide):
        content = json.loads((copy / "config.json").read_text())
        content["train"]["model"] = str(model)
        (copy / "config.json").write_text(json.dumps(content))
        assert "another model" in refused(recorded, copy, "--resume", "--model", str(model))


def test_a_run_that_is_in_use_is_refused(recorded, uninterrupted, tmp_path):
    import fcntl

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    with (run / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "in use by another process" in refused(recorded, run, "--resume")


def test_batches_without_a_gradient_are_counted_and_a_log_of_nothing_else_is_an_error(recorded, tmp_path):
    import dataclasses

    made = sample(recorded / "tiny", dtype=torch.bfloat16, groups=4)
    flat = [dataclasses.replace(g, rewards=(1.0,) * 4) for g in made]
    for name, groups in (("some", [*flat[:2], *made[2:]]), ("none", flat)):
        log = RolloutLog(tmp_path / name)
        for group in groups:
            log.append(group)
        log.close()
    no_kl = "--set=objective.kl=0"
    done = train(recorded, tmp_path / "run", no_kl, "--from-log", str(tmp_path / "some"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["batches"], summary["skipped_batches"], summary["version"]) == (2, 1, 1)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "every advantage is zero" in first["skipped"] and first["version"] == 0
    done = train(recorded, tmp_path / "run2", no_kl, "--from-log", str(tmp_path / "none"))
    assert done.returncode == 2 and "none of 2 batches had a gradient" in done.stderr
