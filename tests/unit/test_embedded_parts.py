"""The pure parts of the embedded engine: scheduler, prefixes, records, tokens, options; and tiny policies."""

import pytest
import torch
from tests.engine_kit import request

from trueup.engines.base import EngineCapabilities, RolloutFailure, require, require_sampling
from trueup.engines.embedded.cache import PrefixStore
from trueup.engines.embedded.scheduler import Group, Scheduler, Sequence
from trueup.engines.embedded.serve import options_of, read_or_make_token
from trueup.engines.embedded.wire import (
    CompletionRequest,
    capabilities_from_json,
    capabilities_to_json,
    rollout_from_json,
    rollout_to_json,
)  # fmt: skip
from trueup.engines.lives import kv_state
from trueup.engines.vllm_install import environment_folder, find_environment
from trueup.errors import ConfigError, EngineError, ModelError, RecordError, UnsupportedByEngine
from trueup.knobs import ServeConfig
from trueup.model.tiny import make_tiny
from trueup.types import CacheLife, KVState, LogprobKind, Prompt, Rollout, SamplingParams


def group(number, length, n=1, tokens=4):
    asked = request(length, n=n, tokens=tokens)
    members = [
        Sequence(group=number, sample=s, tokens=list(asked.prompt.token_ids), prompt_tokens=length,
                 sampling=asked.sampling, max_tokens=tokens)
        for s in range(n)
    ]  # fmt: skip
    return Group(id=number, request=asked, members=members, unfinished=n)


def run_step(scheduler, version=0):
    """One step without a model; returns the planned (group, count)."""
    scheduler.admit(version)
    plan = scheduler.plan()
    done = [(w.sequence.group, w.count) for w in plan]
    for work in plan:
        work.sequence.wrote(version, work.count)
        if work.sequence.left == 0:
            work.sequence.tokens.append(1)
            work.sequence.versions.append(version)
            if len(work.sequence.completion) == work.sequence.max_tokens:
                scheduler.finish(work.sequence, "length")
    return done


def test_prefill_is_chunked_and_decoding_goes_first():
    scheduler = Scheduler(slots=4, step_tokens=16)
    scheduler.add(group(0, 3))
    assert run_step(scheduler) == [(0, 3)]
    scheduler.add(group(1, 40))
    steps = [run_step(scheduler) for _ in range(3)]
    assert steps == [[(0, 1), (1, 15)], [(0, 1), (1, 15)], [(0, 1), (1, 10)]]
    assert not scheduler.groups.get(0) and scheduler.running[0].completion == [1]


def test_more_sequences_than_slots_queue_and_all_finish():
    scheduler = Scheduler(slots=3, step_tokens=64)
    groups = [group(g, 5, n=1 + g % 2) for g in range(9)]
    for g in groups:
        scheduler.add(g)
        g.prompt_ready = 0
    for _ in range(200):
        run_step(scheduler)
        assert len(scheduler.running) <= 3 and len({s.slot for s in scheduler.running}) == len(scheduler.running)
    assert not scheduler.running and not scheduler.waiting and sorted(scheduler.free) == [0, 1, 2]
    assert all(m.finish_reason == "length" for g in groups for m in g.members)


def test_of_a_group_one_member_goes_first_and_nobody_else_waits_for_it():
    scheduler = Scheduler(slots=4, step_tokens=8)
    shared, other = group(0, 20, n=3), group(1, 4)
    scheduler.add(shared)
    scheduler.add(other)
    admitted = scheduler.admit(0)
    assert [(s.group, s.sample) for s in admitted] == [(0, 0), (1, 0)]
    shared.prompt_ready = 0
    assert [(s.group, s.sample) for s in scheduler.admit(0)] == [(0, 1), (0, 2)]


def test_the_lives_of_a_cache():
    sequence = group(0, 3, tokens=10).members[0]
    for version, drawn in ((0, 2), (1, 1)):
        for _ in range(drawn):
            sequence.wrote(version, sequence.left)
            sequence.tokens.append(9)
            sequence.versions.append(version)
    assert sequence.cache_lives() == (CacheLife(first_token=0, runs=((0, 4), (1, 1))),)
    assert kv_state(sequence.versions, sequence.cache_lives()) == KVState.KEPT
    sequence.forget()
    sequence.forget()  # cleared twice before it went on: one life
    sequence.wrote(2, sequence.left)
    sequence.tokens.append(9)
    sequence.versions.append(2)
    assert [life.first_token for life in sequence.cache_lives()] == [0, 3]
    assert sequence.cache_lives()[1].runs == ((2, 6),)
    pure = (CacheLife(first_token=0, runs=((4, 7),)),)
    assert kv_state([4, 4], pure) == KVState.CLEARED and kv_state([4, 5], pure) == KVState.KEPT


