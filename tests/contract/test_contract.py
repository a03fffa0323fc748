"""One suite for every engine: each declared capability is tried, each undeclared one is refused."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from tests.engine_kit import KINDS, behaviour, publish_perturbed, request, row_of, train_scores, trainer
from tests.server_kit import ServerProcess
from tests.vllm_kit import vllm_server

from trueup.engines.base import GenerationRequest, PauseMode, RolloutFailure
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.openai_http import OpenAIEngine
from trueup.engines.trueup_http import TrueupEngine
from trueup.engines.vllm_v1 import VllmEngine
from trueup.errors import EngineError, UnsupportedByEngine, WeightError
from trueup.model.load import load_model
from trueup.model.tiny import make_tiny
from trueup.types import SAMPLING_FIELDS, LogprobKind, Prompt, Rollout, SamplingParams
from trueup.weights.store import WeightStore

ENGINES = ("embedded", "trueup over http", "openai over http", pytest.param("vllm", marks=pytest.mark.vllm))
SLOTS = 8
ON_VLLM = {"head_dim": 32}
"""The narrowest head that vLLM's attention on a CPU takes."""


class Bench:
    """An engine with its policy and a store of other versions of it."""

    def __init__(self, name, engine, path, store):
        self.name, self.engine, self.path, self.store = name, engine, path, store
        self._next = 1

    def publish(self, scale=0.1):
        version, self._next = self._next, self._next + 1
        return publish_perturbed(self.store, self.path, version, scale=scale)

    def reference(self, version=0):
        from tests.engine_kit import load_version, tensors_by_version

        model = trainer(self.path)
        load_version(model, tensors_by_version(self.store, self.path)(version))
        return model


@pytest.fixture(scope="module", params=ENGINES)
def bench(request, tmp_path_factory, vllm_version):
    folder = tmp_path_factory.mktemp("contract")
    path = make_tiny(folder / "policy", tied=True, **(ON_VLLM if request.param == "vllm" else {}))
    store = WeightStore(folder / "weights")
    store.root.mkdir()
    if request.param == "embedded":
        engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, slots=SLOTS, weights_root=store.root))
        yield Bench(request.param, engine, path, store)
        engine.close()
        return
    if request.param == "vllm":
        knobs = {"version": vllm_version, "dtype": "float32", "slots": SLOTS, "reserved_cores": 1}
        with vllm_server(path, folder / "run", **knobs) as server:
            engine = VllmEngine.of(server, weights_root=store.root)
            yield Bench(request.param, engine, path, store)
            engine.close()
        return
    server = ServerProcess(
        path, folder, "--dtype", "float32", "--weights", str(store.root), "--set", f"serve.slots={SLOTS}"
    )
    try:
        if request.param == "trueup over http":
            engine = TrueupEngine(server.url, token=server.token)
        else:
            engine = OpenAIEngine(server.url, kind=LogprobKind.PROCESSED, token=server.token, scores=True)
        yield Bench(request.param, engine, path, store)
        engine.close()
    finally:
        server.stop()


def declared(bench, name):
    """Skip, with the reason, what the engine does not declare; a test of its own shows that it is refused."""
    if not getattr(bench.engine.capabilities, name):
        pytest.skip(f"{bench.name} does not declare {name}")


@pytest.fixture
def versioned(bench):
    """Back to the checkpoint's weights, under a number of their own, when the test is over."""
    yield bench
    if bench.engine.capabilities.updates:
        bench.engine.resume()
        snapshot = publish_perturbed(bench.store, bench.path, bench._next, scale=0.0)
        bench._next += 1
        bench.engine.update_weights(snapshot.path, clear_cache=True)


def flat(results):
    assert all(isinstance(r, Rollout) for group in results for r in group), results
    return [r for group in results for r in group]


def in_background(function):
    """Run in a thread; returns (thread, list that gets the result)."""
    box = []
    thread = threading.Thread(target=lambda: box.append(function()))
    thread.start()
    return thread, box


@contextmanager
def requests_that_keep_coming(engine):
    """More requests than fit, one after another from each of their senders until the block ends; yields what came.

    Their lengths differ, so that they do not end together.
    """
    done, rollouts = threading.Event(), []

    def send(seed):
        while not done.is_set():
            rollouts.extend(flat(engine.generate([request(9, seed=seed, tokens=300 + 40 * seed)])))

    with ThreadPoolExecutor(SLOTS + 4) as pool:
        sent = [pool.submit(send, seed) for seed in range(SLOTS + 4)]
        try:
            yield rollouts
        finally:
            done.set()
    for future in sent:
        future.result()


