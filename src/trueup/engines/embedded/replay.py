"""Mixed-KV replay: a rollout scored again with the weights and the cache that its engine really had.

When an update keeps the cache, a token attends to keys that older weights wrote, and no single version reproduces it.
A rollout's `cache_lives` say which version wrote every position, so the same segments can be run again, each under its
version, into one cache. In bitwise mode the result equals what the engine reported to the last bit.

Shapes: T completion tokens, D hidden width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.engines.embedded.layout import Span
from trueup.engines.embedded.runner import PolicyRunner, Shadow
from trueup.engines.embedded.sampler import distribution
from trueup.errors import EngineError
from trueup.model.load import LoadedModel
from trueup.policy.draw import draw, uniform
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores_under
from trueup.policy.processing import Distribution, History, SeenTokens
from trueup.types import LogprobKind, Rollout


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What the replay computes for a rollout's tokens, each [T]: logprobs in nats of the rollout's own kind and raw,
    and the tokens that its seed draws from the replayed logits."""

    logprobs_T: Tensor
    raw_logprobs_T: Tensor
    drawn_ids_T: Tensor


class Replayer:
    """Replays rollouts over the versions that `tensors_of` can load (weights/store.py); holds one model."""

    def __init__(
        self,
        model: LoadedModel,
        tensors_of: Callable[[int], Mapping[str, Tensor]],
        *,
        head_dtype: torch.dtype,
        keep_versions: int = 4,
    ) -> None:
        """`model` is a policy opened with layouts (model/packed.py); its weights are replaced by those replayed.

        Up to `keep_versions` versions stay in memory.
        """
        self.model, self.tensors_of, self.head_dtype = model, tensors_of, head_dtype
        self.keep_versions = keep_versions
        self._shadows: OrderedDict[int, Shadow] = OrderedDict()

    def replay(self, rollout: Rollout) -> Replayed:
        """Run a rollout again. Raises EngineError when its engine did not record the lives of its cache."""
        if not rollout.cache_lives:
            raise EngineError(f"{rollout.engine} does not tell which version wrote its cache: it cannot be replayed")
        ids = rollout.prompt.token_ids + rollout.token_ids
        first, count = len(rollout.prompt.token_ids) - 1, len(rollout.token_ids)
        runner = PolicyRunner.of(self.model, slots=1, capacity=len(ids), head_dtype=self.head_dtype)
        states: dict[int, Tensor] = {}
        heads: dict[int, Head] = {}
        for index, life in enumerate(rollout.cache_lives):
            following = rollout.cache_lives[index + 1 :]
            end = following[0].first_token if following else count
            position = 0
            for version, positions in life.runs:
                runner.swap(self._shadow(runner, version))
                heads[version] = runner.head
                hidden_TD = runner.forward(
                    [Span(slot=0, start=position, count=positions)], ids[position : position + positions]
                )
                for token in range(max(life.first_token, position - first), min(end, position + positions - first)):
                    if rollout.weight_versions[token] != version:
                        raise EngineError(f"token {token} is stamped with another version than wrote its position")
                    states[token] = hidden_TD[token + first - position]
                position += positions
        if len(states) != count:
            raise EngineError(f"the recorded cache covers {len(states)} of {count} tokens")
        return self._score(rollout, torch.stack([states[t] for t in range(count)]), heads)

    def _shadow(self, runner: PolicyRunner, version: int) -> Shadow:
        if version not in self._shadows:
            self._shadows[version] = runner.shadow(self.tensors_of(version))
        self._shadows.move_to_end(version)
        while len(self._shadows) > self.keep_versions:
            self._shadows.popitem(last=False)
        return self._shadows[version]

    def _score(self, rollout: Rollout, hidden_TD: Tensor, heads: Mapping[int, Head]) -> Replayed:
        targets_T = torch.tensor(rollout.token_ids)
        history = History(
            row_T=torch.zeros(len(targets_T), dtype=torch.long), prompts=(torch.tensor(rollout.prompt.token_ids),)
        )
        dist, greedy = distribution(rollout.sampling)
        kinds = [Distribution.of(kind, rollout.sampling) for kind in (rollout.logprob_kind, LogprobKind.RAW)]
        seed = rollout.sampling.seed
        assert seed is not None, "an engine that records its cache records the seed too"
        noise_T = torch.tensor([uniform(seed, t) for t in range(len(targets_T))], dtype=torch.float64)
        seen = SeenTokens.of(history, targets_T) if dist.penalises else None
        version_T = torch.tensor(rollout.weight_versions)
        logprobs_T, raw_T = torch.empty(2, len(targets_T))
        drawn_T = torch.empty_like(targets_T)
        for version, head in heads.items():
            at_T = version_T == version
            own, raw = token_scores_under(hidden_TD, head, targets_T, dists=kinds, history=history)
            drawn = draw(hidden_TD, head, dist, None if greedy else noise_T, seen=seen)
            logprobs_T[at_T], raw_T[at_T] = own.logprobs_T[at_T], raw.logprobs_T[at_T]
            drawn_T[at_T] = drawn.token_ids_T[at_T]
        return Replayed(logprobs_T=logprobs_T, raw_logprobs_T=raw_T, drawn_ids_T=drawn_T)
