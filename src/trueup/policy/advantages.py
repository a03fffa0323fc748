"""Rewards to advantages, and which prompts and completions are learned from at all.

Shapes: S sequences of a batch, in any order. `group_S` (long) names the prompt of each; all completions of a prompt
form its group. Everything is float64; a filter is a bool mask [S], True for what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trueup.errors import NumericsError

STD_EPS = 1e-4
"""Added to a standard deviation before dividing by it (TRL's value; DeepSeekMath gives none)."""
PASS_RATE_LIMIT = 0.9


def _check(reward_S: Tensor, group_S: Tensor) -> Tensor:
    if reward_S.ndim != 1 or reward_S.shape != group_S.shape:
        raise NumericsError(f"{tuple(reward_S.shape)} rewards for {tuple(group_S.shape)} group numbers")
    if not len(reward_S):
        raise NumericsError("no rewards: the batch is empty")
    if not bool(torch.isfinite(reward_S).all()):
        raise NumericsError("rewards must be finite")
    return reward_S.double()


@dataclass(frozen=True, kw_only=True)
class _Groups:
    """Per sequence: size of its group and mean of the group's values, exactly their value where all are equal."""

    size_S: Tensor
    mean_S: Tensor

    @classmethod
    def of(cls, reward_S: Tensor, group_S: Tensor) -> _Groups:
        _, inverse, size = torch.unique(group_S, return_inverse=True, return_counts=True)
        low = torch.zeros(len(size), dtype=torch.float64)
        low = low.scatter_reduce(0, inverse, reward_S, "amin", include_self=False)
        above = torch.zeros_like(low).index_add_(0, inverse, reward_S - low[inverse])
        return cls(size_S=size[inverse], mean_S=(low + above / size)[inverse])


def group_mean(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """R - mean of the group, [S]: no division (Dr. GRPO, arXiv 2503.20783, section 3.1; ScaleRL before its division).

    Raises NumericsError, as all functions here, for an empty batch, unequal lengths or rewards that are not finite.
    """
    reward_S = _check(reward_S, group_S)
    return reward_S - _Groups.of(reward_S, group_S).mean_S


def leave_one_out(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """R - mean of the others of the group, [S] (RLOO, arXiv 2402.14740); 0 in a group of one, which has no others."""
    reward_S = _check(reward_S, group_S)
    groups = _Groups.of(reward_S, group_S)
    return (reward_S - groups.mean_S) * groups.size_S / (groups.size_S - 1).clamp_min(1)


def std_normalised(reward_S: Tensor, group_S: Tensor, *, eps: float = STD_EPS) -> Tensor:
    """(R - group mean) / (group standard deviation + eps), [S] (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation divides by n - 1, as TRL and verl do; a group of one has deviation 0.
    """
    reward_S = _check(reward_S, group_S)
    centred_S = reward_S - _Groups.of(reward_S, group_S).mean_S
    groups = _Groups.of(centred_S.square(), group_S)
    variance_S = groups.mean_S * groups.size_S / (groups.size_S - 1).clamp_min(1)
    return centred_S / (variance_S.sqrt() + eps)


def batch_normalised(
    reward_S: Tensor, group_S: Tensor, *, spread_of: str = "advantages", eps: float = STD_EPS,
    kept_S: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(R - group mean) / (standard deviation over the batch + eps), [S].

    `spread_of`: "advantages" divides by the deviation of R - group mean (ScaleRL, arXiv 2510.13786, section 3.2),
    "rewards" by that of R (TRL's scale_rewards="batch"); both divide by n - 1. The deviation is of the sequences in
    `kept_S` (all, if None): groups of equal rewards that a filter drops have advantage 0, and would shrink it, so that
    the step grew as a task gets easy. Raises NumericsError for another `spread_of`.

    Example: rewards 0, 1 in one group and 1, 1 in a dropped one give -1/sqrt(2), 1/sqrt(2), 0, 0 with the dropped one
    left out (deviation 0.71), and -0.87, 0.87 with it (0.58).
    """
    if spread_of not in ("advantages", "rewards"):
        raise NumericsError(f"spread_of must be advantages or rewards, not {spread_of!r}")
    reward_S = _check(reward_S, group_S)
    centred_S = reward_S - _Groups.of(reward_S, group_S).mean_S
    spread_S = centred_S if spread_of == "advantages" else reward_S
    spread_S = spread_S if kept_S is None else spread_S[kept_S]
    deviation = spread_S.std() if len(spread_S) > 1 else spread_S.new_zeros(())
    return centred_S / (deviation + eps)


def varies(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """True for sequences of groups whose rewards differ, [S]: the zero-variance filter.

    A group of equal rewards has no gradient, only weight in the denominators (DAPO, arXiv 2503.14476, section 3.2,
    resamples such prompts; ScaleRL, section 3.2, drops them). Compared exactly, with no tolerance.
    """
    reward_S = _check(reward_S, group_S)
    _, inverse, size = torch.unique(group_S, return_inverse=True, return_counts=True)
    low, high = torch.full((2, len(size)), torch.nan, dtype=torch.float64)
    low = low.scatter_reduce(0, inverse, reward_S, "amin", include_self=False)
    high = high.scatter_reduce(0, inverse, reward_S, "amax", include_self=False)
    return (low < high)[inverse]


def not_overlong(finish_reasons: Sequence[str]) -> Tensor:
    """True for completions that ended by themselves, [S]: the overlong filter (DAPO, arXiv 2503.14476, section 3.4).

    A completion cut off at its length limit (finish_reason "length") got a reward that says nothing about it.
    """
    return torch.tensor([reason != "length" for reason in finish_reasons], dtype=torch.bool)


@dataclass
class PassRates:
    """Pass rate of every prompt over all its rollouts, for no-positive-resampling (ScaleRL, section 3.2).

    A prompt whose historical pass rate reaches `limit` is never drawn again. A rollout passes when its reward is at
    least `passing_reward`.
    """

    limit: float = PASS_RATE_LIMIT
    passing_reward: float = 1.0
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Passed and all rollouts by prompt_id."""

    def record(self, prompt_id: str, rewards: Iterable[float]) -> None:
        """Add the rewards of a group."""
        passed, seen = self.counts.get(prompt_id, (0, 0))
        outcomes = [reward >= self.passing_reward for reward in rewards]
        self.counts[prompt_id] = (passed + sum(outcomes), seen + len(outcomes))

    def rate(self, prompt_id: str) -> float | None:
        """Return the pass rate, None for a prompt without rollouts."""
        passed, seen = self.counts.get(prompt_id, (0, 0))
        return passed / seen if seen else None

    def retired(self, prompt_id: str) -> bool:
        """Whether the prompt is too easy to be drawn again."""
        rate = self.rate(prompt_id)
        return rate is not None and rate >= self.limit

    def to_json(self) -> dict[str, list[int]]:
        """Return the counts for a checkpoint."""
        return {prompt_id: list(pair) for prompt_id, pair in self.counts.items()}

    def restore(self, counts: Mapping[str, Sequence[int]]) -> None:
        """Take up the counts of a checkpoint."""
        self.counts = {prompt_id: (int(pair[0]), int(pair[1])) for prompt_id, pair in counts.items()}
