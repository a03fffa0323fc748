"""Static reading of a declared recipe: what can be known to be wrong before any token is made. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from trueup.knobs import Config
from trueup.trace import EngineInfo
from trueup.types import LogprobKind, SamplingParams

TRAINERS = {
    "processed": LogprobKind.PROCESSED,
    "tempered": LogprobKind.TEMPERED,
    "raw": LogprobKind.RAW,
    "trl": LogprobKind.TEMPERED,
    "verl": LogprobKind.TEMPERED,
}
"""What a named trainer computes: TRL and verl divide logits by T and ignore top-p, top-k, min-p and penalties."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a user declares: engine flags, sampling, and what the trainer computes. None means not declared."""

    engine: EngineInfo
    sampling: SamplingParams
    trainer: LogprobKind
    logprobs_mode: str | None = None
    prefix_caching: bool | None = None
    cache_cleared: bool | None = None
    cache_salted: bool | None = None
    async_scheduling: bool | None = None
    updates_in_flight: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One finding of the linter: the cause it would lead to and the flag to set."""

    id: str
    message: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        """Return the JSON form."""
        return {"id": self.id, "message": self.message, "fix": self.fix}


def flag_of(flags: Mapping[str, object], *names: str) -> object:
    """Return an engine flag however it is spelled: dtype, --dtype, logprobs_mode, logprobs-mode; None if absent."""
    for name in names:
        for spelling in (name, name.replace("_", "-"), f"--{name.replace('_', '-')}"):
            if spelling in flags:
                return flags[spelling]
    return None


def as_mapping(value: object) -> Mapping[str, object]:
    """Return a flag's value that is a mapping, or JSON text of one; an empty mapping for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, Mapping) else {}


def _truth(value: object) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(str(value).lower()) if value is not None else None


def recipe_of_engine(engine: EngineInfo, sampling: SamplingParams, trainer: LogprobKind) -> Recipe:
    """Read the recipe out of the flags an engine recorded; what it did not record stays undeclared."""
    mode = flag_of(engine.flags, "logprobs_mode")
    return Recipe(
        engine=engine,
        sampling=sampling,
        trainer=trainer,
        logprobs_mode=str(mode) if mode is not None else None,
        prefix_caching=_truth(flag_of(engine.flags, "enable_prefix_caching")),
        async_scheduling=_truth(flag_of(engine.flags, "async_scheduling")),
    )


def recipe_of_config(config: Config) -> Recipe:
    """Read the recipe out of a configuration file's [engine], [sampling] and [check] trainer."""
    engine = config.engine
    return Recipe(
        engine=EngineInfo(name=engine.name, version=engine.version, api=engine.api),
        sampling=SamplingParams(**config.sampling.model_dump()),
        trainer=TRAINERS[config.check.trainer],
        logprobs_mode=engine.logprobs_mode,
        prefix_caching=engine.enable_prefix_caching,
        cache_cleared=engine.clear_cache_on_update,
        cache_salted=engine.salt_cache_with_version,
        async_scheduling=engine.async_scheduling,
        updates_in_flight=engine.updates_in_flight,
    )


def lint(recipe: Recipe) -> list[Advice]:
    """Return what the declared recipe will do wrong, most direct first."""
    found = []
    sampling, trainer = recipe.sampling, recipe.trainer
    is_v1 = recipe.engine.name == "vllm" and recipe.engine.api != "V0"
    mode = recipe.logprobs_mode or ("raw_logprobs" if is_v1 else None)
    default = "" if recipe.logprobs_mode else " (vLLM V1's default, none was set)"
    if mode and mode.startswith("raw") and sampling.transforms and trainer != LogprobKind.RAW:
        found.append(
            Advice(
                id="S1",
                message=f"logprobs_mode is {mode}{default} while {sampling.label()} changes the distribution",
                fix="--logprobs-mode processed_logprobs",
            )
        )
    if mode and "logits" in mode:
        found.append(
            Advice(
                id="S1",
                message=f"logprobs_mode is {mode}: logits are no logprobs",
                fix="--logprobs-mode processed_logprobs",
            )
        )
    if trainer == LogprobKind.RAW and sampling.temperature not in (0, 1):
        found.append(
            Advice(
                id="S2",
                message=f"sampling at temperature {sampling.temperature:g} while the trainer does not divide by it",
                fix="divide the trainer's logits by the temperature, or sample at 1",
            )
        )
    if sampling.truncates and trainer != LogprobKind.PROCESSED:
        found.append(
            Advice(
                id="S4",
                message=f"{sampling.label()} truncates while the trainer scores the full vocabulary",
                fix="set top_p=1, top_k=0, min_p=0, or replay the sampling mask",
            )
        )
    if sampling.penalises and trainer != LogprobKind.PROCESSED:
        found.append(
            Advice(
                id="S6",
                message="penalties are on while the trainer ignores them",
                fix="turn penalties off for rollouts",
            )
        )
    caching = (
        recipe.prefix_caching
        if recipe.prefix_caching is not None
        else (True if is_v1 and recipe.updates_in_flight else None)
    )
    if caching and recipe.updates_in_flight is not False and not recipe.cache_cleared and not recipe.cache_salted:
        found.append(
            Advice(
                id="W12",
                message="prefix caching is on, not cleared and not salted at a weight update: hits reuse old weights",
                fix="--no-enable-prefix-caching, or clear the cache, or salt it with the weight version",
            )
        )
    return found
