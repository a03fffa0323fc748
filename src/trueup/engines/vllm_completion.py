"""One completion from vLLM, ids in and ids out, with the version that made each token.

0.32 has an endpoint that returns spans of its own weight label, stamped inside the step loop. 0.18.1 has none: tokens
are streamed and stamped as they arrive, and an update waits, once the engine stands still, until every token that the
engine counts as generated has arrived.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from trueup.engines.base import GenerationRequest, Result, RolloutFailure
from trueup.engines.http import HttpClient
from trueup.engines.lives import kv_state
from trueup.errors import EngineError, RecordError
from trueup.types import CacheLife, LogprobKind, Rollout, is_integer

SETTLE_POLL_S = 0.01
STILL_S = 0.1
STILL_WITHIN_S = 60.0
CLAMPED = -9999.0
"""What vLLM's generate endpoint sends for a logprob of minus infinity or NaN."""
_SAMPLE = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? ([-+.\deE]+|NaN|[-+]Inf)$", re.MULTILINE)


@dataclass(kw_only=True)
class RawCompletion:
    """What came back: per-token arrays of one length, and how it ended."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str = ""


class Completer(Protocol):
    """How a version of vLLM completes a prompt and keeps count of its weights."""

    @property
    def unaccountable(self) -> bool:
        """Whether a request was given up, so that tokens cannot be stamped exactly until nothing runs."""
        ...

    def complete(self, request: GenerationRequest, body: Mapping[str, Any], timeout_s: float) -> RawCompletion:
        """Return a completion of a request with n = 1; `body` holds its sampling fields. Raises EngineError."""
        ...

    def settle(self, timeout_s: float) -> None:
        """The engine stands still: return once every token it made is stamped. Raises EngineError."""
        ...

    def set_version(self, version: int) -> None:
        """From now on tokens are of this version."""
        ...

    def restarted(self) -> None:
        """The engine is a new process."""
        ...

    def scoring(self) -> AbstractContextManager[None]:
        """Around a scoring request, which generates one token."""
        ...


class SpanCompleter:
    """vLLM 0.32: `/inference/v1/generate`, whose answer holds weight-version spans."""

    unaccountable = False

    def __init__(self, http: HttpClient, model: str) -> None:
        self._http, self._model = http, model

    def complete(self, request: GenerationRequest, body: Mapping[str, Any], timeout_s: float) -> RawCompletion:
        """See Completer. Raises EngineError."""
        sampling = {k: v for k, v in body.items() if k != "cache_salt"} | {"detokenize": bool(body.get("stop"))}
        asked: dict[str, Any] = {
            "model": self._model, "token_ids": list(request.prompt.token_ids), "sampling_params": sampling,
        }  # fmt: skip
        if "cache_salt" in body:
            asked["cache_salt"] = body["cache_salt"]
        content = self._http.post("/inference/v1/generate", asked, timeout_s=timeout_s)
        try:
            choice = content["choices"][0]
            ids = choice["token_ids"] or []
            entries = (choice["logprobs"] or {}).get("content") or []
            same = [entry["token_id"] for entry in entries] == list(ids)
            return RawCompletion(
                ids=list(ids),
                logprobs=[float(entry["logprob"]) for entry in entries] if same else [],
                versions=versions_of_spans(choice.get("weight_versions") or [], len(ids)),
                finish_reason=str(choice["finish_reason"]),
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"{self._http.url} answered with something that is no completion ({error!r})") from None

    def settle(self, timeout_s: float) -> None:
        """Nothing to wait for: the label is stamped by the step that makes a token."""

    def set_version(self, version: int) -> None:
        """Set the engine's label."""
        self._http.post("/update_weight_version", {"new_version": str(version)}, timeout_s=30.0)

    def restarted(self) -> None:
        """Nothing is counted here."""

    def scoring(self) -> AbstractContextManager[None]:
        """Nothing is counted here."""
        return nullcontext()


