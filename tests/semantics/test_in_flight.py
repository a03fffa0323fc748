"""Updates while requests run: nothing lost, every stamp true, every tensor group really moved."""

import statistics
import threading
import time

import pytest
import torch
from tests.engine_kit import (
    behaviour,
    load_version,
    publish_perturbed,
    request,
    row_of,
    tensors_by_version,
    train_scores,
    trainer,
)  # fmt: skip

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.embedded.replay import Replayer
from trueup.model.tiny import FAMILIES, make_tiny
from trueup.types import LogprobKind, Rollout
from trueup.weights.store import WeightStore

GROUPS = {
    "embedding and tied head": r"embed_tokens",
    "query": r"q_proj",
    "key": r"k_proj",
    "value": r"v_proj",
    "output": r"o_proj",
    "gate": r"gate_proj",
    "up": r"up_proj",
    "down": r"down_proj",
    "layer norms": r"layernorm",
    "final norm": r"model\.norm",
}


def run_with_updates(engine, store, versions, requests, *, clear):
    """All rollouts of the requests, with the updates spread evenly over the tokens they make."""
    total = sum(r.n * r.sampling.max_tokens for r in requests)
    made_before = engine.status().generated_tokens
    box = []
    work = threading.Thread(target=lambda: box.append(engine.generate(requests, timeout_s=500)))
    work.start()
    receipts = []
    for index, version in enumerate(versions):
        while engine.status().generated_tokens - made_before < total * (index + 1) / (len(versions) + 2):
            assert work.is_alive(), "everything was generated before the last update"
            time.sleep(0.001)
        receipts.append(engine.update_weights(store.folder(version), clear_cache=clear))
    work.join(timeout=500)
    return box[0], receipts


def assert_only_the_stamp_fits(model, rollouts, tensors_of):
    """Plain scoring under the stamped version gives each token's logprob, and no other version comes as near."""
    reported = behaviour(rollouts)
    version_T = torch.tensor([v for r in rollouts for v in r.weight_versions])
    pure = torch.empty_like(reported)
    best = torch.full_like(reported, torch.inf)
    winner_T = torch.zeros_like(version_T)
    for version in range(21):
        load_version(model, tensors_of(version))
        scores = train_scores(model, rollouts).logprobs_T
        pure[version_T == version] = scores[version_T == version]
        gap = (scores - reported).abs()
        winner_T[gap < best], best = version, torch.minimum(gap, best)
    assert float((pure - reported).abs().max()) < 1e-4
    assert float((winner_T == version_T).float().mean()) > 0.999


@pytest.mark.parametrize("clear", [True, False], ids=["cleared", "kept"])
def test_sixty_four_requests_and_twenty_updates(tmp_path, clear):
    path = make_tiny(tmp_path / "tiny", tied=True)
    store = WeightStore(tmp_path / "weights")
    versions = list(range(1, 21))
    for version in versions:
        publish_perturbed(store, path, version, scale=0.08)
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=64))
    requests = [request(8 + i % 50, seed=i, tokens=60 + i) for i in range(64)]
    try:
        results, receipts = run_with_updates(engine, store, versions, requests, clear=clear)
    finally:
        engine.close()
    assert [r.version for r in receipts] == versions
    rollouts = [r for group in results for r in group]
    assert len(rollouts) == 64 and all(isinstance(r, Rollout) for r in rollouts)
    for asked, rollout in zip(requests, rollouts, strict=True):  # nothing lost, nothing duplicated
        assert rollout.prompt == asked.prompt and len(rollout.token_ids) == asked.sampling.max_tokens
        assert list(rollout.weight_versions) == sorted(rollout.weight_versions)
    assert {v for r in rollouts for v in r.weight_versions} == {0, *versions}
    tensors_of = tensors_by_version(store, path)
    model = trainer(path, grad=False)
    replayer = Replayer(model, tensors_of, head_dtype=torch.float32, keep_versions=32)
    for rollout in rollouts:
        gap = (replayer.replay(rollout).logprobs_T - behaviour([rollout])).abs().max()
        assert float(gap) < 1e-4
    if clear:
        assert_only_the_stamp_fits(model, rollouts[::4], tensors_of)
    print("median pause, ms:", 1e3 * statistics.median(r.paused_s for r in receipts))


def assert_perturbation_is_followed(path, store, version, pattern, *, dtype=torch.float32):
    """Update with one group moved: the engine's change of score equals the trainer's, and it is visible."""
    publish_perturbed(store, path, version, scale=0.3, only=pattern, dtype=dtype)
    engine = EmbeddedEngine(path, EngineOptions(dtype=dtype))
    try:
        rollouts = [r for g in engine.generate([request(15, seed=i, tokens=25) for i in range(3)]) for r in g]
        rows = [row_of(r) for r in rollouts]
        before = torch.tensor([v for s in engine.score(rows) for v in s.logprobs])
        engine.update_weights(store.folder(version), clear_cache=True)
        after = torch.tensor([v for s in engine.score(rows) for v in s.logprobs])
    finally:
        engine.close()
    model = trainer(path, dtype=dtype, grad=False)
    old = train_scores(model, rollouts, kind=LogprobKind.RAW).logprobs_T
    load_version(model, tensors_by_version(store, path, dtype=dtype)(version))
    new = train_scores(model, rollouts, kind=LogprobKind.RAW).logprobs_T
    assert float((new - old).abs().max()) > 1e-3
    assert float(((after - before) - (new - old)).abs().max()) < 2e-4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("group", [*GROUPS, "head"])
def test_every_tensor_group_follows_an_update(tmp_path, group, tied):
    if group == "head" and tied:
        group = "embedding and tied head"
    path = make_tiny(tmp_path / "tiny", tied=tied)
    assert_perturbation_is_followed(path, WeightStore(tmp_path / "w"), 1, GROUPS.get(group, r"lm_head"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_an_update(tmp_path, family):
    path = make_tiny(tmp_path / family, family=family, tied=True)
    assert_perturbation_is_followed(path, WeightStore(tmp_path / "w"), 1, "")


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("group", GROUPS)
def test_every_tensor_group_of_smollm2_follows_an_update(smollm2, tmp_path, group):
    assert_perturbation_is_followed(smollm2, WeightStore(tmp_path / "w"), 1, GROUPS[group])


def test_a_prefix_of_old_weights_is_never_reused(tmp_path):
    """Asked before and after an update, the same prompt is computed anew; asked twice after it, it is not."""
    path = make_tiny(tmp_path / "tiny")
    store = WeightStore(tmp_path / "weights")
    snapshot = publish_perturbed(store, path, 1, scale=0.1)
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32))
    hits = lambda: engine.status().details["prefix_hit_tokens"]  # noqa: E731
    try:
        engine.generate([request(100, tokens=4)])
        assert hits() == 0
        engine.generate([request(100, tokens=4)])
        assert hits() == 99
        engine.update_weights(snapshot.path, clear_cache=False)
        after = engine.generate([request(100, tokens=20)])[0]
        assert hits() == 99
        engine.generate([request(100, tokens=4)])
        assert hits() == 198
    finally:
        engine.close()
    model = trainer(path)
    load_version(model, tensors_by_version(store, path)(1))
    assert float((train_scores(model, after).logprobs_T.detach() - behaviour(after)).abs().max()) < 1e-4
