"""What a live check asks of its replicas, and how answers become rows.

Failed requests are evidence up to a point: too few answers, or a server that went away or let a request time out, end
the check, because whatever was not answered was not tested.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from trueup.engines.probe_http import Answer, Ask, EngineFacts, ProbeClient
from trueup.errors import ConfigError, EngineError
from trueup.knobs import CheckConfig
from trueup.parity import verdicts
from trueup.parity.probes import asks_of, scored
from trueup.parity.prompts import Prompts, make_prompts
from trueup.parity.report import Cause
from trueup.parity.workbench import Workbench
from trueup.trace import TraceRow

PLAIN: dict[str, object] = {"temperature": 1.0}
SHAPED: dict[str, object] = {"temperature": 0.7, "top_p": 0.9}
LONG_TOKENS = 300
"""Longer than two of vLLM's blocks on a CPU (128 tokens), so that a prefix cache has something to reuse."""
SHORTEST_LONG_TOKENS = 16
FEW = 4
MIN_OK = 0.5
"""With fewer answers than this share nothing can be judged."""


@dataclass(kw_only=True)
class Asking:
    """Requests to one or several replicas; what failed is in `problems`, what the failures say in `causes`."""

    check: CheckConfig
    bench: Workbench
    clients: list[ProbeClient]
    causes: list[Cause] = field(default_factory=list)
    lines: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    cannot_score: str = ""

    @property
    def facts(self) -> EngineFacts:
        """What the first engine says of itself."""
        return self.clients[0].facts

    @property
    def quick(self) -> bool:
        """Fewer prompts and settings, fewer probes."""
        return self.check.depth == "quick"

    def prompts(self) -> Prompts:
        """Prompts that fit the engine. Raises ConfigError when completions leave no room for any."""
        scorer = self.bench.scorer
        long_tokens = min(LONG_TOKENS, (self.facts.max_length or 2048) - self.check.tokens - 8)
        if long_tokens < SHORTEST_LONG_TOKENS:
            raise ConfigError(
                f"the engine takes {self.facts.max_length} tokens: check.tokens={self.check.tokens} leaves no room for "
                "prompts"
            )
        count = self.check.prompts // (2 if self.quick else 1)
        vocab = scorer.model(scorer.dtype()).vocab_size
        return make_prompts(scorer.contexts, count=count, long_tokens=long_tokens, vocab=vocab)

    def sampling(self) -> list[dict[str, object]]:
        """The settings to try: plain, and the run's own or one that shapes the distribution; in a quick check only
        the latter."""
        own: dict[str, object] = dict(self.check.sampling_fields) or dict(SHAPED)
        return [own] if self.quick or own == PLAIN else [dict(PLAIN), own]

    def salt(self) -> str | None:
        """A fresh one, where the server knows salts: whether a prompt is cached is a factor of its own."""
        return None if self.facts.kind == "openai" else f"trueup-{time.time_ns()}"

    def generate(self, prompts: Prompts, sampling: dict[str, object]) -> list[list[Answer]]:
        """All prompts at once, from each replica with seeds of its own: the same ones would make copies, not draws."""
        tokens, seed, salt = self.check.tokens, self.check.seed, self.salt()
        asked = [
            asks_of(prompts.ordinary, sampling, max_tokens=tokens, seed=seed + at, salt=salt)
            for at in range(len(self.clients))
        ]
        return [client.generate(asks, together=True) for client, asks in zip(self.clients, asked, strict=True)]

    def alone(self, prompts: Prompts, sampling: dict[str, object]) -> list[Answer]:
        """A few prompts one after another; a quick check asks for less, in one batch.

        Raises EngineError when the engine is gone.
        """
        answers = self.clients[0].generate(self.few(prompts, sampling), together=self.quick)
        self.require_alive()
        return answers

    def few(self, prompts: Prompts, sampling: dict[str, object]) -> list[Ask]:
        """The requests of `alone`."""
        tokens = max(4, self.check.tokens // 4) if self.quick else self.check.tokens
        return asks_of(prompts.ordinary[:FEW], sampling, max_tokens=tokens, seed=self.check.seed, salt=self.salt())

    def rows(
        self, prompts: Prompts, sampling: dict[str, object], answers: Sequence[Sequence[Answer]]
    ) -> list[TraceRow]:
        """Answers as rows of a trace; failed ones are left out."""
        return [
            TraceRow(
                line=next(self.lines), engine=self.facts.info, sampling=sampling, prompt_token_ids=prompt,
                completion_token_ids=answer.ids, completion_logprobs=answer.logprobs, weight_versions=answer.versions,
                replica=client.url if len(self.clients) > 1 else None, finish_reason=answer.finish_reason,
            )
            for client, group_answers in zip(self.clients, answers, strict=True)
            for prompt, answer in zip(prompts.ordinary, group_answers, strict=True)
            if answer.error is None
        ]  # fmt: skip

    def require_alive(self) -> None:
        """Raise EngineError when a replica went away or let a request time out."""
        for client in self.clients:
            client.require_alive()

    def require_answers(self, answers: dict[str, list[list[Answer]]]) -> None:
        """Raise EngineError when too few requests came back; name what the errors say."""
        flat = [a for per_client in answers.values() for group_answers in per_client for a in group_answers]
        failed = [a.error for a in flat if a.error]
        if not failed:
            return
        cause = self._failed(failed, len(flat), "requests")
        dead = [c.url for c, own in zip(self.clients, zip(*answers.values(), strict=True), strict=True)
                if all(a.error for group in own for a in group)]  # fmt: skip
        empty = [key for key, own in answers.items() if all(a.error for group in own for a in group)]
        if dead or empty or (cause is None and len(failed) > (1 - MIN_OK) * len(flat)):
            raise EngineError(f"{len(failed)} of {len(flat)} requests failed: {failed[0]}")
        self.require_alive()

    def _failed(self, errors: Sequence[str], count: int, what: str) -> Cause | None:
        """Report failures, and the cause they name, if they do."""
        self.bench.problems.append(f"{len(errors)} of {count} {what} failed, first: {errors[0]}")
        cause = verdicts.not_finite(errors, count)
        if cause is not None and cause.id not in {c.id for c in self.causes}:
            self.causes.append(cause)
        return cause

    def score(self, rows: Sequence[TraceRow]) -> list[TraceRow]:
        """The engine's own raw scores of what it generated at T=1, as rows; none if it cannot score."""
        kept: list[TraceRow] = []
        for client in self.clients:
            own = [r for r in rows if r.replica in (None, client.url) and self.bench.scorer.unfit(r) is None]
            answers = scored(client, own, together=True)
            self.require_alive()
            errors = [a.error for a in answers if a.error]
            if errors and len(errors) == len(answers):
                self.cannot_score = f"the engine does not score given tokens: {errors[0]}"
                self.bench.notes.append(self.cannot_score)
                return []
            if errors:
                self._failed(errors, len(answers), "scorings")
            pairs = zip(own, answers, strict=True)
            kept += [replace(row, completion_logprobs=a.logprobs) for row, a in pairs if a.error is None]
        return kept