class StreamCompleter:
    """vLLM 0.18.1: streamed `/v1/completions`; exact as long as nobody else asks while a request of ours runs."""

    def __init__(self, http: HttpClient, model: str) -> None:
        self._http, self._model = http, model
        self._lock = threading.Lock()
        self._version = 0
        self._received = 0
        self._entry = threading.Lock()
        self._open, self._lost = 0, False
        self.restarted()

    def complete(self, request: GenerationRequest, body: Mapping[str, Any], timeout_s: float) -> RawCompletion:
        """See Completer. Raises EngineError."""
        made = RawCompletion()
        trouble: list[str] = []
        asked = {
            "model": self._model, "prompt": list(request.prompt.token_ids), "stream": True,
            "return_token_ids": True, **body,
        }  # fmt: skip
        with self._counted() as done:
            self._http.stream(
                "/v1/completions", asked, lambda line: self._take(line, made, trouble), timeout_s=timeout_s
            )
            if trouble or not made.finish_reason:
                why = (trouble or ["no finish_reason"])[0]
                raise EngineError(f"{self._http.url}: a stream ended early ({why:.200})")
            done.append(True)
        return made

    def settle(self, timeout_s: float) -> None:
        """See Completer: all tokens that the engine counts have arrived, seen twice. Raises EngineError."""
        deadline = time.monotonic() + timeout_s
        with self._entry:
            if not self._open:
                self.restarted()
        agreed = 0
        while agreed < 2:
            counted = self._generated() - self._before
            with self._lock:
                received, unaccountable = self._received, self._lost
            agreed = agreed + 1 if counted == received else 0
            if unaccountable:
                raise EngineError("a stream was given up while others ran: let them end before an update")
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self._http.url} counts {counted:.0f} generated tokens, {received} arrived: "
                    "somebody else asks this engine, so the versions of its tokens cannot be known"
                )
            time.sleep(SETTLE_POLL_S)

    def set_version(self, version: int) -> None:
        """Stamp what arrives from now on."""
        self._version = version

    def restarted(self) -> None:
        """Count from the engine's present count on, once that stands still; nothing of ours may run.

        Raises EngineError when others keep the engine busy.
        """
        last, deadline = -1.0, time.monotonic() + STILL_WITHIN_S
        while (generated := self._generated()) != last:
            if time.monotonic() > deadline:
                raise EngineError(f"{self._http.url} generates for somebody else; its tokens cannot be counted")
            last = generated
            time.sleep(STILL_S)
        with self._lock:
            self._before, self._received, self._lost = generated, 0, False

    def _generated(self) -> float:
        return read_metrics(self._http)["generation_tokens_total"]

    @property
    def unaccountable(self) -> bool:
        """Whether a stream was given up since the count began."""
        return self._lost

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """See Completer."""
        with self._counted() as done:
            yield
            with self._lock:
                self._received += 1
            done.append(True)

    @contextmanager
    def _counted(self) -> Iterator[list[bool]]:
        """Around a request; unless something is appended its tokens are lost, and the count with them."""
        done: list[bool] = []
        with self._entry:
            if not self._open and (self._lost or self._generated() - self._before != self._received):
                self.restarted()  # others may ask while nothing of ours runs
            with self._lock:
                self._open += 1
        try:
            yield done
        finally:
            with self._lock:
                self._open -= 1
                self._lost = self._lost or not done

    def _take(self, line: str, made: RawCompletion, trouble: list[str]) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        try:
            content = json.loads(line.removeprefix("data: "))
            if "error" in content:
                trouble.append(str(content["error"]))
                return
            for choice in content["choices"]:
                ids = choice["token_ids"] or []
                made.ids += ids
                made.logprobs += (choice["logprobs"] or {}).get("token_logprobs") or []
                made.versions += [self._version] * len(ids)
                made.finish_reason = choice["finish_reason"] or made.finish_reason
                with self._lock:
                    self._received += len(ids)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            trouble.append(f"a line that is no part of a completion ({error!r})")


def record(
    request: GenerationRequest, made: RawCompletion, lives: tuple[CacheLife, ...], *, kind: LogprobKind, engine: str
) -> Result:
    """A completion as a rollout, or the failure it was; `kind` is what logprobs are of unless it was greedy."""

    def failure(reason: str) -> RolloutFailure:
        return RolloutFailure(prompt_id=request.prompt.prompt_id, reason=reason)

    if not made.ids:
        return failure(made.finish_reason)
    if not len(made.ids) == len(made.logprobs) == len(made.versions):
        return failure(f"{len(made.ids)} ids, {len(made.logprobs)} logprobs, {len(made.versions)} versions")
    if min(made.logprobs) <= CLAMPED:
        return failure("the engine reports a logprob of minus infinity or NaN")
    try:
        return Rollout(
            prompt=request.prompt,
            token_ids=tuple(made.ids),
            behaviour_logprobs=tuple(made.logprobs),
            logprob_kind=LogprobKind.RAW if request.sampling.temperature == 0 else kind,
            weight_versions=tuple(made.versions),
            sampling=request.sampling,
            finish_reason=made.finish_reason,
            engine=engine,
            kv=kv_state(made.versions, lives),
            cache_lives=lives,
        )
    except RecordError as error:
        return failure(str(error))


def versions_of_spans(spans: list[Any], count: int) -> list[int]:
    """Versions of `count` tokens from [{"version": "3", "start": 0, "end": 5}, ...]; [] unless they cover them.

    A label that is no number is one that nobody set: version 0.
    """
    versions: list[int] = []
    for span in spans:
        start, end, label = span["start"], span["end"], str(span["version"])
        if not (is_integer(start) and is_integer(end) and start == len(versions) and start <= end <= count):
            return []
        versions += [int(label) if label.isdigit() else 0] * (end - start)
    return versions if len(versions) == count else []


def read_metrics(http: HttpClient) -> dict[str, float]:
    """vLLM's counters and gauges by name without `vllm:`, summed over engines. Raises EngineError."""
    found: dict[str, float] = {"generation_tokens_total": 0.0, "num_requests_running": 0.0, "num_requests_waiting": 0.0}
    for name, value in _SAMPLE.findall(http.text("/metrics")):
        if name in found:
            found[name] += float(value)
    return found


CompleterOf = Callable[[HttpClient, str], Completer]
COMPLETERS: dict[str, CompleterOf] = {"0.32": SpanCompleter, "0.18": StreamCompleter}
"""By vLLM's major and minor version; others were never tried and are refused."""
