"""Records handed from one subsystem to the next: frozen, keyword-only, checked when they are made.

Alignment rule, everywhere: entry `t` of any per-token array describes completion token `t`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

from trueup.errors import RecordError

MAX_REAL = 1e30
MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-3
"""Lowest temperature above 0 (greedy) that is sampled at; vLLM raises anything lower to 0.01."""
MAX_REPETITION_PENALTY = 1e3
"""It multiplies or divides logits: beyond this (or below its inverse) they leave float32."""
ROW_TILE = 16
"""Rows of a matrix product in bitwise mode, in the body and in the head."""
LOGPROB_SLACK = 1e-4
"""A logprob may exceed 0 by this many nats (float32 rounding of logit minus logsumexp), never by more."""


class LogprobKind(StrEnum):
    """What an engine's number means: a logprob of which distribution?"""

    RAW = "raw"
    """log_softmax of the model's own logits: no temperature, no penalties, no truncation."""
    TEMPERED = "tempered"
    """log_softmax of logits / T over the full vocabulary: no penalties, no truncation (what TRL and verl compute)."""
    PROCESSED = "processed"
    """Of the distribution the token was drawn from: penalties, temperature, then renormalised on the kept set."""


class KVState(StrEnum):
    """What is known of the cache a rollout attended to when weights changed under it."""

    KEPT = "kept"
    CLEARED = "cleared"
    UNKNOWN = "unknown"


