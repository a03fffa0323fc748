"""Groups to tensors and back without loss; micro-batches that lose nothing and keep to their budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trueup.errors import RecordError
from trueup.policy.packing import micro_batches, pack, unpack, with_advantages
from trueup.types import CacheLife, KVState, LogprobKind, Prompt, Rollout, RolloutGroup, SamplingParams

logprobs = st.floats(-50, 0, allow_nan=False)


@st.composite
def rollouts(draw, prompt):
    count = draw(st.integers(1, 5))

    def numbers(values):
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    return Rollout(
        prompt=prompt,
        token_ids=numbers(st.integers(0, 2**31 - 1)),
        behaviour_logprobs=numbers(logprobs),
        raw_logprobs=draw(st.none() | st.just(numbers(logprobs))),
        log_kept_masses=draw(st.none() | st.just(numbers(logprobs))),
        logprob_kind=draw(st.sampled_from(LogprobKind)),
        weight_versions=numbers(st.integers(0, 10**9)),
        sampling=SamplingParams(temperature=draw(st.floats(0.1, 2)), seed=draw(st.none() | st.integers(0, 9))),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        engine=draw(st.text(max_size=5)),
        kv=draw(st.sampled_from(KVState)),
        cache_lives=draw(st.just(()) | st.just((CacheLife(first_token=0, runs=((1, 2),)),))),
    )


@st.composite
def groups(draw):
    made = []
    for index in range(draw(st.integers(1, 3))):
        ids = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=4)))
        prompt = Prompt(prompt_id=str(index), task="t", token_ids=ids, answer=draw(st.none() | st.text(max_size=3)))
        some = tuple(draw(st.lists(rollouts(prompt), min_size=1, max_size=4)))
        rewards = tuple(draw(st.lists(st.floats(-9, 9), min_size=len(some), max_size=len(some))))
        made.append(RolloutGroup(rollouts=some, rewards=rewards))
    return made


@given(groups())
def test_a_round_trip_loses_nothing(made):
    assert unpack(pack(made)) == made


@given(groups(), st.randoms())
def test_some_rows_are_the_same_rows(made, chooser):
    batch = pack(made)
    rows = chooser.sample(range(len(batch.facts)), k=chooser.randint(1, len(batch.facts)))
    part = batch.rows(rows)
    flat = [r for g in made for r in g.rollouts]
    again = {id(r): r for r in flat}
    assert len(again) == len(flat)
    for at, row in enumerate(rows):
        assert tuple(part.tokens_T[part.token_slice(at)].tolist()) == flat[row].token_ids
        assert part.prompt_of(at) == flat[row].prompt
        assert part.facts[at].sampling == flat[row].sampling
        assert bool((part.row_T[part.token_slice(at)] == at).all())


@given(groups(), st.integers(1, 30), st.booleans(), st.randoms())
def test_micro_batches_hold_every_kept_row_once_and_keep_to_the_budget(made, budget, shared, chooser):
    batch = pack(made)
    kept = torch.tensor([chooser.random() < 0.7 for _ in batch.facts])
    batch = with_advantages(batch, batch.advantage_S, kept)
    chunks = micro_batches(batch, max_tokens=budget, shared_prompts=shared)
    assert [row for chunk in chunks for row in chunk] == kept.nonzero()[:, 0].tolist()
    for chunk in chunks:
        prompts, last = 0, None
        for row in chunk:
            if not shared or int(batch.group_S[row]) != last:
                prompts += len(batch.prompt_of(row).token_ids)
            last = int(batch.group_S[row])
        tokens = prompts + int(batch.length_S[torch.tensor(chunk)].sum())
        assert tokens <= budget or len(chunk) == 1


def test_a_batch_of_nothing_and_advantages_of_another_size():
    with pytest.raises(RecordError, match="empty batch"):
        pack([])
    prompt = Prompt(prompt_id="p", task="t", token_ids=(1,))
    rollout = Rollout(
        prompt=prompt, token_ids=(5, 6), behaviour_logprobs=(-1.0, -2.0), logprob_kind=LogprobKind.RAW,
        weight_versions=(0, 0), sampling=SamplingParams(), finish_reason="stop", engine="e",
    )  # fmt: skip
    batch = pack([RolloutGroup(rollouts=(rollout, rollout), rewards=(1.0, 0.0))])
    assert batch.kept_T.tolist() == [True] * 4 and batch.advantage_T.tolist() == [0.0] * 4
    with pytest.raises(RecordError, match="2 sequences"):
        with_advantages(batch, torch.zeros(3), torch.ones(2).bool())
    other = Prompt(prompt_id="p", task="t", token_ids=(2,))
    with pytest.raises(RecordError, match="one prompt"):
        RolloutGroup(
            rollouts=(rollout, Rollout(**{f: getattr(rollout, f) for f in rollout.__slots__} | {"prompt": other})),
            rewards=(1.0, 0.0),
        )


@pytest.mark.parametrize(("shared", "budget", "sizes"), [(True, 30, [4]), (True, 29, [3, 1]), (False, 30, [2, 2])])
def test_a_prompt_that_is_shared_counts_once_for_its_neighbours(shared, budget, sizes):
    """Four completions of five tokens and their prompt of ten."""
    prompt = Prompt(prompt_id="p", task="t", token_ids=tuple(range(10)))
    one = Rollout(
        prompt=prompt, token_ids=(1,) * 5, behaviour_logprobs=(-1.0,) * 5, logprob_kind=LogprobKind.PROCESSED,
        weight_versions=(0,) * 5, sampling=SamplingParams(), finish_reason="stop", engine="e",
    )  # fmt: skip
    batch = pack([RolloutGroup(rollouts=(one,) * 4, rewards=(0.0,) * 4)])
    assert [len(chunk) for chunk in micro_batches(batch, max_tokens=budget, shared_prompts=shared)] == sizes