def wait_for(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_reports_the_logprobs_the_trainer_computes(bench, kind):
    sampling = KINDS[kind]
    for name in sampling:
        assert name in bench.engine.capabilities.sampling_fields
    rollouts = flat(bench.engine.generate([request(7 + i, seed=i, n=2, tokens=12, **sampling) for i in range(3)]))
    assert [len(r.token_ids) for r in rollouts] == [12] * 6
    assert {r.logprob_kind for r in rollouts} <= bench.engine.capabilities.logprob_kinds | {LogprobKind.RAW}
    for rollout in rollouts:
        scores = train_scores(bench.reference(), [rollout])
        assert float((scores.logprobs_T.detach() - behaviour([rollout])).abs().max()) < 1e-4
        if bench.engine.capabilities.kept_mass:
            mass = torch.tensor(rollout.log_kept_masses)
            assert float((scores.log_kept_mass_T - mass).abs().max()) < 1e-4
        if bench.engine.capabilities.raw_logprobs:
            raw = train_scores(bench.reference(), [rollout], kind=LogprobKind.RAW).logprobs_T.detach()
            assert float((raw - torch.tensor(rollout.raw_logprobs)).abs().max()) < 1e-4


def test_every_sampling_field_it_declares_is_a_field(bench):
    assert bench.engine.capabilities.sampling_fields <= set(SAMPLING_FIELDS)


def test_greedy_takes_the_most_likely_token(bench):
    rollout = flat(bench.engine.generate([request(9, tokens=10, temperature=0.0)]))[0]
    scores = train_scores(bench.reference(), [rollout], kind=LogprobKind.RAW)
    assert torch.allclose(scores.logprobs_T.detach(), scores.top_logprobs_T, atol=1e-5)


def test_ends_at_an_end_token_a_stop_string_and_the_length(bench):
    model = load_model(bench.path, dtype=torch.float32)
    eos = model.lm.config.eos_token_id
    ended = [request(6, seed=i, tokens=400, eos=True, temperature=1.5) for i in range(8)]
    rollouts = flat(bench.engine.generate(ended))
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert stopped, "no rollout of 400 hot tokens met the end token"
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == eos) == (rollout.finish_reason == "stop")
        assert eos not in rollout.token_ids[:-1]
    assert flat(bench.engine.generate([request(6, tokens=5)]))[0].finish_reason == "length"
    with_string = flat(bench.engine.generate([request(6, seed=3, tokens=400, stop=("a", "e", "o"))]))[0]
    assert with_string.finish_reason == "stop" and len(with_string.token_ids) < 400


def test_the_same_seed_gives_the_same_tokens_whoever_is_beside_it(bench):
    declared(bench, "seeds")
    alone = flat(bench.engine.generate([request(8, seed=5, n=3, tokens=20)]))
    crowd = flat(bench.engine.generate([request(8, seed=5, n=3, tokens=20), *(request(30, seed=s) for s in range(6))]))
    assert [r.token_ids for r in alone] == [r.token_ids for r in crowd[:3]]
    assert len({r.token_ids for r in alone}) == 3
    again = request(8, seed=alone[1].sampling.seed, tokens=20)
    again = GenerationRequest(prompt=alone[1].prompt, sampling=again.sampling, ignore_eos=True)
    assert flat(bench.engine.generate([again]))[0].token_ids == alone[1].token_ids


def test_scoring_equals_the_raw_logprobs(bench):
    declared(bench, "scores")
    rollouts = flat(bench.engine.generate([request(5 + 9 * i, seed=i, tokens=15, temperature=1.2) for i in range(4)]))
    scored = torch.tensor([v for s in bench.engine.score([row_of(r) for r in rollouts]) for v in s.logprobs])
    expected = torch.cat([train_scores(bench.reference(), [r], kind=LogprobKind.RAW).logprobs_T for r in rollouts])
    assert float((scored - expected.detach()).abs().max()) < 1e-4


def test_more_requests_than_fit_queue_and_all_come_back(bench):
    requests = [request(5 + i % 40, seed=i, n=1 + i % 3, tokens=3 + i % 9) for i in range(60)]
    results = bench.engine.generate(requests)
    for asked, got in zip(requests, results, strict=True):
        assert len(got) == asked.n
        assert all(r.prompt == asked.prompt and len(r.token_ids) == asked.sampling.max_tokens for r in got)


def test_impossible_requests_are_refused_in_words_and_harm_nobody(bench):
    thread, box = in_background(lambda: bench.engine.generate([request(9, n=4, tokens=200)]))
    with pytest.raises(EngineError, match=r"exceed|shorten"):
        bench.engine.generate([request(1000, tokens=100)])
    with pytest.raises(EngineError, match=r"vocabulary|token id"):
        bad = Prompt(prompt_id="bad", task="t", token_ids=(5, 2**20))
        bench.engine.generate([GenerationRequest(prompt=bad, sampling=SamplingParams(max_tokens=3))])
    thread.join(timeout=120)
    assert [len(r.token_ids) for r in box[0][0]] == [200] * 4


def test_a_generation_that_takes_too_long_ends_with_an_error(bench):
    with pytest.raises(EngineError, match="longer than allowed"):
        bench.engine.generate([request(9, n=8, tokens=900)], timeout_s=0.05)
    assert len(flat(bench.engine.generate([request(9, tokens=4)]))) == 1