def is_real(value: object) -> bool:
    """True for a finite int or float of sane size; False for bool, NaN, infinity and everything else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_REAL <= value <= MAX_REAL


def is_integer(value: object) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


def _require_ids(name: str, ids: Sequence[int]) -> None:
    _require(all(is_integer(i) and i >= 0 for i in ids), f"{name} must be non-negative integers")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a completion is sampled, in vLLM's vocabulary.

    `temperature` 0 is greedy. `top_p` 1, `top_k` 0 (or -1 or None when parsed), `min_p` 0, `repetition_penalty` 1,
    `presence_penalty` 0 and `frequency_penalty` 0 are off. Repetition sees prompt and completion, presence and
    frequency the completion only. Raises RecordError when a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        reals = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in reals:
            _require(is_real(getattr(self, name)), f"{name} must be a finite number, not {getattr(self, name)!r}")
        _require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"temperature must be 0 (greedy) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}], not {self.temperature}",
        )
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}; 1 turns it off")
        _require(
            is_integer(self.top_k) and 0 <= self.top_k < 2**31,
            f"top_k must be 0 (off) or a positive integer, not {str(self.top_k)[:40]}",
        )
        _require(0 <= self.min_p <= 1, f"min_p must lie in [0, 1], not {self.min_p}")
        _require(
            1 / MAX_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must lie in [{1 / MAX_REPETITION_PENALTY:g}, {MAX_REPETITION_PENALTY:g}], "
            f"not {self.repetition_penalty}; 1 turns it off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, f"{name} must lie in [-2, 2], not {getattr(self, name)}")
        _require(
            self.max_tokens is None or (is_integer(self.max_tokens) and self.max_tokens >= 1),
            f"max_tokens must be a positive integer, not {self.max_tokens!r}",
        )
        _require(self.seed is None or is_integer(self.seed), f"seed must be an integer, not {self.seed!r}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens are cut from the distribution (top-p, top-k or min-p in force)."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether tokens already seen change the distribution."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def transforms(self) -> bool:
        """Whether raw and processed logprobs differ at all."""
        return self.temperature != 1 or self.truncates or self.penalises

    def label(self) -> str:
        """Return the fields that shape the distribution, e.g. "temperature=0.7 top_p=0.9"."""
        defaults = SamplingParams()
        skip = ("max_tokens", "stop", "seed", "temperature")
        parts = [f"temperature={self.temperature:g}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in skip and value != getattr(defaults, field.name):
                parts.append(f"{field.name}={value:g}")
        return " ".join(parts)


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
OFF_AT_ONE = frozenset({"num_beams", "guidance_scale", "encoder_repetition_penalty", "typical_p"})
SHAPING_FIELDS = frozenset(
    {
        # Hugging Face's generate
        "min_new_tokens",
        "min_length",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "force_words_ids",
        "sequence_bias",
        "no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "penalty_alpha",
        "guidance_scale",
        "num_beams",
        # SGLang
        "json_schema",
        "regex",
        "ebnf",
        "structural_tag",
        "custom_logit_processor",
        # vLLM and OpenAI
        "grammar",
        "logit_bias",
        "min_tokens",
        "bad_words",
        "allowed_token_ids",
        "logits_processors",
        "guided_decoding",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "response_format",
        "typical_p",
        "structured_outputs",
        "top_a",
        "epsilon_cutoff",
        "eta_cutoff",
        "mirostat_mode",
        "dry_multiplier",
        "xtc_probability",
        "length_penalty",
        "use_beam_search",
        "thinking_token_budget",
        "repetition_detection",
    }
)
"""Request fields that change the distribution of a token and are not modelled; any other unknown field is inert."""


def parse_sampling(fields_given: Mapping[str, object]) -> tuple[SamplingParams, tuple[str, ...]]:
    """Read request fields as an engine would: (parameters, fields in force that trueup does not model).

    `top_k` -1, 0 and None are off; a None field is unset. SHAPING_FIELDS are returned, not refused, so that a check
    can say that it could not account for them; other fields are passed over. Raises RecordError.
    """
    known: dict[str, object] = {}
    unmodelled: list[str] = []
    for name, value in fields_given.items():
        if value is None:
            continue
        if name not in SAMPLING_FIELDS:
            off = value in (0, 0.0, False, "", [], {}) or (name in OFF_AT_ONE and value == 1)
            if name in SHAPING_FIELDS and not off:
                unmodelled.append(name)
            continue
        if name == "top_k" and value == -1:
            value = 0
        if name == "stop":
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        known[name] = value
    if fields_given.get("do_sample") is False:  # Hugging Face and SGLang: greedy, whatever the temperature says
        known["temperature"] = 0.0
    try:
        return SamplingParams(**known), tuple(sorted(unmodelled))  # type: ignore[arg-type]
    except TypeError as error:
        raise RecordError(f"sampling: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A task's question as token ids; `answer` is what the task scores against (None if it needs none)."""

    prompt_id: str
    task: str
    token_ids: tuple[int, ...]
    answer: str | None = None

    def __post_init__(self) -> None:
        _require(len(self.token_ids) > 0, f"prompt {self.prompt_id!r} has no tokens")
        _require_ids("prompt token_ids", self.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLife:
    """One life of a rollout's cache, from a clearing (or the start) to the next one.

    Completion tokens from `first_token` on attended to it. `runs` are (weight version, number of positions) of the keys
    and values in it, from position 0 of the prompt on.
    """

    first_token: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _require(is_integer(self.first_token) and self.first_token >= 0, "first_token must be an integer >= 0")
        _require(
            all(is_integer(v) and v >= 0 and is_integer(n) and n > 0 for v, n in self.runs),
            "cache runs must be (version >= 0, positions > 0)",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One completion as the engine produced it, every per-token array of the completion's length T.

    `behaviour_logprobs` (nats) are what the engine reported, of the kind `logprob_kind`; `raw_logprobs` the same at
    T=1 without processing and `log_kept_masses` the log of the mass that top-p and the like kept, where the engine
    gives them. `weight_versions[t]` made token t; `cache_lives` say which versions wrote the keys and values it saw,
    where the engine knows. Misaligned, empty or non-finite input raises RecordError: such a rollout never enters
    training.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    logprob_kind: LogprobKind
    weight_versions: tuple[int, ...]
    sampling: SamplingParams
    finish_reason: str
    engine: str
    raw_logprobs: tuple[float, ...] | None = None
    log_kept_masses: tuple[float, ...] | None = None
    kv: KVState = KVState.UNKNOWN
    cache_lives: tuple[CacheLife, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.token_ids)
        _require(count > 0, "a rollout needs at least one completion token")
        _require_ids("completion token_ids", self.token_ids)
        for name in ("behaviour_logprobs", "weight_versions", "raw_logprobs", "log_kept_masses"):
            values = getattr(self, name)
            if values is not None:
                _require(len(values) == count, f"{name} has {len(values)} entries for {count} completion tokens")
        for name in ("behaviour_logprobs", "raw_logprobs", "log_kept_masses"):
            values = getattr(self, name)
            if values is not None:
                _require(
                    all(is_real(v) and v <= LOGPROB_SLACK for v in values),
                    f"{name} must be finite and at most 0 (within {LOGPROB_SLACK} nats)",
                )
        _require(all(is_integer(v) and v >= 0 for v in self.weight_versions), "weight_versions must be integers >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt with their rewards; lag counts from `oldest_version`, its oldest token."""

    rollouts: tuple[Rollout, ...]
    rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(len(self.rollouts) > 0, "a rollout group needs at least one rollout")
        _require(
            len(self.rewards) == len(self.rollouts), f"{len(self.rewards)} rewards for {len(self.rollouts)} rollouts"
        )
        _require(all(is_real(r) for r in self.rewards), "rewards must be finite")
        _require(len({r.prompt for r in self.rollouts}) == 1, "a rollout group has one prompt")

    @property
    def oldest_version(self) -> int:
        """Smallest weight version of any token in the group."""
        return min(min(r.weight_versions) for r in self.rollouts)

    @property
    def spans_update(self) -> bool:
        """Whether weights changed inside at least one rollout."""
        return any(len(set(r.weight_versions)) > 1 for r in self.rollouts)
