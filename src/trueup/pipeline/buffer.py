"""Which finished groups are trained on next, how stale they may be, and how many may be under way. Pure bookkeeping.

Versions count optimiser batches. The lag of a group is the trainer's version before a batch less the version of the
group's oldest token; a batch takes B groups, in the order in which they were finished.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from trueup.types import RolloutGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A group in the rollout log that no batch has taken: its number there, its oldest token's version, the mean length
    of its completions in tokens and their mean reward."""

    number: int
    oldest_version: int
    mean_tokens: float = 0.0
    mean_reward: float = 0.0


@dataclass
class RolloutBuffer:
    """Groups wait here between log and trainer; stale ones are dropped and counted, or taken all the same (`late`)."""

    groups_per_batch: int
    max_lag: int
    synchronous: bool = False
    """Rounds of max_lag + 1 batches: all are made before the first is trained on, the next round after the last."""
    late: bool = False
    """Whether groups beyond max_lag are trained on: dropping them selects short completions."""
    taken: int = 0
    """Batches, of an earlier part of the run too."""
    dropped: list[int] = field(default_factory=list)
    """Numbers of groups that were too old when their turn came."""
    last_dropped: list[Finished] = field(default_factory=list)
    """The groups that the last call of `take` dropped."""
    started: int = 0
    """Groups that were begun and have not failed."""
    _waiting: deque[Finished] = field(default_factory=deque)

    def may_start(self, batches_done: int) -> bool:
        """Whether another group may be begun once so many batches were taken and their versions are served.

        Admission as AReaL's (arXiv 2505.24298, equation 3): group number N (from 0) belongs to batch N // B and may be
        begun max_lag batches before it, or with its round. Groups that were dropped or failed leave room for others.
        """
        batch = (self.started - len(self.dropped)) // self.groups_per_batch
        if self.synchronous:
            return batch // self._round <= batches_done // self._round
        return batch <= batches_done + self.max_lag

    @property
    def _round(self) -> int:
        return self.max_lag + 1

    def start(self) -> None:
        """A group was begun."""
        self.started += 1

    def fail(self) -> None:
        """A group that was begun came to nothing."""
        self.started -= 1

    def add(self, group: Finished) -> None:
        """A group is in the log."""
        self._waiting.append(group)

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, version: int, *, max_lag: int | None = None) -> list[Finished]:
        """The next batch for a trainer at `version`, or nothing while there are too few; drops what is too old.

        `max_lag`: for this batch, instead of the run's own; then late groups are dropped in any case.
        """
        limit = self.max_lag if max_lag is None else max_lag
        everything = self.late and max_lag is None
        fresh = [g for g in self._waiting if everything or version - g.oldest_version <= limit]
        kept = {g.number for g in fresh}
        self.last_dropped = [g for g in self._waiting if g.number not in kept]
        self.dropped += [g.number for g in self.last_dropped]
        self._waiting = deque(fresh)
        due = self._round - self.taken % self._round if self.synchronous else 1
        if len(self._waiting) < due * self.groups_per_batch:
            return []
        self.taken += 1
        return [self._waiting.popleft() for _ in range(self.groups_per_batch)]


def finished(number: int, group: RolloutGroup) -> Finished:
    """A group of the rollout log as the buffer holds it."""
    lengths = [len(r.token_ids) for r in group.rollouts]
    return Finished(
        number=number, oldest_version=group.oldest_version, mean_tokens=sum(lengths) / len(lengths),
        mean_reward=sum(group.rewards) / len(group.rewards),
    )  # fmt: skip
