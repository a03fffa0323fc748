"""Bitwise mode: what the engine reported and what the training forward computes are equal to the last bit."""

import random
import threading
import time

import pytest
import torch
from tests.engine_kit import (
    KINDS,
    behaviour,
    load_version,
    publish_perturbed,
    request,
    tensors_by_version,
    train_scores,
    train_scores_and_draws,
    trainer,
)  # fmt: skip

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.embedded.replay import Replayer
from trueup.errors import ModelError
from trueup.model.bitwise import arithmetic, require_same_arithmetic
from trueup.model.tiny import FAMILIES, make_tiny
from trueup.types import KVState
from trueup.weights.store import WeightStore

BOTH = [torch.float32, torch.bfloat16]


def options(dtype, **others):
    return EngineOptions(**{"dtype": dtype, "bitwise": True, "slots": 8, "step_tokens": 48} | others)


def arrive_at_random(engine, requests, seed):
    """Submit requests from several threads at random moments; their rollouts, in the order of the requests."""
    chooser = random.Random(seed)
    delays = [chooser.random() * 0.3 for _ in requests]
    results = [None] * len(requests)

    def run(index):
        time.sleep(delays[index])
        results[index] = engine.generate([requests[index]], timeout_s=300)[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    return results


def assert_exact(model, rollouts, version=None, head_dtype=torch.float32):
    """Every r of a version's tokens is exactly 0.0, and the trainer's logits with the same noise draw the very tokens.

    Returns how many tokens those were.
    """
    version_T = torch.tensor([v for r in rollouts for v in r.weight_versions])
    at_T = torch.ones_like(version_T, dtype=torch.bool) if version is None else version_T == version
    if not at_T.any():
        return 0
    scores, drawn_T = train_scores_and_draws(model, rollouts, head_dtype=head_dtype)
    assert scores.logprobs_T.requires_grad
    assert torch.equal(scores.logprobs_T.detach()[at_T], behaviour(rollouts)[at_T])
    assert torch.equal(drawn_T[at_T], torch.tensor([i for r in rollouts for i in r.token_ids])[at_T])
    return int(at_T.sum())


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_every_sampling_kind_random_arrivals_groups_and_chunks(tmp_path, dtype):
    path = make_tiny(tmp_path / "tiny", tied=True, dtype=dtype)
    requests = [request(5 + 13 * i, seed=i, n=3 if i % 3 == 0 else 1, tokens=40, **kind)
                for i, kind in enumerate(KINDS.values())]  # fmt: skip
    requests += [request(150, seed=99, n=6, tokens=60)]  # a shared prompt, several chunks long
    engine = EmbeddedEngine(path, options(dtype))
    try:
        results = arrive_at_random(engine, requests, seed=1)
        status = engine.status()
    finally:
        engine.close()
    model = trainer(path, dtype=dtype, bitwise=True)
    assert sum(assert_exact(model, group) for group in results) >= 800
    assert status.details["prefix_hit_tokens"] >= 5 * 149  # the group's prompt was computed once
    require_same_arithmetic(arithmetic(), status.arithmetic)


def test_a_bf16_head_on_both_sides(tmp_path):
    path = make_tiny(tmp_path / "tiny", tied=True, dtype=torch.bfloat16)
    engine = EmbeddedEngine(path, options(torch.bfloat16, head_dtype=torch.bfloat16))
    try:
        group = engine.generate([request(30, seed=1, n=4, tokens=40)])[0]
        assert engine.status().precision == {"body": "bfloat16", "head": "bfloat16"}
    finally:
        engine.close()
    model = trainer(path, dtype=torch.bfloat16, bitwise=True)
    assert assert_exact(model, group, head_dtype=torch.bfloat16) == 160
    other = train_scores(model, group).logprobs_T.detach()
    assert float((other - behaviour(group)).abs().max()) > 1e-3  # an fp32 head is another arithmetic


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, family):
    path = make_tiny(tmp_path / family, family=family)
    engine = EmbeddedEngine(path, options(torch.float32))
    try:
        results = engine.generate([request(30, seed=i, n=2, tokens=30, temperature=0.9, top_p=0.9) for i in range(4)])
    finally:
        engine.close()
    model = trainer(path, bitwise=True)
    for group in results:
        assert_exact(model, group)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("clear", [True, False], ids=["cleared", "kept"])
