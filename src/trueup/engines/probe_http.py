"""An engine as a check sees it: answers taken as they come, unvalidated, because a malformed one is evidence.

Works with anything that speaks OpenAI's completions with token ids and logprobs; vLLM and trueup say more of
themselves. Nothing here changes a server; every call has a timeout, and a request that fails is an answer too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trueup.engines.http import TOOK_TOO_LONG, HttpClient, is_loopback
from trueup.engines.pace import Pace
from trueup.errors import EngineError
from trueup.trace import EngineInfo
from trueup.types import is_integer

TOKEN_PREFIX = "token_id:"
FIRST_TIMEOUT_S = 10.0
GARBAGE = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError)
"""What reading an answer of another shape than expected raises (EngineError is a ValueError too)."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One completion to generate: exactly these sampling fields are sent, no others."""

    prompt: tuple[int, ...]
    sampling: Mapping[str, object]
    seed: int
    max_tokens: int
    salt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. `logprobs` holds NaN where an entry was no number; `error` is set when there is nothing else."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    versions: tuple[int, ...] | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What a server says of itself. `readable`: whether its flags could be read, not only guessed."""

    info: EngineInfo
    model: str
    root: str | None = None
    digest: str | None = None
    version: int | None = None
    readable: bool = False
    faults: tuple[str, ...] = ()
    weights_folder: str | None = None
    max_length: int | None = None
    on_this_machine: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """trueup, vllm or openai."""
        return self.info.name


