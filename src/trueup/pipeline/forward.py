"""From rows of a batch to logprobs and entropies of their tokens, by the one code path, in the trainer's arithmetic.

Shapes: T completion tokens of the rows, D hidden width. Logprobs are float32, in nats, of the distribution that each
token was drawn from.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.errors import TrainingError
from trueup.model.load import LoadedModel
from trueup.model.packed import packed_hidden_states
from trueup.model.scoring import ScoredRow, check_fits
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores
from trueup.policy.packing import TrainingBatch, micro_batches
from trueup.policy.processing import Distribution, History
from trueup.types import LogprobKind


class Phases:
    """Seconds by phase; a phase inside another counts for itself only once, in the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] += taken - self._inner
            self._inner = outer + taken


@dataclass(frozen=True, kw_only=True)
class Scored:
    """`logprobs_T` and `entropy_T` differentiable where the forward pass was; `inside_T` (bool) is False where the
    token lies outside the trainer's own kept set: its logprob there stands in for -inf and must not be used."""

    logprobs_T: Tensor
    entropy_T: Tensor
    inside_T: Tensor


def distributions(batch: TrainingBatch) -> list[Distribution]:
    """The distribution each row was drawn from.

    Raises TrainingError for rows whose behaviour logprobs are of another one, or that were not sampled at all.
    """
    found = []
    for row, facts in enumerate(batch.facts):
        if facts.sampling.temperature == 0:
            raise TrainingError(f"row {row} was decoded greedily: a policy gradient needs sampled tokens")
        drawn = Distribution.of(LogprobKind.PROCESSED, facts.sampling)
        if Distribution.of(facts.logprob_kind, facts.sampling) != drawn:
            raise TrainingError(
                f"row {row} was sampled at {facts.sampling.label()} but {facts.engine} reported {facts.logprob_kind} "
                "logprobs: they are not of the behaviour policy. Let it report processed ones (vLLM: --logprobs-mode "
                "processed_logprobs)"
            )
        found.append(drawn)
    return found


def rows_of(batch: TrainingBatch) -> list[ScoredRow]:
    """The batch's rows as token ids."""
    return [
        ScoredRow(
            prompt_ids=batch.prompt_of(row).token_ids,
            completion_ids=tuple(batch.tokens_T[batch.token_slice(row)].tolist()),
        )
        for row in range(len(batch.facts))
    ]


def check_batch(model: LoadedModel, batch: TrainingBatch) -> None:
    """Raise before any work when rows do not fit the model (ModelError) or are not of its policy (TrainingError)."""
    check_fits(model, rows_of(batch))
    distributions(batch)


def score(
    model: LoadedModel, head_dtype: torch.dtype, batch: TrainingBatch, *, share_prompts: bool, phases: Phases
) -> Scored:
    """Score every token of the rows, differentiable unless gradients are off."""
    with phases.measure("body"):
        hidden_TD = packed_hidden_states(model, rows_of(batch), share_prompts=share_prompts)
    with phases.measure("head"):
        return _score_states(hidden_TD, Head.of(model, head_dtype), batch)


@torch.no_grad()
def score_all(
    model: LoadedModel, head_dtype: torch.dtype, batch: TrainingBatch, *, share_prompts: bool, micro_tokens: int,
    phases: Phases,
) -> Scored:  # fmt: skip
    """Score every token of a batch of any size, without gradient, `micro_tokens` at a time."""
    size = len(batch.tokens_T)
    logprobs_T, entropy_T = batch.behaviour_logprobs_T.float(), torch.zeros(size)
    inside_T = torch.ones(size, dtype=torch.bool)
    for rows in micro_batches(batch, rows=None, max_tokens=micro_tokens, shared_prompts=share_prompts):
        found = score(model, head_dtype, batch.rows(rows), share_prompts=share_prompts, phases=phases)
        token_T = batch.tokens_of(rows)
        logprobs_T[token_T], entropy_T[token_T] = found.logprobs_T, found.entropy_T
        inside_T[token_T] = found.inside_T
    return Scored(logprobs_T=logprobs_T, entropy_T=entropy_T, inside_T=inside_T)


def _score_states(hidden_TD: Tensor, head: Head, batch: TrainingBatch) -> Scored:
    drawn_from = distributions(batch)
    device = hidden_TD.device
    prompts = tuple(torch.tensor(batch.prompt_of(r).token_ids, device=device) for r in range(len(batch.facts)))
    logprobs_T, entropy_T = hidden_TD.new_zeros(2, len(hidden_TD), dtype=torch.float32)
    for dist in dict.fromkeys(drawn_from):
        rows = [row for row, own in enumerate(drawn_from) if own == dist]
        part = batch if len(rows) == len(drawn_from) else batch.rows(rows)
        at_T = torch.isin(batch.row_T, torch.tensor(rows)).nonzero()[:, 0].to(device)
        history = History(row_T=part.row_T.to(device), prompts=tuple(prompts[row] for row in rows))
        states_TD = hidden_TD if part is batch else hidden_TD.index_select(0, at_T)
        found = token_scores(states_TD, head, part.tokens_T.to(device), dist=dist, history=history)
        if part is batch:
            logprobs_T, entropy_T = found.logprobs_T, found.entropy_T
        else:
            logprobs_T = logprobs_T.index_copy(0, at_T, found.logprobs_T)
            entropy_T = entropy_T.index_copy(0, at_T, found.entropy_T)
    inside_T = logprobs_T.detach() > -torch.inf
    stand_in_T = batch.behaviour_logprobs_T.to(logprobs_T)
    return Scored(logprobs_T=torch.where(inside_T, logprobs_T, stand_in_T), entropy_T=entropy_T, inside_T=inside_T)