def test_pause_keep_freezes_and_resume_goes_on(bench):
    declared(bench, "pause_modes")
    thread, box = in_background(lambda: bench.engine.generate([request(9, n=4, tokens=300)]))
    wait_for(lambda: bench.engine.status().running)
    bench.engine.pause(PauseMode.KEEP)
    before = bench.engine.status()
    time.sleep(0.3)
    after = bench.engine.status()
    assert before.paused and after.generated_tokens == before.generated_tokens
    assert after.running + after.waiting == 4
    bench.engine.resume()
    thread.join(timeout=120)
    assert [len(r.token_ids) for r in box[0][0]] == [300] * 4


def test_pause_wait_lets_the_running_end_and_holds_the_rest(bench):
    declared(bench, "pause_modes")
    thread, box = in_background(lambda: bench.engine.generate([request(9, seed=i, tokens=700) for i in range(12)]))
    wait_for(lambda: bench.engine.status().running == SLOTS)
    bench.engine.pause(PauseMode.WAIT)
    status = bench.engine.status()
    assert status.paused and status.running == 0 and status.waiting >= 1
    bench.engine.resume()
    thread.join(timeout=120)
    assert [len(r.token_ids) for group in box[0] for r in group] == [700] * 12


def test_pause_abort_ends_everything_and_keeps_what_was_made(bench):
    declared(bench, "pause_modes")
    thread, box = in_background(lambda: bench.engine.generate([request(9, seed=i, tokens=900) for i in range(10)]))
    # All ten have arrived: one that comes after the abort waits for resume.
    wait_for(lambda: (now := bench.engine.status()).running == SLOTS and now.waiting == 2 and now.generated_tokens)
    bench.engine.pause(PauseMode.ABORT)
    thread.join(timeout=60)
    results = [r for group in box[0] for r in group]
    assert len(results) == 10 and bench.engine.status().running == bench.engine.status().waiting == 0
    for result in results:
        if isinstance(result, RolloutFailure):
            assert result.reason == "abort"
        else:
            assert result.finish_reason == "abort" and 0 < len(result.token_ids) < 900
    bench.engine.resume()


@pytest.mark.parametrize("clear", [True, False], ids=["cleared", "kept"])
def test_an_update_moves_what_it_scores_and_stamps_what_it_makes(versioned, clear):
    declared(versioned, "updates")
    declared(versioned, "clears_cache" if clear else "keeps_cache")
    engine, snapshot = versioned.engine, versioned.publish()
    before = engine.status().version
    with requests_that_keep_coming(engine) as rollouts:
        wait_for(lambda: engine.status().running == SLOTS)
        receipt = engine.update_weights(snapshot.path, clear_cache=clear)
    assert (receipt.previous_version, receipt.version) == (before, snapshot.version)
    assert receipt.kv == ("cleared" if clear else "kept") and receipt.verified_by and receipt.paused_s >= 0
    assert engine.status().version == snapshot.version
    assert engine.status().model_digest == snapshot.manifest.digest
    if engine.capabilities.weight_versions:
        assert receipt.in_flight >= SLOTS / 2
        spanning = [r for r in rollouts if len(set(r.weight_versions)) > 1]
        assert len(spanning) >= SLOTS / 2
        for rollout in rollouts:
            stamps = list(rollout.weight_versions)
            assert set(stamps) <= {before, snapshot.version} and stamps == sorted(stamps)
            if engine.capabilities.cache_lives:
                assert (len(rollout.cache_lives) == 2) == (clear and rollout in spanning)
    fresh = flat(engine.generate([request(12, seed=1, tokens=30)]))
    expected = train_scores(versioned.reference(snapshot.version), fresh).logprobs_T.detach()
    assert float((expected - behaviour(fresh)).abs().max()) < 1e-4


def test_a_paused_engine_takes_weights_and_stays_paused(versioned):
    declared(versioned, "updates")
    engine, snapshot = versioned.engine, versioned.publish()
    engine.pause(PauseMode.KEEP)
    engine.update_weights(snapshot.path, clear_cache=True)
    assert engine.status().paused and engine.status().version == snapshot.version
    engine.resume()
    assert flat(engine.generate([request(4, tokens=3)]))[0].weight_versions == (snapshot.version,) * 3


def test_an_update_that_is_not_a_published_version_changes_nothing(versioned):
    declared(versioned, "updates")
    before = versioned.engine.status()
    with pytest.raises(WeightError):
        versioned.engine.update_weights(versioned.store.root / "v999999", clear_cache=True)
    after = versioned.engine.status()
    assert (after.version, after.model_digest) == (before.version, before.model_digest)


def test_what_is_not_declared_is_refused(bench):
    capabilities, engine = bench.engine.capabilities, bench.engine
    if not capabilities.pause_modes:
        for call in (engine.pause, engine.resume):
            with pytest.raises(UnsupportedByEngine):
                call()
    if not capabilities.updates:
        with pytest.raises(UnsupportedByEngine):
            engine.update_weights(bench.store.root / "v000001", clear_cache=True)
    if not capabilities.cache_lives:
        assert not flat(engine.generate([request(5, tokens=3)]))[0].cache_lives


def test_status_names_the_precision_it_computes_in(bench):
    status = bench.engine.status()
    if status.precision:
        assert status.precision == {"body": "float32", "head": "float32"}
    assert (status.arithmetic is not None) == bench.engine.capabilities.bitwise
