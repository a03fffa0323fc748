"""Rollout groups as packed tensors and back, without loss; and the split of a batch into micro-batches.

Shapes: T completion tokens of a batch, one sequence after another; S sequences, one group after another; G groups.
Logprobs are float64 in nats, as the engine reported them: a number that is not there (`raw_logprobs_T`,
`log_kept_masses_T`) is NaN. What a rollout holds besides numbers is in `facts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.errors import RecordError
from trueup.types import CacheLife, KVState, LogprobKind, Prompt, Rollout, RolloutGroup, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutFacts:
    """What a rollout holds besides its per-token numbers."""

    logprob_kind: LogprobKind
    sampling: SamplingParams
    finish_reason: str
    engine: str
    kv: KVState
    cache_lives: tuple[CacheLife, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """The groups of one optimiser step.

    `tokens_T` (long), `behaviour_logprobs_T`, `version_T` (long) and `row_T` (long: number of the sequence) describe
    completion tokens; `group_S` (long) and `reward_S` sequences; `prompts` has one entry a group. `advantage_S` is
    what each sequence is worth, and `kept_S` (bool) whether it takes part in the loss at all.
    """

    tokens_T: Tensor
    row_T: Tensor
    version_T: Tensor
    behaviour_logprobs_T: Tensor
    raw_logprobs_T: Tensor
    log_kept_masses_T: Tensor
    group_S: Tensor
    length_S: Tensor
    reward_S: Tensor
    advantage_S: Tensor
    kept_S: Tensor
    prompts: tuple[Prompt, ...]
    facts: tuple[RolloutFacts, ...]

    @property
    def advantage_T(self) -> Tensor:
        """Advantage of each token's sequence, [T] float64."""
        return self.advantage_S[self.row_T]

    @property
    def kept_T(self) -> Tensor:
        """Whether each token's sequence takes part, [T] bool."""
        return self.kept_S[self.row_T]

    def prompt_of(self, row: int) -> Prompt:
        """The prompt of a sequence."""
        return self.prompts[int(self.group_S[row])]

    def token_slice(self, row: int) -> slice:
        """Where a sequence's tokens lie."""
        end = int(self.length_S[: row + 1].sum())
        return slice(end - int(self.length_S[row]), end)

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Where the tokens of some sequences lie, in the order given, long."""
        spans = [self.token_slice(row) for row in rows]
        return torch.cat([torch.arange(s.start, s.stop) for s in spans])

    def rows(self, rows: Sequence[int]) -> TrainingBatch:
        """Some sequences as a batch of their own, in the order given; sequences and groups are numbered anew."""
        at_T = self.tokens_of(rows)
        at_S = torch.tensor(list(rows))
        groups = list(dict.fromkeys(self.group_S[at_S].tolist()))
        return replace(
            self,
            **{name: getattr(self, name)[at_T] for name in _TOKEN_FIELDS},
            **{name: getattr(self, name)[at_S] for name in _SEQUENCE_FIELDS},
            row_T=torch.arange(len(rows)).repeat_interleave(self.length_S[at_S]),
            group_S=torch.tensor([groups.index(g) for g in self.group_S[at_S].tolist()]),
            prompts=tuple(self.prompts[g] for g in groups),
            facts=tuple(self.facts[row] for row in rows),
        )


_TOKEN_FIELDS = ("tokens_T", "version_T", "behaviour_logprobs_T", "raw_logprobs_T", "log_kept_masses_T")
_SEQUENCE_FIELDS = ("length_S", "reward_S", "advantage_S", "kept_S")


def pack(groups: Sequence[RolloutGroup]) -> TrainingBatch:
    """Pack groups, with advantages 0 and every sequence kept; `with_advantages` sets both.

    Raises RecordError for no groups at all.
    """
    if not groups:
        raise RecordError("an empty batch: no rollout group to train on")
    rollouts = [r for group in groups for r in group.rollouts]
    lengths = [len(r.token_ids) for r in rollouts]

    def numbers(name: str) -> Tensor:
        values: list[float] = []
        for r in rollouts:
            own = getattr(r, name)
            values += [math.nan] * len(r.token_ids) if own is None else own
        return torch.tensor(values, dtype=torch.float64)

    sequences = len(rollouts)
    length_S = torch.tensor(lengths)
    return TrainingBatch(
        tokens_T=torch.tensor([i for r in rollouts for i in r.token_ids]),
        row_T=torch.arange(sequences).repeat_interleave(length_S),
        version_T=torch.tensor([v for r in rollouts for v in r.weight_versions]),
        behaviour_logprobs_T=numbers("behaviour_logprobs"),
        raw_logprobs_T=numbers("raw_logprobs"),
        log_kept_masses_T=numbers("log_kept_masses"),
        group_S=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.rollouts) for g in groups])),
        length_S=length_S,
        reward_S=torch.tensor([r for g in groups for r in g.rewards], dtype=torch.float64),
        advantage_S=torch.zeros(sequences, dtype=torch.float64),
        kept_S=torch.ones(sequences, dtype=torch.bool),
        prompts=tuple(g.rollouts[0].prompt for g in groups),
        facts=tuple(
            RolloutFacts(
                logprob_kind=r.logprob_kind,
                sampling=r.sampling,
                finish_reason=r.finish_reason,
                engine=r.engine,
                kv=r.kv,
                cache_lives=r.cache_lives,
            )
            for r in rollouts
        ),
    )


def with_advantages(batch: TrainingBatch, advantage_S: Tensor, kept_S: Tensor) -> TrainingBatch:
    """The batch with its advantages [S] and who takes part [S] (bool). Raises RecordError for other sizes."""
    for name, values in (("advantages", advantage_S), ("filters", kept_S)):
        if values.shape != batch.reward_S.shape:
            raise RecordError(f"{name} have shape {tuple(values.shape)} for {len(batch.reward_S)} sequences")
    return replace(batch, advantage_S=advantage_S.double(), kept_S=kept_S.bool())


def unpack(batch: TrainingBatch) -> list[RolloutGroup]:
    """The groups that were packed, equal in every field."""
    rollouts: list[list[Rollout]] = [[] for _ in batch.prompts]
    rewards: list[list[float]] = [[] for _ in batch.prompts]
    for row, facts in enumerate(batch.facts):
        at, group = batch.token_slice(row), int(batch.group_S[row])
        rollouts[group].append(
            Rollout(
                prompt=batch.prompts[group],
                token_ids=tuple(batch.tokens_T[at].tolist()),
                behaviour_logprobs=tuple(batch.behaviour_logprobs_T[at].tolist()),
                raw_logprobs=_or_none(batch.raw_logprobs_T[at]),
                log_kept_masses=_or_none(batch.log_kept_masses_T[at]),
                weight_versions=tuple(batch.version_T[at].tolist()),
                logprob_kind=facts.logprob_kind,
                sampling=facts.sampling,
                finish_reason=facts.finish_reason,
                engine=facts.engine,
                kv=facts.kv,
                cache_lives=facts.cache_lives,
            )
        )
        rewards[group].append(float(batch.reward_S[row]))
    return [RolloutGroup(rollouts=tuple(some), rewards=tuple(own)) for some, own in zip(rollouts, rewards, strict=True)]


def _or_none(values_T: Tensor) -> tuple[float, ...] | None:
    return None if bool(values_T.isnan().any()) else tuple(values_T.tolist())


def micro_batches(
    batch: TrainingBatch, *, rows: Sequence[int] | None = None, max_tokens: int, shared_prompts: bool
) -> list[list[int]]:
    """Sequences to run together (of `rows`, or all that take part): each list at most `max_tokens` tokens where a
    single sequence allows it.

    A prompt counts once for neighbouring completions of its group if `shared_prompts`, else once for each. Order is
    kept, so that a group stays together as far as the budget goes.
    """
    chunks: list[list[int]] = []
    used, last_group = 0, -1
    for row in batch.kept_S.nonzero()[:, 0].tolist() if rows is None else rows:
        group, prompt = int(batch.group_S[row]), len(batch.prompt_of(row).token_ids)
        own = int(batch.length_S[row])
        cost = own + (0 if shared_prompts and group == last_group else prompt)
        if not chunks or used + cost > max_tokens:
            chunks.append([])
            used, cost = 0, own + prompt
        chunks[-1].append(row)
        used, last_group = used + cost, group
    return chunks
