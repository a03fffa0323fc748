"""The actor: keeps every engine full of groups, has them scored, and puts them into the rollout log.

A group that is in the log was made once: its prompt's index is taken under a lock, and only an append makes it count.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from trueup.engines.base import Engine, GenerationRequest, RolloutFailure
from trueup.errors import EngineError, TrainingError
from trueup.knobs import RolloutConfig, SamplingConfig
from trueup.pipeline.buffer import RolloutBuffer, finished
from trueup.pipeline.rollout_log import RolloutLog
from trueup.tasks.prompts import PromptSource
from trueup.tasks.scoring import NotScored, ScoringPool
from trueup.types import Prompt, Rollout, RolloutGroup, SamplingParams

IDLE_S = 0.02
"""Between looks at whether another group may begin."""
FAILED_IN_A_ROW = 32
"""Groups that may come to nothing one after the other, or twice as many as are under way, before the run is stopped."""


def sampling_params(sampling: SamplingConfig, rollout: RolloutConfig, prompt_id: str) -> SamplingParams:
    """What a group is sampled with; its seed follows from the run's and the prompt, so that it can be drawn again."""
    digest = hashlib.sha256(f"{rollout.seed} {prompt_id}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big") % 2**31
    return SamplingParams(**sampling.model_dump(), max_tokens=rollout.max_tokens, seed=seed)


@dataclass(frozen=True, slots=True)
class NoGroup:
    """Why a group came to nothing."""

    reason: str


@dataclass
class Actor:
    """Threads that make groups. `buffer` and `log` are used under `lock` only; `failure` is why one could not go on."""

    engines: Sequence[Engine | None]
    """None stands for one that is being started again."""
    source: PromptSource
    scoring: ScoringPool
    log: RolloutLog
    buffer: RolloutBuffer
    sampling: SamplingConfig
    rollout: RolloutConfig
    done: Callable[[], int]
    """Batches that were taken and whose version every engine is known to serve."""
    prompts: Iterator[tuple[int, Prompt]]
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    """groups, retries, failed_groups, abandoned_groups (at the end), unscored, generated_tokens."""
    failure: BaseException | None = None
    _failed_in_a_row: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin to make groups, `concurrency` at a time on each engine."""
        for number in range(len(self.engines)):
            for slot in range(self.rollout.concurrency):
                thread = threading.Thread(target=self._run, args=(number,), daemon=True, name=f"actor {number}.{slot}")
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """Begin no more groups; those under way are logged if their engines still finish them."""
        self._stopping.set()

    def _run(self, number: int) -> None:
        try:
            while not self._stopping.is_set():
                prompt = self._next() if self.engines[number] is not None else None
                if prompt is None:
                    self._stopping.wait(IDLE_S)
                else:
                    self._group(number, prompt)
        except Exception as error:  # noqa: BLE001  (handed to the run, which stops with it)
            self.failure = error

    def _next(self) -> Prompt | None:
        with self.lock:
            if not self.buffer.may_start(self.done()):
                return None
            self.buffer.start()
            return next(self.prompts)[1]

    def _group(self, number: int, prompt: Prompt) -> None:
        """Make one group and log it; one that comes to nothing is counted. Raises TrainingError when all of them do."""
        group = self._make(number, prompt)
        with self.lock:
            if isinstance(group, NoGroup):
                return self._came_to_nothing(group)
            logged = self.log.append(group)
            self.buffer.add(finished(logged, group))
            self._failed_in_a_row = 0
            self.counts["groups"] += 1
            self.counts["generated_tokens"] += sum(len(r.token_ids) for r in group.rollouts)

    def _make(self, number: int, prompt: Prompt) -> RolloutGroup | NoGroup:
        rollouts = self._generate(number, prompt)
        if isinstance(rollouts, NoGroup):
            return rollouts
        rewards = self._rewards(prompt, rollouts)
        if isinstance(rewards, NoGroup):
            return rewards
        return RolloutGroup(rollouts=tuple(rollouts), rewards=tuple(rewards))

    def _came_to_nothing(self, why: NoGroup) -> None:
        self.buffer.fail()
        if self._stopping.is_set():
            self.counts["abandoned_groups"] += 1
            return
        self.counts["failed_groups"] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row > max(FAILED_IN_A_ROW, 2 * len(self.engines) * self.rollout.concurrency):
            raise TrainingError(
                f"{self._failed_in_a_row} groups in a row came to nothing, the last because {why.reason}"
            )

    def _generate(self, number: int, prompt: Prompt) -> list[Rollout] | NoGroup:
        """All completions of a prompt; one that failed is asked for again with the others, on an engine that lives."""
        params = sampling_params(self.sampling, self.rollout, prompt.prompt_id)
        request = GenerationRequest(prompt=prompt, sampling=params, n=self.rollout.group_size)
        why = NoGroup("the run is stopping")
        for attempt in range(self.rollout.retries + 1):
            if attempt:
                self._count("retries")
                self._stopping.wait(attempt)
            while (engine := self.engines[number]) is None and not self._stopping.wait(IDLE_S):
                pass
            if engine is None or (attempt and self._stopping.is_set()):
                break
            try:
                results = engine.generate([request], timeout_s=self.rollout.timeout_s)[0]
            except EngineError as error:
                why = NoGroup(str(error))
                continue
            rollouts = [r for r in results if not isinstance(r, RolloutFailure) and r.finish_reason != "abort"]
            if len(rollouts) == self.rollout.group_size:
                return rollouts
            failed = next((r.reason for r in results if isinstance(r, RolloutFailure)), "it was aborted")
            why = NoGroup(f"{self.rollout.group_size - len(rollouts)} completions failed: {failed}")
        return why

    def _rewards(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[float] | NoGroup:
        found = self.scoring.score([(prompt.answer, self.source.decode(r.token_ids)) for r in rollouts])
        bad = [reward for reward in found if isinstance(reward, NotScored)]
        if bad:
            self._count("unscored", len(bad))
            return NoGroup(f"a reward failed: {bad[0].reason}")
        return [reward for reward in found if not isinstance(reward, NotScored)]

    def _count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] += number
