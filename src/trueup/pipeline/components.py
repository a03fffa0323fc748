"""The policy ratio of rollouts taken apart, with the weights and the cache that their engine really had.

Per token, in signed nats, trainer minus behaviour; shapes: T completion tokens. The parts telescope:

    backend     log replay - log mu        the trainer's arithmetic on the weights and keys the engine had
    stale_kv    log pi_v - log replay      the stamped version alone against the mix of keys it attended to
    staleness   log pi_prox - log pi_v     the trainer before the batch against the stamped version
    policy      log pi - log pi_prox       the trainer after the batch against before it

and beside them: correction, the log of the weight that the correction gives the token; self_noise, the trainer against
itself in another batch shape. Magnitudes of parts do not add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.engines.embedded.replay import Replayer
from trueup.errors import TrainingError
from trueup.model.load import LoadedModel
from trueup.pipeline.forward import Phases, Scored, score_all
from trueup.pipeline.recipe import Recipe
from trueup.policy.diagnostics import ess
from trueup.policy.packing import TrainingBatch, pack
from trueup.types import Rollout, RolloutGroup

PARTS = ("backend", "stale_kv", "staleness", "policy")
NOISE_ROWS = 4
"""Sequences that are also scored one at a time."""
TensorsOf = Callable[[int], Mapping[str, Tensor]]


def mixes_versions(rollout: Rollout) -> bool:
    """Whether some token attended to keys of another version than the one stamped on it."""
    for index, life in enumerate(rollout.cache_lives):
        following = rollout.cache_lives[index + 1 :]
        end = following[0].first_token if following else len(rollout.token_ids)
        stamped = set(rollout.weight_versions[life.first_token : end])
        if {version for version, _ in life.runs} | stamped != stamped or len(stamped) > 1:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts, [T] float64 each; `usable_T` (bool): inside every kept set. `row_T`, `lag_T` (batches) describe T.

    `correction_T` is -inf where the correction drops a token; `self_noise` holds the first rows' tokens only.
    """

    backend_T: Tensor
    stale_kv_T: Tensor
    staleness_T: Tensor
    policy_T: Tensor
    correction_T: Tensor
    self_noise: Tensor
    usable_T: Tensor
    row_T: Tensor
    lag_T: Tensor
    replayed: int
    """Rollouts whose cache mixed versions."""

    def as_dict(self) -> dict[str, object]:
        """Numbers of every part over usable tokens: mean, mean |r|, rms, max |r|, ESS of its weights."""
        found: dict[str, object] = {name: numbers(getattr(self, f"{name}_T")[self.usable_T]) for name in PARTS}
        total_T = self.backend_T + self.stale_kv_T + self.staleness_T
        found["backend_and_staleness"] = numbers(total_T[self.usable_T])
        correction_T = self.correction_T[self.usable_T]
        found["correction"] = numbers(correction_T[torch.isfinite(correction_T)]) | {
            "dropped": float((~torch.isfinite(correction_T)).double().mean()) if len(correction_T) else 0.0
        }
        found["self_noise"] = numbers(self.self_noise)
        lags = sorted(set(self.lag_T[self.usable_T].tolist()))
        found["by_lag"] = [
            {"lag": lag, "tokens": int(at_T.sum())} | {n: numbers(getattr(self, f"{n}_T")[at_T]) for n in PARTS[:3]}
            for lag in lags
            if bool((at_T := self.usable_T & (self.lag_T == lag)).any())
        ]
        return found


def numbers(values_T: Tensor) -> dict[str, float]:
    """What is said of a part: nats, and the ESS of its weights; nothing of no tokens."""
    if not len(values_T):
        return {"tokens": 0}
    return {
        "tokens": len(values_T),
        "mean": float(values_T.mean()),
        "mean_abs": float(values_T.abs().mean()),
        "rms": float(values_T.square().mean().sqrt()),
        "max_abs": float(values_T.abs().max()),
        "ess": ess(values_T),
    }


