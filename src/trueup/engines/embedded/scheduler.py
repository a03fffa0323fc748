"""Which sequence does what in the next step. Pure bookkeeping: no tensor is touched here.

A sequence is a list of tokens, of which the first `computed` have their keys and values in its slot. Prefill, decoding
and the second prefill after a cleared cache are one case: the tokens after `computed` go through the model, and once
none is left the next one is drawn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from trueup.engines.base import GenerationRequest
from trueup.types import CacheLife, SamplingParams


@dataclass(kw_only=True, eq=False)
class Sequence:
    """One completion under way, or a row being scored (`sampling` None: nothing is drawn)."""

    group: int
    sample: int
    tokens: list[int]
    prompt_tokens: int
    sampling: SamplingParams | None
    max_tokens: int = 0
    ignore_eos: bool = False
    on_token: Callable[[Sequence], None] | None = None
    slot: int | None = None
    computed: int = 0
    prompt_done_version: int | None = None
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    log_kept_masses: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    lives: list[tuple[int, list[list[int]]]] = field(default_factory=lambda: [(0, [])])

    @property
    def completion(self) -> list[int]:
        """Tokens drawn so far."""
        return self.tokens[self.prompt_tokens :]

    @property
    def left(self) -> int:
        """Tokens still to go through the model before the next one is drawn."""
        return len(self.tokens) - self.computed

    def wrote(self, version: int, positions: int) -> None:
        """Note that a step under `version` wrote that many more positions of the cache."""
        runs = self.lives[-1][1]
        if runs and runs[-1][0] == version:
            runs[-1][1] += positions
        else:
            runs.append([version, positions])
        self.computed += positions

    def forget(self) -> None:
        """Its cache is gone: everything is computed again, in a new life."""
        drawn = len(self.tokens) - self.prompt_tokens
        if self.lives[-1][0] == drawn:
            self.lives.pop()
        self.lives.append((drawn, []))
        self.computed = 0

    def cache_lives(self) -> tuple[CacheLife, ...]:
        """The record of its cache; a life that no token attended to is left out."""
        drawn = len(self.tokens) - self.prompt_tokens
        return tuple(
            CacheLife(first_token=first, runs=tuple((v, n) for v, n in runs))
            for first, runs in self.lives
            if first < drawn
        )


@dataclass(kw_only=True, eq=False)
class Group:
    """The completions of one request; `results` fill up as they finish."""

    id: int
    request: GenerationRequest | None
    members: list[Sequence]
    unfinished: int
    begun: bool = False
    """Whether one of its members has been given a slot."""
    prompt_ready: int | None = None
    """Weight version under which the prompt lies in the prefix store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """`count` tokens of a sequence from `sequence.computed` on."""

    sequence: Sequence
    count: int


class Scheduler:
    """Waiting and running sequences over a fixed number of slots and tokens a step."""

    def __init__(self, *, slots: int, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.free = list(range(slots - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.groups: dict[int, Group] = {}
        self.admitting = True

    @property
    def begun(self) -> bool:
        """Whether a request is under way: running, or partly so with members still waiting."""
        return bool(self.running) or any(group.begun for group in self.groups.values())

    def add(self, group: Group) -> None:
        """Queue a request's completions, first come first served."""
        self.groups[group.id] = group
        self.waiting.extend(group.members)

    def admit(self, version: int) -> list[Sequence]:
        """Give free slots to waiting sequences and return them.

        Of a group whose prompt is not computed yet under this version one member goes first; the others wait for it,
        and so does nobody else. While a pause waits for the running requests, only members of those are admitted.
        """
        admitted: list[Sequence] = []
        leading = {s.group for s in self.running if s.computed < s.prompt_tokens}
        held: list[Sequence] = []
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            group = self.groups[sequence.group]
            if not (self.admitting or group.begun):
                held.append(sequence)
                continue
            if len(group.members) > 1 and group.prompt_ready != version:
                if group.id in leading:
                    held.append(sequence)
                    continue
                leading.add(group.id)
            sequence.slot = self.free.pop()
            group.begun = True
            self.running.append(sequence)
            admitted.append(sequence)
        self.waiting.extendleft(reversed(held))
        return admitted

    def plan(self) -> list[Work]:
        """Return the next step: every decoding sequence, then prefill in order while the step has room."""
        decoding = [Work(sequence=s, count=1) for s in self.running if s.left == 1]
        room = max(self.step_tokens - len(decoding), 1)
        chunks = []
        for sequence in self.running:
            count = min(sequence.left, room)
            if sequence.left > 1 and count > 0:
                chunks.append(Work(sequence=sequence, count=count))
                room -= count
        single = [w for w in chunks if w.count == 1]
        work = [*decoding, *single, *(w for w in chunks if w.count > 1)]
        return sorted(work, key=lambda w: (w.count > 1, w.sequence.slot))

    def finish(self, sequence: Sequence, reason: str) -> Group | None:
        """End a sequence, running or waiting; return its group if that was the last one of it."""
        assert sequence.finish_reason is None, "a sequence ends once"
        sequence.finish_reason = reason
        if sequence.slot is not None:
            self.running.remove(sequence)
            self.free.append(sequence.slot)
            self.free.sort(reverse=True)
            sequence.slot = None
        else:
            self.waiting.remove(sequence)
        group = self.groups[sequence.group]
        group.unfinished -= 1
        if group.unfinished:
            return None
        return self.groups.pop(sequence.group)

    def forget_cache(self) -> None:
        """The cache was cleared: every running sequence is computed again from its first token."""
        for sequence in self.running:
            sequence.forget()
