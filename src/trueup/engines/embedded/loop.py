"""One engine step after another: admit, forward, draw, stamp, finish. Runs in the engine's thread only."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trueup.engines.base import PauseMode, Result, RolloutFailure, Scores
from trueup.engines.embedded.cache import PrefixStore
from trueup.engines.embedded.layout import Span
from trueup.engines.embedded.options import NAME, EngineOptions
from trueup.engines.embedded.runner import PolicyRunner, Shadow
from trueup.engines.embedded.sampler import sample
from trueup.engines.embedded.scheduler import Group, Scheduler, Sequence, Work
from trueup.engines.embedded.tokens import Tokens
from trueup.engines.lives import kv_state
from trueup.errors import EngineError, NumericsError, RecordError
from trueup.model.scoring import ScoredRow
from trueup.policy.logprobs import token_scores_under
from trueup.policy.processing import Distribution
from trueup.types import LogprobKind, Rollout

CLEAN_ENDS = ("stop", "length", "scored")


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """What a swap of the weights met."""

    previous_version: int
    paused_s: float
    in_flight: int


@dataclass(kw_only=True, eq=False)
class _Row:
    """A row being scored: the states that predict its completion, as the chunks come."""

    row: ScoredRow
    states: list[Tensor]


class StepLoop:
    """The state between two steps, and the step."""

    def __init__(self, runner: PolicyRunner, tokens: Tokens, options: EngineOptions, max_length: int) -> None:
        self.runner, self.tokens, self.max_length = runner, tokens, max_length
        self.scheduler = Scheduler(slots=options.slots, step_tokens=options.step_tokens)
        self.prefixes = PrefixStore(max_tokens=options.prefix_tokens)
        self.share_prefixes = options.prefix_cache
        self.sample = sample
        self.version = 0
        self.paused = False
        self.steps = self.generated_tokens = self.prefill_tokens = 0
        self._futures: dict[int, Future[Any]] = {}
        self._rows: dict[int, _Row] = {}
        self._stopped: list[Future[None]] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        waiting = self.scheduler.waiting and self.scheduler.admitting
        return not self.paused and bool(waiting or self.scheduler.begun)

    def add(self, group: Group, future: Future[Any]) -> None:
        """Queue a request; the future gets its list of results."""
        self._futures[group.id] = future
        self.scheduler.add(group)

    def add_row(self, group: Group, row: ScoredRow, future: Future[list[Scores]]) -> None:
        """Queue a row to score."""
        self._rows[group.id] = _Row(row=row, states=[])
        self.add(group, future)

    def abort(self, group_id: int) -> None:
        """End a request's sequences."""
        group = self.scheduler.groups.get(group_id)
        for sequence in [] if group is None else [s for s in group.members if s.finish_reason is None]:
            self._finish(sequence, "abort")

    def pause(self, mode: PauseMode, stopped: Future[None]) -> None:
        """Stand still now, or once the running requests have ended (WAIT)."""
        if mode == PauseMode.ABORT:
            for group_id in list(self.scheduler.groups):
                self.abort(group_id)
        if mode == PauseMode.WAIT and self.scheduler.begun and not self.paused:
            self.scheduler.admitting = False
            self._stopped.append(stopped)
            return
        self.paused = True
        stopped.set_result(None)

    def give_up_pause(self, stopped: Future[None]) -> None:
        """Whoever asked for a pause waits no longer: admit requests again, unless somebody else still waits."""
        if stopped in self._stopped:
            self._stopped.remove(stopped)
            self.scheduler.admitting = not self._stopped

    def resume(self) -> None:
        """Take steps again."""
        self.paused, self.scheduler.admitting = False, True
        for stopped in self._stopped:
            stopped.set_exception(EngineError("resumed before the running requests had ended"))
        self._stopped.clear()

    def clear_cache(self) -> None:
        """Forget keys and values, prefixes included; rows being scored start again."""
        self.scheduler.forget_cache()
        self.prefixes.clear()
        for group in self.scheduler.groups.values():
            group.prompt_ready = None
        for row in self._rows.values():
            row.states.clear()

    def swap(self, version: int, shadow: Shadow, clear_cache: bool) -> Swap:
        """Point the model at new weights; what runs goes on under them."""
        start = time.perf_counter()
        previous, in_flight = self.version, len(self.scheduler.running)
        self.runner.swap(shadow)
        self.version = version
        if clear_cache:
            self.clear_cache()
        self.prefixes.clear()
        for sequence in self.scheduler.running:
            if sequence.group in self._rows:  # a score is of one version
                sequence.forget()
                self._rows[sequence.group].states.clear()
        return Swap(previous_version=previous, paused_s=time.perf_counter() - start, in_flight=in_flight)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one forward pass over what is planned and draw a token wherever a sequence is complete.

        A sequence whose states or logits are not finite ends as a failure; the others and the engine go on.
        """
        for sequence in self.scheduler.admit(self.version):
            self._start_from_prefix(sequence)
        plan = self.scheduler.plan()
        if not plan:
            return
        self.steps += 1
        spans = [_span(work) for work in plan]
        ids = [i for work, span in zip(plan, spans, strict=True) for i in work.sequence.tokens[span.start : span.end]]
        hidden_TD = self.runner.forward(spans, ids)
        self.prefill_tokens += sum(s.count for s in spans if s.count > 1)
        ready: list[Sequence] = []
        rows: list[int] = []
        end = 0
        for work in plan:
            sequence, start, end = work.sequence, end, end + work.count
            sequence.wrote(self.version, work.count)
            if sequence.sampling is None:
                self._scored(sequence, hidden_TD[start:end])
            elif sequence.left == 0:
                ready.append(sequence)
                rows.append(end - 1)
        if ready:
            whole = rows == list(range(len(hidden_TD)))
            self._draw(ready, hidden_TD if whole else hidden_TD[torch.tensor(rows)])

    def _draw(self, ready: list[Sequence], states_TD: Tensor) -> None:
        """Draw, stamp and report a token for each sequence; end those that are done."""
        for sequence, error in self.sample(states_TD, self.runner.head, ready, self.version):
            self._finish(sequence, f"error: {error}")
        for sequence in ready:
            if sequence.finish_reason is not None:
                continue
            self.generated_tokens += 1
            self._keep_prompt(sequence)
            if sequence.on_token is not None:
                try:
                    sequence.on_token(sequence)
                except Exception:  # noqa: BLE001  (a listener that fails ends its own request, nobody else's)
                    self.abort(sequence.group)
                    continue
            reason = self._end_of(sequence)
            if reason is not None:
                self._finish(sequence, reason)

    def _end_of(self, sequence: Sequence) -> str | None:
        assert sequence.sampling is not None
        if sequence.tokens[-1] in self.tokens.eos_ids and not sequence.ignore_eos:
            return "stop"
        if self.tokens.stopped(sequence.completion, sequence.sampling.stop):
            return "stop"
        drawn = len(sequence.tokens) - sequence.prompt_tokens
        return "length" if drawn >= sequence.max_tokens else None

    def _start_from_prefix(self, sequence: Sequence) -> None:
        """Restore what is known of a prompt, all but its last token, which must be run to draw from."""
        if sequence.sampling is None:
            return
        count, saved = self.prefixes.find(
            self.version, sequence.tokens, sequence.group, shared=self.share_prefixes, salt=self._salt(sequence)
        )
        if count:
            assert sequence.slot is not None
            self.runner.cache.restore(sequence.slot, count, saved)
            sequence.wrote(self.version, count)

    def _keep_prompt(self, sequence: Sequence) -> None:
        """Store a prompt that was just computed, for its group and, with prefix caching, for later requests."""
        group = self.scheduler.groups[sequence.group]
        fresh = len(sequence.versions) == 1 and group.prompt_ready != self.version
        pure = sequence.lives[-1][1] == [[self.version, sequence.prompt_tokens]]
        if fresh and pure and (len(group.members) > 1 or self.share_prefixes):
            assert sequence.slot is not None
            prompt = sequence.tokens[: sequence.prompt_tokens]
            salt = self._salt(sequence)
            if not (self.share_prefixes and self.prefixes.holds(self.version, prompt, salt)):
                saved = self.runner.cache.save(sequence.slot, sequence.prompt_tokens)
                self.prefixes.put(self.version, prompt, sequence.group, saved, salt=salt)
            group.prompt_ready = self.version

    def _salt(self, sequence: Sequence) -> str | None:
        request = self.scheduler.groups[sequence.group].request
        return None if request is None else request.cache_salt

    def _scored(self, sequence: Sequence, states_TD: Tensor) -> None:
        """Collect a row's states; once it is whole, score it."""
        held = self._rows[sequence.group]
        first = sequence.computed - len(states_TD)
        held.states.append(states_TD[max(0, sequence.prompt_tokens - 1 - first) :])
        if sequence.left:
            return
        targets_T = torch.tensor(held.row.completion_ids)
        try:
            scored = token_scores_under(torch.cat(held.states), self.runner.head, targets_T, dists=[Distribution()])[0]
        except NumericsError as error:
            self._finish(sequence, f"error: {error}")
            return
        sequence.raw_logprobs = scored.logprobs_T.tolist()
        self._finish(sequence, "scored")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.slot is not None and reason not in CLEAN_ENDS:
            self.runner.cache.wipe(sequence.slot)  # what it wrote may not be finite, and a mask does not hide NaN
        group = self.scheduler.finish(sequence, reason)
        if group is not None:
            self._deliver(group, sequence, reason)
        if self._stopped and not self.scheduler.begun:  # whoever asked for the pause finds every result delivered
            self.paused = True
            for stopped in self._stopped:
                stopped.set_result(None)
            self._stopped.clear()

    def _deliver(self, group: Group, sequence: Sequence, reason: str) -> None:
        if not self.share_prefixes:
            self.prefixes.drop(group.id)
        future = self._futures.pop(group.id)
        held = self._rows.pop(group.id, None)
        if held is None:
            try:
                future.set_result([rollout_of(group, member) for member in group.members])
            except RecordError as error:
                future.set_exception(error)
        elif reason == "scored":
            future.set_result([Scores(logprobs=tuple(sequence.raw_logprobs), version=self.version)])
        else:
            future.set_exception(EngineError(f"scoring ended: {reason}"))

    def stop(self, reason: str, *, failed: bool) -> None:
        """End everything: nobody may wait for an engine that takes no more steps."""
        for group in list(self.scheduler.groups.values()):
            for sequence in [s for s in group.members if s.finish_reason is None]:
                self._finish(sequence, f"error: {reason}" if failed else "abort")
        for stopped in self._stopped:
            stopped.set_exception(EngineError(reason))
        self._stopped.clear()