class Bench:
    """One model in memory, given whatever version is asked for; the trainer's own forward pass on it."""

    def __init__(
        self, model: LoadedModel, tensors_of: TensorsOf, *, head_dtype: torch.dtype, share_prompts: bool,
        micro_tokens: int,
    ) -> None:  # fmt: skip
        """`model` was opened as a policy (model/packed.py); `tensors_of` loads a version's tensors."""
        self.model, self.tensors_of, self.head_dtype = model, tensors_of, head_dtype
        self.share_prompts, self.micro_tokens = share_prompts, micro_tokens
        self.replayer = Replayer(model, tensors_of, head_dtype=head_dtype)

    def put(self, version: int) -> None:
        """Give the model a version's weights."""
        own = dict(self.model.lm.named_parameters())
        for name, tensor in self.tensors_of(version).items():
            if name in own:
                own[name].data = tensor.to(own[name].dtype)

    def score(self, version: int, batch: TrainingBatch) -> Scored:
        """Logprobs under a version, as the trainer computes them."""
        self.put(version)
        return score_all(
            self.model, self.head_dtype, batch, share_prompts=self.share_prompts, micro_tokens=self.micro_tokens,
            phases=Phases(),
        )  # fmt: skip

    def take_apart(
        self, groups: Sequence[RolloutGroup], *, proximal: int, current: int, recipe: Recipe
    ) -> tuple[TrainingBatch, Components]:
        """Score a sample under every version it needs. `proximal`: the trainer's before the batch, `current`: after it.

        Raises WeightError for a version that is gone, TrainingError for rollouts of another distribution.
        """
        batch = pack(groups)
        mu_T = batch.behaviour_logprobs_T
        before = self.score(proximal, batch)
        after = before if current == proximal else self.score(current, batch)
        stamped_T, inside_T = self._stamped(batch, proximal, before)
        replay_T, replayed = stamped_T.clone(), 0
        rollouts = [r for group in groups for r in group.rollouts]
        for row, rollout in enumerate(rollouts):
            if mixes_versions(rollout):
                replay_T[batch.token_slice(row)] = self.replayer.replay(rollout).logprobs_T.double()
                replayed += 1
        log_ratio_T = before.logprobs_T.double() - mu_T
        usable_T = before.inside_T & after.inside_T & inside_T & torch.isfinite(replay_T)
        return batch, Components(
            backend_T=replay_T - mu_T,
            stale_kv_T=stamped_T - replay_T,
            staleness_T=before.logprobs_T.double() - stamped_T,
            policy_T=after.logprobs_T.double() - before.logprobs_T.double(),
            correction_T=recipe.correct(log_ratio_T, batch.row_T).weight_T.double().log(),
            self_noise=self._self_noise(batch, proximal, before),
            usable_T=usable_T,
            row_T=batch.row_T,
            lag_T=proximal - batch.version_T,
            replayed=replayed,
        )

    def _stamped(self, batch: TrainingBatch, proximal: int, before: Scored) -> tuple[Tensor, Tensor]:
        """Every token under the version stamped on it: logprobs [T], inside the kept set [T]."""
        logprobs_T, inside_T = before.logprobs_T.double(), before.inside_T.clone()
        for version in sorted(set(batch.version_T.tolist()) - {proximal}):
            if version > proximal:
                raise TrainingError(f"a token of the batch is stamped {version}, later than the trainer's {proximal}")
            rows = sorted(set(batch.row_T[batch.version_T == version].tolist()))
            found, token_T = self.score(version, batch.rows(rows)), batch.tokens_of(rows)
            own_T = batch.version_T[token_T] == version
            logprobs_T[token_T[own_T]] = found.logprobs_T[own_T].double()
            inside_T[token_T[own_T]] = found.inside_T[own_T]
        return logprobs_T, inside_T

    def _self_noise(self, batch: TrainingBatch, proximal: int, before: Scored) -> Tensor:
        """The trainer one sequence at a time against the trainer on the whole sample."""
        found = []
        for row in range(min(NOISE_ROWS, len(batch.facts))):
            alone, token_T = self.score(proximal, batch.rows([row])), batch.tokens_of([row])
            gap_T = alone.logprobs_T.double() - before.logprobs_T[token_T].double()
            found.append(gap_T[before.inside_T[token_T]])
        return torch.cat(found)