def test_prefixes_belong_to_a_version_and_to_an_owner_unless_shared():
    store = PrefixStore(max_tokens=100)
    tokens = tuple(range(40))
    saved = {0: (torch.zeros(40, 1, 1), torch.zeros(40, 1, 1))}
    store.put(1, tokens, "a", saved)
    assert store.find(1, tokens, "a", shared=False)[0] == 39
    assert store.find(1, tokens, "b", shared=False)[0] == 0
    assert store.find(1, (*tokens, 7, 7), "b", shared=True)[0] == 40
    assert store.find(1, (*tokens[:10], 99, 99), "b", shared=True)[0] == 0  # too short to be worth it
    assert store.find(1, (*tokens[:20], 99, 99), "b", shared=True)[0] == 20
    assert store.find(2, tokens, "a", shared=True)[0] == 0
    assert store.find(1, tokens, "a", shared=True)[0] == 0  # gone with the version
    for owner in range(5):
        store.put(1, tokens, owner, saved)
    assert [o for o in range(5) if store.find(1, tokens, o, shared=False)[0]] == [3, 4]
    store.drop(4)
    assert store.find(1, tokens, 4, shared=False)[0] == 0


def a_rollout():
    return Rollout(
        prompt=Prompt(prompt_id="p", task="t", token_ids=(1, 2)), token_ids=(3, 4, 5),
        behaviour_logprobs=(-0.1, -0.2, -1.5), raw_logprobs=(-0.3, -0.2, -1.0), log_kept_masses=(0.0, -0.1, 0.0),
        logprob_kind=LogprobKind.PROCESSED, weight_versions=(1, 1, 2), sampling=SamplingParams(seed=8, top_p=0.9),
        finish_reason="length", engine="e", kv=KVState.KEPT,
        cache_lives=(CacheLife(first_token=0, runs=((1, 3), (2, 1))),),
    )  # fmt: skip


def test_a_rollout_survives_the_wire():
    rollout = a_rollout()
    read = rollout_from_json(rollout_to_json(rollout), rollout.prompt, SamplingParams(top_p=0.9), "e")
    assert read == rollout
    failure = RolloutFailure(prompt_id="p", reason="abort")
    assert rollout_from_json(rollout_to_json(failure), rollout.prompt, rollout.sampling, "e") == failure
    broken = rollout_to_json(rollout)
    del broken["kv"]
    with pytest.raises(EngineError, match="no complete rollout"):
        rollout_from_json(broken, rollout.prompt, rollout.sampling, "e")
    with pytest.raises(RecordError, match="entries"):
        rollout_from_json(rollout_to_json(rollout) | {"raw_logprobs": [0.0]}, rollout.prompt, rollout.sampling, "e")


def test_capabilities_survive_the_wire_and_refuse():
    own = EngineCapabilities(
        logprob_kinds=frozenset({LogprobKind.RAW}), sampling_fields=frozenset({"top_p"}), seeds=True
    )
    assert capabilities_from_json(capabilities_to_json(own)) == own
    with pytest.raises(EngineError, match="capabilities"):
        capabilities_from_json({})
    require(own, "seeds", "e")
    require_sampling(own, SamplingParams(top_p=0.5), "e")
    with pytest.raises(UnsupportedByEngine, match="updates"):
        require(own, "updates", "e")
    with pytest.raises(UnsupportedByEngine, match="top_k"):
        require_sampling(own, SamplingParams(top_k=3), "e")


def test_a_field_that_shapes_the_distribution_is_never_ignored():
    body = CompletionRequest.model_validate({"prompt": [1, 2], "logit_bias": {"5": 3.0}})
    with pytest.raises(EngineError, match="logit_bias"):
        body.sampling()
    assert CompletionRequest.model_validate({"prompt": [1, 2], "user": "me", "top_k": -1}).sampling().top_k == 0


def test_tokens_are_made_private_and_read_only_if_private(tmp_path):
    path = tmp_path / "token"
    token = read_or_make_token(path)
    assert len(token) >= 32 and path.stat().st_mode & 0o777 == 0o600
    assert read_or_make_token(path) == token and read_or_make_token(None) != read_or_make_token(None)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_or_make_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="no token"):
        read_or_make_token(path)
    with pytest.raises(ConfigError, match="does not exist"):
        options_of(ServeConfig(weights=tmp_path / "nowhere"))


def test_tiny_policies_talk_and_are_reproducible(tmp_path):
    from transformers import AutoTokenizer

    from trueup.model.load import checkpoint_digest

    first, again = make_tiny(tmp_path / "a", seed=3), make_tiny(tmp_path / "b", seed=3)
    assert checkpoint_digest(first) == checkpoint_digest(again)
    tokenizer = AutoTokenizer.from_pretrained(first)
    text = "What is 2+2?\nFour. {x}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "<bos>u:hi\na:"
    with pytest.raises(ModelError, match="not empty"):
        make_tiny(tmp_path / "a")
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        make_tiny(tmp_path / "c", family="lama")


def test_vllm_environments_are_found_only_when_finished(tmp_path):
    with pytest.raises(EngineError, match="not known to work"):
        environment_folder("0.17.0", tmp_path)
    environment_folder("0.32.0", tmp_path).mkdir()
    assert find_environment("0.32.0", tmp_path) is None
