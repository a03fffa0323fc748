"""OpenAI's formats: from request bodies to generation requests, from results to answers, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from trueup.engines.base import EngineStatus, GenerationRequest, Result, RolloutFailure, Scores
from trueup.engines.embedded.tokens import Tokens
from trueup.engines.embedded.wire import ChatRequest, CompletionRequest, rollout_to_json, runs_of
from trueup.errors import EngineError
from trueup.model.scoring import ScoredRow
from trueup.types import Prompt, Rollout

TASK = "http"


def requests_of(body: CompletionRequest, tokens: Tokens) -> list[GenerationRequest]:
    """One generation request for each prompt of a body. Raises EngineError for text without a tokenizer."""
    given: Any = body.prompt
    if isinstance(given, str):
        prompts = [tokens.encode(given)]
    elif isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = [tokens.encode(p) if isinstance(p, str) else p for p in given]
    sampling = body.sampling()
    return [
        GenerationRequest(
            prompt=Prompt(prompt_id=str(index), task=TASK, token_ids=tuple(ids)),
            sampling=sampling,
            n=body.n,
            ignore_eos=body.ignore_eos,
            cache_salt=body.cache_salt,
        )
        for index, ids in enumerate(prompts)
    ]


def requests_of_chat(body: ChatRequest, tokens: Tokens) -> list[GenerationRequest]:
    """The generation request of a chat. Raises EngineError without a tokenizer or a template."""
    ids = tokens.encode_chat([{"role": m.role, "content": m.content} for m in body.messages])
    limit = body.max_completion_tokens or body.max_tokens
    sampling = body.model_copy(update={"max_tokens": limit}).sampling()
    prompt = Prompt(prompt_id="0", task=TASK, token_ids=tuple(ids))
    request = GenerationRequest(
        prompt=prompt, sampling=sampling, n=body.n, ignore_eos=body.ignore_eos, cache_salt=body.cache_salt
    )
    return [request]


def prompt_row(request: GenerationRequest) -> ScoredRow:
    """A prompt as a row to score: its first token is given, the others are scored. Raises EngineError if too short."""
    ids = request.prompt.token_ids
    if len(ids) < 2:
        raise EngineError("prompt_logprobs needs a prompt of at least two tokens")
    return ScoredRow(prompt_ids=ids[:1], completion_ids=ids[1:])


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def prometheus(status: EngineStatus) -> str:
    """The engine's counters in Prometheus' text format."""
    values = {
        "trueup_running": ("gauge", status.running),
        "trueup_waiting": ("gauge", status.waiting),
        "trueup_paused": ("gauge", int(status.paused)),
        "trueup_weight_version": ("gauge", status.version),
        "trueup_generated_tokens_total": ("counter", status.generated_tokens),
        "trueup_prefill_tokens_total": ("counter", status.details["prefill_tokens"]),
        "trueup_prefix_hit_tokens_total": ("counter", status.details["prefix_hit_tokens"]),
        "trueup_steps_total": ("counter", status.details["steps"]),
    }
    return "".join(f"# TYPE {name} {kind}\n{name} {value}\n" for name, (kind, value) in values.items())


class Writer(Protocol):
    """Writes one kind of answer."""

    def piece(self, sample: int, token: int, logprob: float, version: int) -> str:
        """The event of one drawn token."""
        ...

    def ending(self, request: GenerationRequest, results: Sequence[Result]) -> Iterator[str]:
        """The events after the last token."""
        ...


class _Stream:
    """The text of one streamed completion: what is known of it, and how many characters were sent.

    Only the newest tokens are decoded, from a point where the text before was complete.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.first = self.read = self.sent = 0
        self.text = ""

    def add(self, token: int, tokens: Tokens, stops: Sequence[str], held_back: int) -> str:
        """Take a token and return the characters that may be sent now."""
        self.ids.append(token)
        before, now = tokens.decode(self.ids[self.first : self.read]), tokens.decode(self.ids[self.first :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self.text += now[len(before) :]
        self.first, self.read = self.read, len(self.ids)
        found = [at for stop in stops if (at := self.text.find(stop, max(0, self.sent - held_back))) >= 0]
        ready = max(min(found) if found else len(self.text) - held_back, self.sent)
        fresh, self.sent = self.text[self.sent : ready], ready
        return fresh


class _Writer(ABC):
    """What completions and chat share; subclasses say how a choice looks."""

    kind: str
    prefix: str

    def __init__(self, body: CompletionRequest | ChatRequest, model: str, tokens: Tokens) -> None:
        self.body, self.model, self.tokens = body, model, tokens
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._streams: dict[int, _Stream] = {}
        self._stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._held_back = max((len(s) for s in self._stops), default=1) - 1

    def envelope(self, choices: list[dict[str, Any]], kind: str, **others: Any) -> dict[str, Any]:
        """The answer around the choices."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, **others,
        }  # fmt: skip

    def whole(
        self,
        requests: Sequence[GenerationRequest],
        results: Sequence[Sequence[Result]],
        scores: Sequence[Scores] | None,
    ) -> dict[str, Any]:
        """The answer to a request that is not streamed; a completion that failed has finish_reason "error"."""
        choices: list[dict[str, Any]] = []
        for at, (request, group) in enumerate(zip(requests, results, strict=True)):
            for result in group:
                choice = {"index": len(choices)} | self.choice(result) | self._extras(request, result)
                if isinstance(result, RolloutFailure):
                    choice["error"] = result.reason
                if scores is not None:
                    choice["prompt_logprobs"] = _prompt_logprobs(request, scores[at])
                choices.append(choice)
        return self.envelope(choices, self.kind, usage=_usage(requests, results))

    @abstractmethod
    def choice(self, result: Result) -> dict[str, Any]:
        """A choice's own fields."""

    @abstractmethod
    def delta(self, text: str, token: int | None, logprob: float | None) -> dict[str, Any]:
        """A streamed choice's own fields."""

    def piece(self, sample: int, token: int, logprob: float, version: int) -> str:
        """The event of one drawn token; text that may still change or turn out to be a stop string is held back."""
        stream = self._streams.setdefault(sample, _Stream())
        fresh = stream.add(token, self.tokens, self._stops, self._held_back)
        choice = {"index": sample, "finish_reason": None, "weight_version": version} | self.delta(fresh, token, logprob)
        if self.body.return_token_ids:
            choice["token_ids"] = [token]
        return event(self.envelope([choice], self.stream_kind))

    @property
    def stream_kind(self) -> str:
        """The object name of a chunk."""
        return self.kind

    def ending(self, request: GenerationRequest, results: Sequence[Result]) -> Iterator[str]:
        """The finish reasons, the rollouts and counts if asked for, and the end mark."""
        for sample, result in enumerate(results):
            rest = self.text(result)[self._streams[sample].sent if sample in self._streams else 0 :]
            choice = {"index": sample, "finish_reason": _reason(result)} | self.delta(rest, None, None)
            if self.body.return_rollout:
                choice["rollout"] = rollout_to_json(result)
            yield event(self.envelope([choice], self.stream_kind))
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event(self.envelope([], self.stream_kind, usage=_usage([request], [results])))
        yield "data: [DONE]\n\n"

    def text(self, result: Result) -> str:
        """A completion's text, cut before the stop string that ended it."""
        if isinstance(result, RolloutFailure):
            return ""
        text = self.tokens.decode(result.token_ids)
        found = [at for stop in result.sampling.stop if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    def name(self, token: int) -> str:
        """How a token is written in logprobs."""
        return f"token_id:{token}" if self.body.return_tokens_as_token_ids else self.tokens.decode([token])

    def _extras(self, request: GenerationRequest, result: Result) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.body.return_token_ids and isinstance(result, Rollout):
            extras["token_ids"] = list(result.token_ids)
            extras["prompt_token_ids"] = list(request.prompt.token_ids)
            extras["weight_versions"] = runs_of(result.weight_versions)
        if self.body.return_rollout:
            extras["rollout"] = rollout_to_json(result)
        return extras


class CompletionWriter(_Writer):
    """Answers of /v1/completions."""

    kind, prefix = "text_completion", "cmpl"

    def choice(self, result: Result) -> dict[str, Any]:
        """Text, and logprobs if asked for."""
        pairs = (
            []
            if isinstance(result, RolloutFailure)
            else list(zip(result.token_ids, result.behaviour_logprobs, strict=True))
        )
        return {"text": self.text(result), "finish_reason": _reason(result), "logprobs": self._logprobs(pairs)}

    def delta(self, text: str, token: int | None, logprob: float | None) -> dict[str, Any]:
        """A piece of text, and its token's logprob if asked for."""
        pairs = [] if token is None or logprob is None else [(token, logprob)]
        return {"text": text, "logprobs": self._logprobs(pairs)}

    def _logprobs(self, pairs: list[tuple[int, float]]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        names = [self.name(token) for token, _ in pairs]
        offsets = list(accumulate(map(len, names), initial=0))[: len(names)]
        return {
            "tokens": names, "token_logprobs": [value for _, value in pairs], "text_offset": offsets,
            "top_logprobs": [{name: value} for name, (_, value) in zip(names, pairs, strict=True)],
        }  # fmt: skip


class ChatWriter(_Writer):
    """Answers of /v1/chat/completions."""

    kind, prefix, chunk = "chat.completion", "chatcmpl", "chat.completion.chunk"

    @property
    def stream_kind(self) -> str:
        """The object name of a chunk."""
        return self.chunk

    def choice(self, result: Result) -> dict[str, Any]:
        """The assistant's message, and logprobs if asked for."""
        pairs = (
            []
            if isinstance(result, RolloutFailure)
            else list(zip(result.token_ids, result.behaviour_logprobs, strict=True))
        )
        message = {"role": "assistant", "content": self.text(result), "refusal": None}
        return {"message": message, "finish_reason": _reason(result), "logprobs": self._logprobs(pairs)}

    def delta(self, text: str, token: int | None, logprob: float | None) -> dict[str, Any]:
        """A piece of the message."""
        pairs = [] if token is None or logprob is None else [(token, logprob)]
        content = {"role": "assistant", "content": text} if text or token is not None else {}
        return {"delta": content, "logprobs": self._logprobs(pairs) if pairs else None}

    def _logprobs(self, pairs: list[tuple[int, float]]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = []
        for token, value in pairs:
            name = self.name(token)
            content.append({"token": name, "logprob": value, "bytes": list(name.encode()), "top_logprobs": []})
        return {"content": content, "refusal": None}


def _reason(result: Result) -> str:
    return "error" if isinstance(result, RolloutFailure) else result.finish_reason


def _usage(requests: Sequence[GenerationRequest], results: Sequence[Sequence[Result]]) -> dict[str, int]:
    prompts = sum(len(r.prompt.token_ids) for r in requests)
    drawn = sum(len(r.token_ids) for group in results for r in group if isinstance(r, Rollout))
    return {"prompt_tokens": prompts, "completion_tokens": drawn, "total_tokens": prompts + drawn}


def _prompt_logprobs(request: GenerationRequest, scores: Scores) -> list[dict[str, Any] | None]:
    """vLLM's form: nothing for the first token, then {id: {logprob}} for each."""
    pairs = zip(request.prompt.token_ids[1:], scores.logprobs, strict=True)
    return [None, *({str(token): {"logprob": value}} for token, value in pairs)]