def _span(work: Work) -> Span:
    assert work.sequence.slot is not None, "a running sequence has a slot"
    return Span(slot=work.sequence.slot, start=work.sequence.computed, count=work.count)


def rollout_of(group: Group, sequence: Sequence) -> Result:
    """The record of a finished completion, or the failure it was."""
    assert group.request is not None and sequence.sampling is not None and sequence.finish_reason is not None
    prompt = group.request.prompt
    if not sequence.versions or sequence.finish_reason.startswith("error"):
        return RolloutFailure(prompt_id=prompt.prompt_id, reason=sequence.finish_reason)
    lives = sequence.cache_lives()
    greedy = sequence.sampling.temperature == 0
    return Rollout(
        prompt=prompt,
        token_ids=tuple(sequence.completion),
        behaviour_logprobs=tuple(sequence.logprobs),
        raw_logprobs=tuple(sequence.raw_logprobs),
        log_kept_masses=tuple(sequence.log_kept_masses),
        logprob_kind=LogprobKind.RAW if greedy else LogprobKind.PROCESSED,
        weight_versions=tuple(sequence.versions),
        sampling=sequence.sampling,
        finish_reason=sequence.finish_reason,
        engine=NAME,
        kv=kv_state(sequence.versions, lives),
        cache_lives=lives,
    )