def test_three_updates_in_flight(tmp_path, dtype, clear):
    path = make_tiny(tmp_path / "tiny", dtype=dtype)
    store = WeightStore(tmp_path / "weights")
    versions = [publish_perturbed(store, path, v, scale=0.1, dtype=dtype) for v in (1, 2, 3)]
    engine = EmbeddedEngine(path, options(dtype))
    rollouts = []
    try:
        work = threading.Thread(target=lambda: rollouts.extend(
            r for group in engine.generate([request(20 + i, seed=i, n=4, tokens=120) for i in range(5)]) for r in group
        ))  # fmt: skip
        work.start()
        for snapshot in versions:
            made = engine.status().generated_tokens
            while engine.status().generated_tokens < made + 400:
                assert work.is_alive(), "everything was generated before the last update"
                time.sleep(0.002)
            engine.update_weights(snapshot.path, clear_cache=clear)
        work.join(timeout=300)
    finally:
        engine.close()
    assert sum(len(r.token_ids) for r in rollouts) == 20 * 120 >= 2000
    assert {v for r in rollouts for v in r.weight_versions} == {0, 1, 2, 3}
    tensors_of = tensors_by_version(store, path, dtype=dtype)
    if clear:
        assert all(r.kv == KVState.CLEARED for r in rollouts)
        model = trainer(path, dtype=dtype, bitwise=True)
        total = 0
        for version in range(4):
            load_version(model, tensors_of(version))
            total += assert_exact(model, rollouts, version)
        assert total == sum(len(r.token_ids) for r in rollouts)
    replayer = Replayer(trainer(path, dtype=dtype, bitwise=True, grad=False), tensors_of, head_dtype=torch.float32)
    for rollout in rollouts:
        again = replayer.replay(rollout)
        assert torch.equal(again.logprobs_T, torch.tensor(rollout.behaviour_logprobs))
        assert torch.equal(again.raw_logprobs_T, torch.tensor(rollout.raw_logprobs))
        assert again.drawn_ids_T.tolist() == list(rollout.token_ids)
    if not clear:
        assert any(r.kv == KVState.KEPT for r in rollouts)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.smollm2
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_smollm2_over_two_thousand_tokens(smollm2, tmp_path, dtype):
    store = WeightStore(tmp_path / "weights")
    versions = [publish_perturbed(store, smollm2, v, scale=0.02, dtype=dtype) for v in (1, 2, 3)]
    engine = EmbeddedEngine(smollm2, options(dtype, slots=24, step_tokens=64))
    alone = [request(12 + 5 * i, seed=i, tokens=64) for i in range(20)]
    shared = [request(90, seed=50, n=16, tokens=64)]  # longer than a step: in chunks
    results = []
    try:
        work = threading.Thread(target=lambda: results.extend(arrive_at_random(engine, shared + alone, seed=2)))
        work.start()
        for snapshot in versions:
            made = engine.status().generated_tokens
            while engine.status().generated_tokens < made + 400:
                assert work.is_alive(), "everything was generated before the last update"
                time.sleep(0.01)
            engine.update_weights(snapshot.path, clear_cache=True)
        work.join(timeout=500)
    finally:
        engine.close()
    tensors_of = tensors_by_version(store, smollm2, dtype=dtype)
    model = trainer(smollm2, dtype=dtype, bitwise=True)
    rollouts = [r for group in results for r in group]
    total = [0, 0, 0, 0]
    for version in range(4):
        load_version(model, tensors_of(version))
        for some in (rollouts[:16], rollouts[16:]):
            total[version] += assert_exact(model, some, version)
    assert all(total) and sum(total) == 36 * 64 >= 2000


def test_the_plain_mode_is_not_bitwise_so_the_test_can_tell(tmp_path):
    path = make_tiny(tmp_path / "tiny")
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32))
    try:
        rollouts = [r for g in engine.generate([request(20, seed=i, tokens=60) for i in range(6)]) for r in g]
    finally:
        engine.close()
    gap = train_scores(trainer(path), rollouts).logprobs_T.detach() - behaviour(rollouts)
    assert 0 < float(gap.abs().max()) < 1e-4


def test_the_handshake_names_what_differs():
    own = arithmetic()
    require_same_arithmetic(own, dict(own))
    with pytest.raises(ModelError, match="threads"):
        require_same_arithmetic(own, own | {"threads": 64})
    with pytest.raises(ModelError, match="--bitwise"):
        require_same_arithmetic(own, None)


def test_a_thread_count_that_splits_vectors_is_refused(tmp_path):
    path = make_tiny(tmp_path / "tiny")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ModelError, match="1, 2, 4 or 8 threads"):
            trainer(path, bitwise=True)
    finally:
        torch.set_num_threads(before)
