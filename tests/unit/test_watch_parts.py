"""The parts of watching a run: what an audit samples, whose keys a token attended to, what a canary says, presets."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from trueup.config import build_config
from trueup.engines import tether
from trueup.engines.embedded.options import Fault
from trueup.errors import ConfigError, MismatchError
from trueup.model.load import load_model
from trueup.model.packed import open_policy
from trueup.model.tiny import make_tiny
from trueup.monitor.rundir import RunFolder
from trueup.pipeline.audit import sampled, shared_beginning, with_old_keys
from trueup.pipeline.canary import Canary
from trueup.pipeline.components import Bench, mixes_versions
from trueup.pipeline.recipe import recipe_of
from trueup.pipeline.watch import ParityWatch
from trueup.presets import PRESETS
from trueup.types import CacheLife, LogprobKind, Prompt, Rollout, RolloutGroup, SamplingParams
from trueup.weights.store import WeightStore


def rollout(prompt=(1, 2, 3), *, versions=(0, 0, 0, 0), lives=()):
    count = len(versions)
    return Rollout(
        prompt=Prompt(prompt_id="p", task="t", token_ids=tuple(prompt), answer=None),
        token_ids=tuple(range(5, 5 + count)), behaviour_logprobs=(-1.0,) * count, weight_versions=tuple(versions),
        logprob_kind=LogprobKind.PROCESSED, sampling=SamplingParams(), finish_reason="length", engine="e",
        cache_lives=tuple(lives),
    )  # fmt: skip


def group(*lengths):
    made = tuple(rollout(versions=(0,) * n) for n in lengths)
    return RolloutGroup(rollouts=made, rewards=(0.0,) * len(made))


def test_a_sample_takes_one_rollout_of_each_group_in_turn_until_there_are_enough_tokens():
    groups = [group(4, 4, 4), group(4, 4, 4)]
    counts = {tokens: [len(g.rollouts) for g in sampled(groups, tokens)] for tokens in (1, 8, 12, 1000)}
    assert counts == {1: [1], 8: [1, 1], 12: [2, 1], 1000: [3, 3]}
    assert sampled(groups, 12)[0].rewards == (0.0, 0.0)


def test_the_shared_beginning_is_what_a_prefix_cache_would_reuse():
    prompts = [(1, 2, 3, 4), (1, 2, 9), (7, 8)]
    assert [shared_beginning(p, prompts) for p in prompts] == [2, 2, 0]
    assert shared_beginning((1, 2), [(1, 2), (1, 2, 3)]) == 1  # never the whole prompt: its last token is run again
    assert shared_beginning((1, 2), [(1, 2)]) == 0


def test_old_keys_take_the_first_positions_and_leave_the_rest():
    lives = (CacheLife(first_token=0, runs=((3, 4), (4, 3))),)
    found = list(with_old_keys(rollout(versions=(3, 4, 4, 4), lives=lives), 5, 1))
    assert [life.runs for life in found] == [((1, 5), (4, 2))]
    assert sum(n for _, n in found[0].runs) == 7


@pytest.mark.parametrize(
    ("versions", "lives", "mixed"),
    [
        ((2, 2, 2, 2), (), False),
        ((2, 2, 2, 2), ((0, ((2, 7),)),), False),
        ((2, 2, 2, 2), ((0, ((1, 3), (2, 4))),), True),
        ((1, 1, 2, 2), ((0, ((1, 5), (2, 2))),), True),
        ((1, 1, 2, 2), ((0, ((1, 5),)), (2, ((2, 7),))), False),
    ],
    ids=["no record", "one", "older keys", "update with its keys kept", "update with its keys cleared"],
)
def test_a_rollout_mixes_versions_if_a_token_attended_to_anothers_keys(versions, lives, mixed):
    made = rollout(versions=versions, lives=[CacheLife(first_token=f, runs=r) for f, r in lives])
    assert mixes_versions(made) is mixed


@pytest.fixture
def bench(tmp_path):
    """Of a tiny policy whose version v has its matrices scaled by 1 + v / 10."""
    model = open_policy(load_model(make_tiny(tmp_path / "tiny"), dtype=torch.float32), bitwise=False)
    start = {n: p.detach().clone() for n, p in model.lm.named_parameters()}

    def tensors_of(version):
        return {n: p * (1 + version / 10) if p.ndim == 2 else p for n, p in start.items()}

    return Bench(model, tensors_of, head_dtype=torch.float32, share_prompts=True, micro_tokens=1024)


@pytest.fixture
def make_canary(bench, tmp_path):
    return lambda: Canary(bench, tmp_path / "parity" / "canary.json", lambda: range(20))


def test_each_part_of_the_policy_ratio_is_later_minus_earlier(bench):
    """Backend, staleness and policy against the versions scored one by one; together they are the whole ratio."""
    made = group(4, 3)
    stamped = [replace(r, weight_versions=(v,) * len(r.token_ids)) for v, r in zip((1, 2), made.rollouts, strict=True)]
    groups = [RolloutGroup(rollouts=tuple(stamped), rewards=(0.0, 1.0))]
    recipe = recipe_of(build_config({"train": {"model": "unused"}}))
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=0)  # rows are scored in other batches
    batch, parts = bench.take_apart(groups, proximal=3, current=4, recipe=recipe)
    logprobs = {v: bench.score(v, batch).logprobs_T.double() for v in (1, 2, 3, 4)}
    own_T = torch.where(batch.version_T == 1, logprobs[1], logprobs[2])
    assert parts.lag_T.tolist() == [2] * 4 + [1] * 3
    close(parts.backend_T, own_T - batch.behaviour_logprobs_T.double())
    close(parts.stale_kv_T, torch.zeros(7, dtype=torch.float64))
    close(parts.staleness_T, logprobs[3] - own_T)
    close(parts.policy_T, logprobs[4] - logprobs[3])
    assert float((logprobs[3] - own_T).abs().min()) > 1e-2  # a wrong sign would show
    whole_T = parts.backend_T + parts.stale_kv_T + parts.staleness_T + parts.policy_T
    close(whole_T, logprobs[4] - batch.behaviour_logprobs_T.double())


@pytest.fixture
def canary(make_canary):
    return make_canary()


def test_an_engine_that_follows_its_updates_is_silent(canary):
    noise = torch.Generator().manual_seed(0)
    for version in range(5):
        scores_T = canary.expected(version)
        jitter_T = 1e-5 * torch.randn(scores_T.shape, generator=noise, dtype=torch.float64)
        assert canary.judge(0, version, scores_T + jitter_T) is None


def test_an_engine_that_does_not_move_is_w1_at_the_first_update(canary):
    assert canary.judge(0, 0, canary.expected(0)) is None
    found = canary.judge(0, 1, canary.expected(0))
    assert found is not None and found.id == "W1" and found.fits == 0


def test_an_engine_that_lags_is_w2_with_the_version_it_has(canary):
    assert canary.judge(0, 0, canary.expected(0)) is None
    assert canary.judge(0, 1, canary.expected(1)) is None
    canary.expected(2)
    assert canary.judge(0, 3, canary.expected(2)).id == "W2"
    found = canary.judge(0, 4, canary.expected(3))
    assert (found.id, found.fits) == ("W2", 3) and "1 versions behind" in found.title


def test_engines_are_judged_apart(canary):
    for engine in (0, 1):
        assert canary.judge(engine, 0, canary.expected(0)) is None
    assert canary.judge(0, 1, canary.expected(1)) is None
    assert canary.judge(1, 1, canary.expected(0)).id == "W1"


def test_an_engine_that_lags_from_the_first_look_on_is_w2(canary):
    """After a restart at version 5, the first look is not taken as the baseline if an older version fits better."""
    found = canary.judge(0, 5, canary.expected(4))
    assert (found.id, found.fits) == ("W2", 4) and "first look" in found.evidence
    for version in range(6, 10):
        assert canary.judge(0, version, canary.expected(version - 1)).id == "W2"


def test_an_engine_that_is_far_off_at_the_first_look_is_no_measure_of_itself(canary):
    found = canary.judge(0, 5, canary.expected(5) + 3.0)
    assert found.id is None and "3 nats" in found.evidence
    assert not canary.memory.exists()


def test_a_canary_remembers_its_engine_across_restarts(make_canary):
    first = make_canary()
    assert first.judge(0, 0, first.expected(0) + 1e-5) is None
    again = make_canary()
    found = again.judge(0, 6, again.expected(6) + 5e-3)
    assert found.id is None, "within what a first look allows, and a hundred times what was measured before"
    assert again.judge(0, 7, again.expected(7) + 1e-5) is None


def watch(folder, *, accepted=(), every=0):
    settings = build_config({"audit": {"every": every}})
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    return ParityWatch(settings, folder, WeightStore(folder / "weights"), accepted=accepted, announce=lambda line: None)


def alarm(cause, evidence="rms 1"):
    return {"id": cause, "title": "t", "fix": "f", "evidence": evidence, "by": "audit"}


def test_an_alarm_stops_a_resumed_run_again_unless_it_is_accepted(tmp_path):
    first = watch(tmp_path)
    first.batch = 10
    with pytest.raises(MismatchError, match="--accept-mismatch W12 --resume"):
        first._alarm([alarm("W12")])
    plain = watch(tmp_path)
    with pytest.raises(MismatchError, match=r"stopped by batch 10.*--accept-mismatch W12"):
        plain.require_accepted()
    knowing = watch(tmp_path, accepted=["W12"])
    knowing.require_accepted()
    knowing.batch = 11
    knowing._alarm([alarm("W12")])
    knowing.batch = 20
    with pytest.raises(MismatchError, match="W1 t"):
        knowing._alarm([alarm("W12"), alarm("W1")])
    with pytest.raises(MismatchError, match="stopped by batch 20, by audit: W1"):
        watch(tmp_path, accepted=["W12"]).require_accepted()


def test_an_unnamed_gap_does_not_silence_a_later_one(tmp_path):
    first = watch(tmp_path)
    for batch in (5, 10):
        first.batch = batch
        with pytest.raises(MismatchError, match="--accept-mismatch unnamed"):
            first._alarm([alarm(None)])
    assert [a["batch"] for a in watch(tmp_path).alarms] == [5, 10]
    watch(tmp_path, accepted=["unnamed"]).require_accepted()


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("vllm", "flags", ("--seed=3",)), ("vllm", "version", "0.18.1"), ("vllm", "dtype", "float32")],
)
def test_a_vllm_run_is_not_resumed_with_another_vllm(tmp_path, section, name, value):
    RunFolder.create(tmp_path / "run", build_config({}), {}).close()
    with pytest.raises(ConfigError, match=f"{section}.{name} is .* now and was"):
        RunFolder.resume(tmp_path / "run", build_config({section: {name: value}}))
    RunFolder.resume(tmp_path / "run", build_config({section: {"port": 9}})).close()


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_starting_points_that_a_file_and_set_go_over(name):
    config = build_config({"preset": name})
    for section, values in PRESETS[name].items():
        assert getattr(config, section).model_dump().items() >= values.items()
    changed = build_config({"preset": name, "rollout": {"group_size": 3}}, sets=["optimizer.lr=0.5"])
    assert changed.rollout.group_size == 3 and changed.optimizer.lr == 0.5
    assert changed.rollout.max_lag == config.rollout.max_lag
    with pytest.raises(ConfigError, match="preset"):
        build_config({"preset": name + "x"})


def test_faults_are_read_as_they_are_written():
    for text in ("stale_prefixes", "late_sync lag=2", "partial_sync pattern=mlp"):
        assert Fault.parse(text).title() == text
    with pytest.raises(ConfigError, match="no name=value"):
        Fault.parse("late_sync 2")


def gone(pid, *, within_s=10.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_tethered_command_ends_with_whoever_started_it(tmp_path):
    """The parent is killed, not asked; the command and its own child end all the same."""
    pids = tmp_path / "pids"
    child = f"import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}} '); time.sleep(60)"  # noqa: E501
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {tether.__file__!r}, sys.executable, '-c', {child!r}],"
        " stdin=subprocess.PIPE, start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent])
    deadline = time.monotonic() + 20
    while not pids.is_file() or not pids.read_text().endswith(" "):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.kill()
    started.wait()
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_tethered_command_gives_its_exit_code_and_says_nothing_of_its_own():
    command = [sys.executable, tether.__file__, sys.executable, "-c", "raise SystemExit(3)"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.wait(20) == 3
    assert process.stderr.read() == b""
    process.stdin.close()


def test_a_tethered_command_is_asked_to_end_by_its_groups_signal():
    command = [sys.executable, tether.__file__, "sleep", "60"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdin.close()
