"""Any OpenAI-compatible server that returns token ids and logprobs, as a rollout engine.

Such a server does not say which distribution its logprobs are of, which weights made a token or what its cache held.
The first is the caller's claim (`trueup check` tests it); the others are undeclared capabilities: every token is
stamped with the one version the caller names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

from trueup.engines.base import (
    DEFAULT_TIMEOUT_S,
    EngineCapabilities,
    EngineStatus,
    GenerationRequest,
    PauseMode,
    Result,
    RolloutFailure,
    Scores,
    UpdateReceipt,
    require,
    require_sampling,
)  # fmt: skip
from trueup.engines.http import HttpClient
from trueup.engines.pace import Pace
from trueup.errors import EngineError, RecordError, UnsupportedByEngine
from trueup.model.scoring import ScoredRow
from trueup.policy.draw import sample_seed
from trueup.types import LogprobKind, Rollout, SamplingParams

NAME = "openai"
PARALLEL = 64
TOKEN_PREFIX = "token_id:"
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def capabilities_of(kind: LogprobKind, *, scores: bool) -> EngineCapabilities:
    """What such a server can do: generate, and score prompts if it offers `prompt_logprobs` (vLLM and trueup do)."""
    return EngineCapabilities(logprob_kinds=frozenset({kind}), scores=scores)


class OpenAIEngine:
    """See engines/base.py for the protocol; `kind` is what the server's logprobs are claimed to be."""

    def __init__(
        self,
        url: str,
        *,
        kind: LogprobKind,
        model: str | None = None,
        token: str | None = None,
        scores: bool = False,
        version: int = 0,
    ) -> None:
        """Connect and ask for the model's name if none is given. Raises EngineError when nobody answers."""
        self.name, self.kind, self.version = NAME, kind, version
        self.capabilities = capabilities_of(kind, scores=scores)
        self._http = HttpClient(url, token=token)
        self._pace = Pace(PARALLEL)
        self.model = model or self._first_model()

    def generate(
        self, requests: Sequence[GenerationRequest], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[list[Result]]:
        """See Engine.generate; requests run side by side, at most PARALLEL of them."""
        for request in requests:
            require_sampling(self.capabilities, request.sampling, self.name)
        return self._side_by_side(self._generate_one, requests, timeout_s)

    def score(self, rows: Sequence[ScoredRow], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Scores]:
        """See Engine.score: the row is sent as a prompt and its `prompt_logprobs` are read."""
        require(self.capabilities, "scores", self.name)
        return self._side_by_side(self._score_one, rows, timeout_s)

    def pause(self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Raises UnsupportedByEngine: OpenAI's API has no control plane."""
        require(self.capabilities, "pause_modes", self.name)

    def resume(self) -> None:
        """Raises UnsupportedByEngine: OpenAI's API has no control plane."""
        require(self.capabilities, "pause_modes", self.name)

    def update_weights(self, path: Path, *, clear_cache: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> UpdateReceipt:
        """Raises UnsupportedByEngine: OpenAI's API has no control plane."""
        raise UnsupportedByEngine(f"{self.name} cannot do this: it does not declare updates")

    def status(self) -> EngineStatus:
        """What the API tells: that it answers, and the model's name. Raises EngineError when it does not."""
        return EngineStatus(
            engine=self.name, version=None, model_digest=None, precision={}, paused=False, running=0, waiting=0,
            generated_tokens=0, details={"model": self._first_model()},
        )  # fmt: skip

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _first_model(self) -> str:
        content = self._http.get("/v1/models")
        try:
            return str(content["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise EngineError(f"{self._http.url}/v1/models names no model") from None

    def _side_by_side(
        self, function: Callable[[Item, float], Answer], items: Sequence[Item], timeout_s: float
    ) -> list[Answer]:
        deadline = monotonic() + timeout_s
        if not items:
            return []
        with ThreadPoolExecutor(min(PARALLEL, len(items)), thread_name_prefix=self.name) as pool:
            futures = [
                pool.submit(
                    lambda item=item: self._pace.run(  # type: ignore[misc]
                        lambda: function(item, deadline - monotonic()), timeout_s=max(0.0, deadline - monotonic())
                    )
                )
                for item in items
            ]
            return [future.result() for future in futures]

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        sampling = request.sampling
        if sampling.max_tokens is None:
            raise EngineError(f"{self.name}: name max_tokens; without it a server chooses a limit of its own")
        body: dict[str, Any] = {
            "model": self.model, "prompt": list(request.prompt.token_ids), "n": request.n, "logprobs": 0,
            "return_token_ids": True, "return_tokens_as_token_ids": True, "temperature": sampling.temperature,
            "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty, "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty, "max_tokens": sampling.max_tokens,
            "ignore_eos": request.ignore_eos,
        }  # fmt: skip
        optional = {"seed": sampling.seed, "stop": list(sampling.stop) or None}
        return body | {name: value for name, value in optional.items() if value is not None}

    def _generate_one(self, request: GenerationRequest, timeout_s: float) -> list[Result]:
        content = self._http.post("/v1/completions", self._body(request), timeout_s=timeout_s)
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or len(choices) != request.n:
            raise EngineError(f"{self._http.url} sent no {request.n} choices")
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return [self._read(choice, request, sample) for sample, choice in enumerate(ordered)]

    def _read(self, choice: dict[str, Any], request: GenerationRequest, sample: int) -> Result:
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sample_seed(sampling.seed, sample))
        try:
            return _rollout_of(choice, request, sampling, self)
        except RecordError as error:
            return RolloutFailure(prompt_id=request.prompt.prompt_id, reason=str(error))

    def _score_one(self, row: ScoredRow, timeout_s: float) -> Scores:
        body = {
            "model": self.model, "prompt": list(row.prompt_ids + row.completion_ids), "max_tokens": 1,
            "temperature": 1.0, "prompt_logprobs": 0,
        }  # fmt: skip
        content = self._http.post("/v1/completions", body, timeout_s=timeout_s)
        try:
            entries = content["choices"][0]["prompt_logprobs"][len(row.prompt_ids) :]
            pairs = zip(row.completion_ids, entries, strict=True)
            values = tuple(float(entry[str(token)]["logprob"]) for token, entry in pairs)
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError(f"{self._http.url} sent no prompt_logprobs: it cannot score") from None
        return Scores(logprobs=values, version=None)


def _rollout_of(
    choice: dict[str, Any], request: GenerationRequest, sampling: SamplingParams, engine: OpenAIEngine
) -> Rollout:
    """Read a choice. Raises EngineError when it carries no ids or logprobs, RecordError when they do not fit."""
    logprobs = choice.get("logprobs") or {}
    ids = choice.get("token_ids")
    if ids is None and all(str(t).startswith(TOKEN_PREFIX) for t in logprobs.get("tokens") or [None]):
        ids = [int(t.removeprefix(TOKEN_PREFIX)) for t in logprobs["tokens"]]
    if ids is None or logprobs.get("token_logprobs") is None:
        raise EngineError(
            f"{engine.name}: the server returns no token ids or logprobs; it must honour logprobs and return_token_ids "
            "or return_tokens_as_token_ids"
        )
    kind = LogprobKind.RAW if sampling.temperature == 0 else engine.kind
    return Rollout(
        prompt=request.prompt,
        token_ids=tuple(ids),
        behaviour_logprobs=tuple(logprobs["token_logprobs"]),
        logprob_kind=kind,
        weight_versions=(engine.version,) * len(ids),
        sampling=sampling,
        finish_reason=str(choice.get("finish_reason")),
        engine=engine.name,
    )
