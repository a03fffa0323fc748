"""What must never stop the engine, lose a request or leave somebody waiting."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.engine_kit import (
    behaviour,
    load_version,
    publish_perturbed,
    request,
    tensors_by_version,
    train_scores,
    trainer,
)
from tests.semantics.test_failed_updates import rewrite

from trueup.engines.base import PauseMode, RolloutFailure
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.errors import EngineError, ModelError, WeightError
from trueup.model.load import load_model
from trueup.model.packed import open_policy
from trueup.model.scoring import ScoredRow
from trueup.model.tiny import make_tiny
from trueup.types import Rollout
from trueup.weights.store import WeightStore


@pytest.fixture
def path(tmp_path):
    return make_tiny(tmp_path / "tiny", tied=False)


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "weights")


@pytest.fixture
def engine(path):
    running = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=4))
    yield running
    running.close()


def hold_up(engine, seconds):
    """Make the engine's next step last that long."""
    step = engine._loop.runner.forward

    def slow(spans, ids):
        engine._loop.runner.forward = step
        time.sleep(seconds)
        return step(spans, ids)

    engine._loop.runner.forward = slow


def test_an_update_that_was_given_up_never_happens(engine, path, store):
    """Its caller was told that it failed: the swap must not come later, nor its number be taken."""
    first = publish_perturbed(store, path, 1)
    other = publish_perturbed(WeightStore(store.root / "other"), path, 1, scale=0.3)
    engine.generate([request(5, tokens=2)])
    hold_up(engine, 1.5)
    work = threading.Thread(target=lambda: engine.generate([request(9, tokens=200)]))
    work.start()
    time.sleep(0.2)
    with pytest.raises(EngineError, match="longer than allowed"):
        engine.update_weights(first.path, clear_cache=False, timeout_s=0.6)
    work.join(timeout=60)
    assert engine.status().version == 0 and engine.status().model_digest is not None
    assert engine.update_weights(other.path, clear_cache=False).version == 1
    with pytest.raises(WeightError, match="served before"):
        engine.update_weights(first.path, clear_cache=False)


def test_whoever_waits_when_the_engine_closes_or_fails_is_answered(path):
    for fails in (False, True):
        engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=2))
        hold_up(engine, 0.5)
        _, running = engine.submit(request(9, tokens=900))
        time.sleep(0.1)
        _, queued = engine.submit(request(9, n=3, tokens=5))
        if fails:
            engine._worker.post(lambda: 1 / 0)
        else:
            engine.close()
        results = running.result(timeout=10) + queued.result(timeout=10)
        for result in results:
            reason = result.finish_reason if isinstance(result, Rollout) else result.reason
            assert ("error: the engine stopped" in reason) if fails else (reason == "abort")
        with pytest.raises(EngineError, match="stopped" if fails else "closed"):
            engine.generate([request(5)])
        engine.close()


def test_bad_ids_empty_rows_and_failing_listeners_end_only_themselves(engine):
    for prompt_ids, completion_ids in (((5, -1), (6,)), ((), (6,)), ((5,), ()), ((5,), (2**40,))):
        with pytest.raises(EngineError):
            engine.score([ScoredRow(prompt_ids=prompt_ids, completion_ids=completion_ids)])
    _, deaf = engine.submit(request(5, tokens=50), on_token=lambda sequence: 1 / 0)
    _, well = engine.submit(request(6, tokens=50))
    assert deaf.result(timeout=30)[0].finish_reason == "abort"
    assert len(well.result(timeout=30)[0].token_ids) == 50


def test_a_batch_with_one_impossible_request_starts_none(engine):
    before = engine.status().generated_tokens
    with pytest.raises(EngineError, match="exceed"):
        engine.generate([request(5, tokens=100), request(5, tokens=5000)])
    time.sleep(0.3)
    assert engine.status().generated_tokens == before and engine.status().running == 0


@pytest.mark.parametrize("bitwise", [False, True])
def test_nan_left_by_bad_weights_never_reaches_later_requests(path, store, bitwise):
    """Weights that overflow fill slots with NaN; under good weights the same slots serve as if nothing had been."""
    bad = publish_perturbed(store, path, 1, scale=0.0)
    tensors = load_file(bad.path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(bad.path, tensors | {name: tensors[name] * 1e38}, 1)
    good = publish_perturbed(store, path, 2, scale=0.05)
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=4, bitwise=bitwise))
    try:
        engine.update_weights(bad.path, clear_cache=True)
        assert all(isinstance(r, RolloutFailure) for r in engine.generate([request(60, n=4, tokens=30)])[0])
        engine.update_weights(good.path, clear_cache=True)
        results = engine.generate([request(5 + 12 * i, seed=i, tokens=40) for i in range(8)])
    finally:
        engine.close()
    rollouts = [r for group in results for r in group]
    assert all(isinstance(r, Rollout) for r in rollouts)
    model = trainer(path, bitwise=bitwise)
    load_version(model, tensors_by_version(store, path)(2))
    gap = (train_scores(model, rollouts).logprobs_T.detach() - behaviour(rollouts)).abs().max()
    assert float(gap) <= (0.0 if bitwise else 1e-4)


def test_pause_wait_lets_whole_groups_end_so_that_none_spans_an_update(engine, path, store):
    snapshot = publish_perturbed(store, path, 1)
    _, group = engine.submit(request(40, n=10, tokens=60))  # more members than slots
    while engine.status().running < 4:
        time.sleep(0.001)
    pause = threading.Thread(target=lambda: engine.pause(PauseMode.WAIT, timeout_s=60))
    pause.start()
    while engine._loop.scheduler.admitting:
        time.sleep(0.001)
    _, later = engine.submit(request(7, seed=1, tokens=10))
    pause.join(timeout=60)
    assert engine.status().paused and group.done() and not later.done()
    engine.update_weights(snapshot.path, clear_cache=False)
    engine.resume()
    assert {v for r in group.result() for v in r.weight_versions} == {0}
    assert set(later.result(timeout=30)[0].weight_versions) == {1}


def test_a_pause_that_was_given_up_does_not_stop_the_engine_later(engine):
    _, long = engine.submit(request(9, tokens=400))
    while not engine.status().running:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="longer than allowed"):
        engine.pause(PauseMode.WAIT, timeout_s=0.01)
    assert len(engine.generate([request(5, tokens=5)], timeout_s=30)[0][0].token_ids) == 5
    assert len(long.result(timeout=30)[0].token_ids) == 400
    assert not engine.status().paused


def test_no_limit_means_the_engines_own(engine):
    rollout = engine.generate([request(900, tokens=None)])[0][0]
    assert len(rollout.token_ids) == 124 and rollout.finish_reason == "length"


def test_state_that_flows_past_attention_is_refused(tmp_path):
    """A layer that looks at its left neighbour, as a short convolution does, would leak between packed requests."""
    model = load_model(make_tiny(tmp_path / "leaky"), dtype=torch.float32)
    mlp = model.body.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(x) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    with pytest.raises(ModelError, match="packed"):
        open_policy(model, bitwise=False)
