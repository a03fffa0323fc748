"""The buffer: order, staleness and admission, by hand and by a run of random events."""

import random

import pytest

from trueup.config import build_config
from trueup.pipeline.buffer import Finished, RolloutBuffer
from trueup.pipeline.run import must_drop


def finished(number, oldest):
    return Finished(number=number, oldest_version=oldest)


def test_groups_are_taken_in_order_and_only_when_a_batch_is_full():
    buffer = RolloutBuffer(groups_per_batch=2, max_lag=1)
    buffer.add(finished(0, 0))
    assert buffer.take(0) == [] and len(buffer) == 1
    for number in (1, 2):
        buffer.add(finished(number, 0))
    assert [g.number for g in buffer.take(0)] == [0, 1] and len(buffer) == 1


def test_what_is_too_old_is_dropped_and_counted():
    buffer = RolloutBuffer(groups_per_batch=2, max_lag=1)
    for number, oldest in enumerate((3, 4, 3, 5)):
        buffer.add(finished(number, oldest))
    assert [g.number for g in buffer.take(5)] == [1, 3]
    assert buffer.dropped == [0, 2]


def test_late_groups_are_kept_if_that_is_asked_for():
    buffer = RolloutBuffer(groups_per_batch=2, max_lag=1, late=True)
    for number, oldest in enumerate((3, 4, 3, 5)):
        buffer.add(finished(number, oldest))
    assert [g.number for g in buffer.take(5)] == [0, 1] and not buffer.dropped
    assert buffer.take(6, max_lag=0) == [] and [g.number for g in buffer.last_dropped] == [2, 3]


@pytest.mark.parametrize(
    ("rollout", "warns"),
    [({}, False), ({"concurrency": 64, "max_lag": 4}, True), ({"concurrency": 32, "engines": 2, "max_lag": 4}, True),
     ({"concurrency": 64, "max_lag": 4, "late": "train"}, False),
     ({"concurrency": 64, "update": "synchronous"}, False)],
)  # fmt: skip
def test_a_configuration_that_must_drop_groups_is_told_so(rollout, warns):
    assert (must_drop(build_config({"rollout": rollout, "train": {"groups": 8}})) is not None) == warns


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_admission_lets_begin_what_can_still_be_trained_on(max_lag):
    buffer = RolloutBuffer(groups_per_batch=4, max_lag=max_lag)
    for version in range(3):
        begun = 0
        while buffer.may_start(version):
            buffer.start()
            begun += 1
        assert begun == (4 * (max_lag + 1) if version == 0 else 4)
    buffer.fail()
    assert buffer.may_start(2)


def test_a_synchronous_round_is_made_with_one_version_and_then_trained_on():
    buffer = RolloutBuffer(groups_per_batch=2, max_lag=2, synchronous=True)
    lags = []
    for done in range(6):
        while buffer.may_start(done):
            assert done % 3 == 0, "nothing is generated while a round is trained on"
            assert buffer.take(done) == [], "nor trained on before all of it is there"
            buffer.add(finished(buffer.started, done))
            buffer.start()
        lags += [done - g.oldest_version for g in buffer.take(done)]
    assert lags == [0, 0, 1, 1, 2, 2] * 2 and not buffer.dropped


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_lost_or_taken_twice_and_no_lag_exceeds_its_limit(seed, synchronous):
    chooser = random.Random(seed)
    batch, max_lag = chooser.randint(1, 4), chooser.randint(0, 3)
    buffer = RolloutBuffer(groups_per_batch=batch, max_lag=max_lag, synchronous=synchronous)
    version, number, flying, taken = 0, 0, [], []
    for _ in range(2000):
        event = chooser.random()
        if event < 0.5 and buffer.may_start(version):
            buffer.start()
            flying.append(version)
        elif event < 0.8 and flying:
            oldest = flying.pop(chooser.randrange(len(flying)))
            if chooser.random() < 0.1:
                buffer.fail()
            else:
                buffer.add(finished(number, oldest))
                number += 1
        else:
            some = buffer.take(version)
            assert all(0 <= version - g.oldest_version <= max_lag for g in some)
            taken += [g.number for g in some]
            version += bool(some)
    assert version > 20, "a buffer that starves trains nothing"
    assert len(set(taken)) == len(taken)
    assert len(taken) + len(buffer.dropped) + len(buffer) == number
    assert not set(taken) & set(buffer.dropped)
