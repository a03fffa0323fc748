"""The rollout log: nothing lost, nothing twice, whatever the moment of a crash."""

import errno
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.test_packing import groups

from trueup.errors import RecordError, TraceError
from trueup.monitor.rundir import accept
from trueup.pipeline import rollout_log
from trueup.pipeline.rollout_log import LogReader, RolloutLog, group_from_json, read_groups, reader_of
from trueup.types import LogprobKind

quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


def fill(folder, made):
    """Write a log of these groups."""
    log = RolloutLog(folder)
    for group in made:
        log.append(group)
    log.close()


@quiet
@given(made=groups())
def test_what_is_appended_is_read_back_equal(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("log")
    log = RolloutLog(folder)
    assert [log.append(g) for g in made] == list(range(len(made)))
    assert list(read_groups(folder)) == list(enumerate(made))
    assert [n for n, _ in read_groups(folder, start=1)] == list(range(1, len(made)))


@quiet
@given(made=groups(), data=st.data())
def test_a_crash_at_any_byte_loses_the_last_line_only(tmp_path_factory, made, data):
    folder = tmp_path_factory.mktemp("log")
    fill(folder, made)
    file = folder / "000000.jsonl"
    whole = file.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:cut])
    finished = whole[:cut].count(b"\n")
    assert list(read_groups(folder)) == list(enumerate(made[:finished]))
    again = RolloutLog(folder)
    assert again.count == finished and (again.torn > 0) == (not whole[:cut].endswith(b"\n") and cut > 0)
    for group in made[finished:]:
        again.append(group)
    assert list(read_groups(folder)) == list(enumerate(made)) and file.read_bytes() == whole


@quiet
@given(made=groups(), data=st.data())
def test_a_changed_byte_is_noticed(tmp_path_factory, made, data):
    folder = tmp_path_factory.mktemp("log")
    fill(folder, made)
    file = folder / "000000.jsonl"
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 2))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(content))
    with pytest.raises(TraceError, match=r"000000\.jsonl, line \d+"):
        list(read_groups(folder))


@quiet
@given(made=groups())
def test_segments_follow_one_another_and_a_missing_one_is_noticed(tmp_path_factory, monkeypatch, made):
    folder = tmp_path_factory.mktemp("log")
    with monkeypatch.context() as patch:
        patch.setattr(rollout_log, "SEGMENT_BYTES", 1)
        log = RolloutLog(folder)
        for group in made:
            log.append(group)
        again = RolloutLog(folder)
        again.append(made[0])
    assert len(list(folder.iterdir())) == len(made) + 1
    assert [g for _, g in read_groups(folder)] == [*made, made[0]]
    (folder / "000000.jsonl").unlink()
    with pytest.raises(TraceError, match="gap"):
        list(read_groups(folder))


@quiet
@given(made=groups())
def test_a_full_disk_leaves_the_log_as_it_was(tmp_path_factory, monkeypatch, made):
    folder = tmp_path_factory.mktemp("log")
    log = RolloutLog(folder)
    log.append(made[0])
    before = (folder / "000000.jsonl").read_bytes()
    with monkeypatch.context() as patch:

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(rollout_log.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.append(made[0])
    assert (folder / "000000.jsonl").read_bytes() == before and log.count == 1
    assert log.append(made[0]) == 1
    assert len(list(read_groups(folder))) == 2


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no folder"):
        list(read_groups(tmp_path / "absent"))
    with pytest.raises(TraceError, match="no segments"):
        list(read_groups(tmp_path))
    for content in (None, {"schema": "other"}, {"schema": rollout_log.SCHEMA, "number": 0}):
        with pytest.raises(RecordError):
            group_from_json(content)


@quiet
@given(made=groups(), chooser=st.randoms())
def test_some_groups_are_read_by_number(tmp_path_factory, made, chooser):
    folder = tmp_path_factory.mktemp("log")
    half = len(made) // 2
    fill(folder, made[:half])
    reader = LogReader(folder)
    if half:
        assert reader.read([half - 1]) == [made[half - 1]]
    fill(folder, made[half:])  # the log grows while it is read
    numbers = chooser.sample(range(len(made)), k=chooser.randint(1, len(made)))
    assert reader.read(numbers) == LogReader(folder).read(numbers) == [made[n] for n in numbers]
    with pytest.raises(TraceError, match=f"lacks group {len(made)}"):
        reader.read([0, len(made)])


@quiet
@given(made=groups())
def test_with_s1_accepted_reported_logprobs_are_taken_for_the_policys(tmp_path_factory, made):
    run = tmp_path_factory.mktemp("run")
    (run / "parity").mkdir()
    fill(run / "rollouts", made)
    numbers = range(len(made))
    assert reader_of(run).read(numbers) == made
    accept(run, ["I2"])
    assert reader_of(run).read(numbers) == made
    accept(run, ["I2", "S1"])
    trusted = reader_of(run).read(numbers)
    for before, after in zip(made, trusted, strict=True):
        assert after.rewards == before.rewards
        for old, new in zip(before.rollouts, after.rollouts, strict=True):
            assert new == replace(old, logprob_kind=LogprobKind.PROCESSED)
    assert list(read_groups(run / "rollouts")) == list(enumerate(made))  # the log says what was reported
