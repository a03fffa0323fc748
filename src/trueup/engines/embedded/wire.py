"""What travels over HTTP: requests in OpenAI's vocabulary (with vLLM's and our own fields), and records as JSON.

A field that would change the distribution and is not modelled is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from trueup.engines.base import EngineCapabilities, PauseMode, RolloutFailure
from trueup.engines.embedded.options import Fault
from trueup.errors import EngineError, RecordError
from trueup.types import (
    SAMPLING_FIELDS,
    SHAPING_FIELDS,
    CacheLife,
    KVState,
    LogprobKind,
    Prompt,
    Rollout,
    SamplingParams,
    parse_sampling,
)  # fmt: skip

MAX_IDS = 2**20
MAX_N = 256
MAX_TEXT = 2**20
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_IDS)]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Real = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with token counts."""

    include_usage: bool = False


class _Sampled(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, max_length=4096, description="ignored: a server serves one policy")
    n: int = Field(1, ge=1, le=MAX_N)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: Real | None = Field(None, ge=0, le=100, description="0 is greedy; default 1")
    top_p: Real | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 are off")
    min_p: Real | None = Field(None, ge=0, le=1)
    repetition_penalty: Real | None = Field(None, ge=1e-3, le=1e3)
    presence_penalty: Real | None = Field(None, ge=-2, le=2)
    frequency_penalty: Real | None = Field(None, ge=-2, le=2)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    cache_salt: Text | None = Field(None, description="cached prompts are shared only under the same salt")
    return_rollout: bool = Field(False, description="add the whole rollout record to each choice")

    def sampling(self) -> SamplingParams:
        """Return the sampling parameters. Raises EngineError for fields that are not modelled, RecordError if bad."""
        given = {k: v for k, v in self.model_dump().items() if k in SAMPLING_FIELDS or k in SHAPING_FIELDS}
        sampling, unmodelled = parse_sampling(given)
        if unmodelled:
            raise EngineError(f"{', '.join(unmodelled)} would change the distribution and is not supported")
        return sampling


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1, max_length=MAX_N)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_N)]
    )  # fmt: skip
    max_tokens: int | None = Field(16, ge=1, le=2**31)
    logprobs: int | None = Field(None, ge=0, le=0, description="0: of the chosen token; alternatives are not offered")
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=0, description="0: raw logprobs of the prompt's own tokens")


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_TEXT)


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    tools: None = None


class PauseRequest(BaseModel):
    """POST /control/pause."""

    model_config = ConfigDict(extra="forbid")

    mode: PauseMode = PauseMode.KEEP
    timeout_s: Real | None = Field(None, gt=0, le=3600)


class UpdateRequest(BaseModel):
    """POST /control/update_weights: `path` is a published version under the server's weights folder."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, max_length=4096)
    clear_cache: bool


class FaultSpec(BaseModel):
    """A fault by name, with the numbers it takes."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)
    values: dict[str, Real | Annotated[str, Field(max_length=256)]] = Field({}, max_length=16)

    def to_fault(self) -> Fault:
        """Return the record."""
        return Fault(name=self.name, values=dict(self.values))


class FaultsRequest(BaseModel):
    """POST /control/faults: what is broken from now on, instead of what was before; none heals."""

    model_config = ConfigDict(extra="forbid")

    faults: list[FaultSpec] = Field(max_length=8)


class RowToScore(BaseModel):
    """A prompt and the completion to score."""

    model_config = ConfigDict(extra="forbid")

    prompt_token_ids: TokenIds
    completion_token_ids: TokenIds


class ScoreRequest(BaseModel):
    """POST /control/score."""

    model_config = ConfigDict(extra="forbid")

    rows: list[RowToScore] = Field(min_length=1, max_length=1024)


def capabilities_to_json(capabilities: EngineCapabilities) -> dict[str, object]:
    """Declared capabilities, sets as sorted lists."""
    values = {f.name: getattr(capabilities, f.name) for f in fields(EngineCapabilities)}
    return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in values.items()}


def capabilities_from_json(content: Mapping[str, Any]) -> EngineCapabilities:
    """Read them back; what is absent is not declared. Raises EngineError when it is no such record."""
    known = {f.name for f in fields(EngineCapabilities)}
    values: dict[str, Any] = {n: frozenset(v) if isinstance(v, list) else v for n, v in content.items() if n in known}
    try:
        values["logprob_kinds"] = frozenset(LogprobKind(kind) for kind in values["logprob_kinds"])
        values["pause_modes"] = frozenset(PauseMode(mode) for mode in values.get("pause_modes", ()))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the server declares no capabilities that can be read: {error}") from None
    return EngineCapabilities(**values)


def runs_of(values: Sequence[int]) -> list[list[int]]:
    """[3, 3, 4] as [[3, 2], [4, 1]]."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def rollout_to_json(result: Rollout | RolloutFailure) -> dict[str, object]:
    """A record as JSON without its prompt, which the client has."""
    if isinstance(result, RolloutFailure):
        return {"failure": result.reason}
    return {
        "token_ids": list(result.token_ids),
        "behaviour_logprobs": list(result.behaviour_logprobs),
        "raw_logprobs": None if result.raw_logprobs is None else list(result.raw_logprobs),
        "log_kept_masses": None if result.log_kept_masses is None else list(result.log_kept_masses),
        "logprob_kind": result.logprob_kind.value,
        "weight_versions": runs_of(result.weight_versions),
        "seed": result.sampling.seed,
        "finish_reason": result.finish_reason,
        "kv": result.kv.value,
        "cache_lives": [{"first_token": life.first_token, "runs": life.runs} for life in result.cache_lives],
    }


def rollout_from_json(
    content: Mapping[str, Any], prompt: Prompt, sampling: SamplingParams, engine: str
) -> Rollout | RolloutFailure:
    """Read what `rollout_to_json` wrote. Raises EngineError when it is not that, RecordError when it is misaligned."""
    if "failure" in content:
        return RolloutFailure(prompt_id=prompt.prompt_id, reason=str(content["failure"]))
    try:
        return Rollout(
            prompt=prompt,
            token_ids=tuple(content["token_ids"]),
            behaviour_logprobs=tuple(content["behaviour_logprobs"]),
            raw_logprobs=tuple(content["raw_logprobs"]),
            log_kept_masses=tuple(content["log_kept_masses"]),
            logprob_kind=LogprobKind(content["logprob_kind"]),
            weight_versions=tuple(v for v, n in content["weight_versions"] for _ in range(n)),
            sampling=replace(sampling, seed=content["seed"]),
            finish_reason=content["finish_reason"],
            engine=engine,
            kv=KVState(content["kv"]),
            cache_lives=tuple(
                CacheLife(first_token=life["first_token"], runs=tuple((v, n) for v, n in life["runs"]))
                for life in content["cache_lives"]
            ),
        )
    except RecordError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{engine} sent no complete rollout: {error}") from None