class ProbeClient:
    """One server. `timeout_s` bounds each request; after one that timed out later ones fail at once (`try_again`)."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 60.0, parallel: int = 64) -> None:
        """Connect and ask the server what it is; at most `parallel` requests are sent at once.

        Raises EngineError when nobody answers in time.
        """
        self.timeout_s, self.token, self.parallel = timeout_s, token, parallel
        self._pace = Pace(parallel)
        self._hung: str | None = None
        self.http = HttpClient(url, token=token)
        self.url = self.http.url
        try:
            self.facts = replace(self._identify(), on_this_machine=is_loopback(self.http.url))
        except GARBAGE as error:
            self.http.close()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"{self.url} describes itself in a way that cannot be read ({error!s:.80})") from None

    def generate(self, asks: Sequence[Ask], *, together: bool) -> list[Answer]:
        """Send all requests at once, or one after another."""
        return self._run(self._generate_one, asks, together=together)

    def score(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], *, together: bool) -> list[Answer]:
        """Raw logprobs at T=1 of given completions, by `prompt_logprobs`."""
        return self._run(self._score_one, rows, together=together)

    def require_alive(self) -> None:
        """Raise EngineError when a request timed out, or nobody answers now."""
        if self._hung is not None:
            raise EngineError(self._hung)
        self.http.get("/v1/models", timeout_s=FIRST_TIMEOUT_S)

    def try_again(self) -> None:
        """Send requests again to a server that let one time out."""
        self._hung = None

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def _run(self, function: Any, items: Sequence[Any], *, together: bool) -> list[Answer]:
        """Answers in order; once one request timed out, those not yet sent fail at once."""

        def guarded(item: Any) -> Answer:
            if self._hung is not None:
                return Answer(error=self._hung)
            try:
                answer: Answer = self._pace.run(lambda: function(item), timeout_s=self.timeout_s)
                return answer
            except GARBAGE as error:
                if not isinstance(error, EngineError):
                    return Answer(error=f"{self.url} answered with something that is no completion ({error!s:.80})")
                if TOOK_TOO_LONG in str(error):
                    self._hung = str(error)
                return Answer(error=str(error))

        if not together:
            return [guarded(item) for item in items]
        pool = ThreadPoolExecutor(min(self.parallel, max(1, len(items))))
        try:
            return list(pool.map(guarded, items))
        finally:  # when interrupted, what is under way ends with the connection
            pool.shutdown(wait=False, cancel_futures=True)

    def _generate_one(self, ask: Ask) -> Answer:
        body: dict[str, Any] = {
            "model": self.facts.model, "prompt": list(ask.prompt), "n": 1, "logprobs": 0, "seed": ask.seed,
            "max_tokens": ask.max_tokens, **ask.sampling,
        }  # fmt: skip
        if self.facts.kind != "openai":
            body |= {"return_token_ids": True, "ignore_eos": True}
        if ask.salt is not None:
            body["cache_salt"] = ask.salt
        if self.facts.kind != "vllm" or self.facts.info.api == "V0":
            body["return_tokens_as_token_ids"] = True
        content = self.http.post("/v1/completions", body, timeout_s=self.timeout_s)
        return _read_completion(content, self.url)

    def _score_one(self, row: tuple[tuple[int, ...], tuple[int, ...]]) -> Answer:
        prompt, completion = row
        body = {
            "model": self.facts.model, "prompt": [*prompt, *completion], "max_tokens": 1, "temperature": 1.0,
            "prompt_logprobs": 0,
        }  # fmt: skip
        content = self.http.post("/v1/completions", body, timeout_s=self.timeout_s)
        try:
            entries = content["choices"][0]["prompt_logprobs"][len(prompt) :]
            values = tuple(_number(e[str(t)]["logprob"]) for t, e in zip(completion, entries, strict=True))
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError(f"{self.url} sent no prompt_logprobs: it cannot score given tokens") from None
        return Answer(ids=completion, logprobs=values)

    def _identify(self) -> EngineFacts:
        models = self.http.get("/v1/models", timeout_s=FIRST_TIMEOUT_S)
        try:
            card = models["data"][0]
            name = str(card["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self.url}/v1/models names no model: is this an OpenAI-compatible server?") from None
        length = card.get("max_model_len")
        length = length if isinstance(length, int) else None
        if card.get("owned_by") == "trueup":
            return self._identify_trueup(name, length)
        version = self._quietly("/version").get("version")
        if version is None:
            return EngineFacts(info=EngineInfo(name="openai"), model=name, root=card.get("root"), max_length=length)
        info = self._quietly("/server_info?config_format=json").get("vllm_config")
        flags = _vllm_flags(info) if isinstance(info, Mapping) else {}
        api = "V0" if str(version).startswith("0.8.") else "V1"
        return EngineFacts(
            info=EngineInfo(name="vllm", version=str(version), api=api, flags=flags),
            model=name, root=card.get("root"), readable=bool(flags), max_length=length,
        )  # fmt: skip

    def _identify_trueup(self, name: str, length: int | None) -> EngineFacts:
        status = self.http.get("/control/status", timeout_s=FIRST_TIMEOUT_S)
        details = status.get("details") or {}
        precision = status.get("precision") or {}
        flags = {"dtype": precision.get("body"), "head_dtype": precision.get("head")}
        faults = tuple(details.get("faults") or ())
        if faults:
            flags["faults"] = ", ".join(faults)
        return EngineFacts(
            info=EngineInfo(name="trueup", flags=flags), model=name, digest=status.get("model_digest"),
            version=status.get("version"), readable=True, faults=faults,
            weights_folder=details.get("weights_folder"), max_length=length, extra=details,
        )  # fmt: skip

    def _quietly(self, path: str) -> Mapping[str, Any]:
        """An answer that a server may not have: {} then."""
        try:
            content = self.http.get(path, timeout_s=FIRST_TIMEOUT_S)
        except EngineError as error:
            if "cannot be reached" in str(error):
                raise
            return {}
        return content if isinstance(content, Mapping) else {}


def read_token(path: Path) -> str:
    """The bearer token in a file: one line of printable ASCII. Raises EngineError, which never quotes it."""
    try:
        token = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"--token-file {path} cannot be read: {error}") from None
    if not token or not (token.isascii() and token.isprintable()):
        raise EngineError(f"--token-file {path} must hold one line of printable ASCII characters")
    return token


def _number(value: object) -> float:
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53):
        return float(value)
    return math.nan


def _read_completion(content: Any, url: str) -> Answer:
    """Read the only choice of an answer. Raises EngineError when it holds no ids or no logprobs."""
    try:
        choice = content["choices"][0]
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs")
        names = logprobs.get("tokens") or []
        ids = choice.get("token_ids")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EngineError(f"{url} answered with something that is no completion") from None
    if choice.get("finish_reason") == "error":
        raise EngineError(f"{url}: the completion failed: {choice.get('error', 'no reason given')}")
    if ids is None and names and all(str(name).startswith(TOKEN_PREFIX) for name in names):
        ids = [int(str(name).removeprefix(TOKEN_PREFIX)) for name in names]
    if not isinstance(ids, list) or not all(is_integer(i) and i >= 0 for i in ids):
        raise EngineError(f"{url} returns no token ids: it must honour return_token_ids or return_tokens_as_token_ids")
    if not isinstance(values, list):
        raise EngineError(f"{url} returns no logprobs: it must honour logprobs in /v1/completions")
    usage = content.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    prompt = choice.get("prompt_token_ids")
    runs = choice.get("weight_versions")
    return Answer(
        ids=tuple(ids),
        logprobs=tuple(_number(v) for v in values),
        prompt_ids=tuple(prompt) if isinstance(prompt, list) else None,
        versions=_stamps(runs, len(ids)),
        cached_tokens=details.get("cached_tokens"),
        finish_reason=choice.get("finish_reason"),
    )


def _stamps(runs: object, count: int) -> tuple[int, ...] | None:
    """Versions a token out of [[version, tokens], ...]; None unless they are `count`."""
    if not isinstance(runs, list):
        return None
    found: list[int] = []
    for version, tokens in runs:
        found += [int(version)] * min(int(tokens), count + 1 - len(found))
    return tuple(found) if len(found) == count else None


def _vllm_flags(config: Mapping[str, Any]) -> dict[str, object]:
    """The flags that matter, out of vLLM's own dump of its configuration."""
    model, cache = config.get("model_config") or {}, config.get("cache_config") or {}
    scheduler = config.get("scheduler_config") or {}
    wanted = {
        "dtype": model.get("dtype"), "logprobs_mode": model.get("logprobs_mode"), "model": model.get("model"),
        "hf_overrides": model.get("hf_overrides"), "generation_config": model.get("generation_config"),
        "enable_prefix_caching": cache.get("enable_prefix_caching"),
        "async_scheduling": scheduler.get("async_scheduling"),
    }  # fmt: skip
    return {k: v for k, v in wanted.items() if v not in (None, {}, "")}
