"""What an embedded engine is set up with, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trueup.engines.base import EngineCapabilities, PauseMode
from trueup.errors import ConfigError
from trueup.types import LogprobKind

NAME = "embedded"
CAPABILITIES = EngineCapabilities(
    logprob_kinds=frozenset({LogprobKind.PROCESSED, LogprobKind.RAW}),
    raw_logprobs=True,
    kept_mass=True,
    seeds=True,
    scores=True,
    pause_modes=frozenset(PauseMode),
    updates=True,
    clears_cache=True,
    keeps_cache=True,
    weight_versions=True,
    cache_lives=True,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How an embedded engine is set up. `max_length` None: what the model allows, at most 2,048."""

    dtype: torch.dtype = torch.bfloat16
    head_dtype: torch.dtype = torch.float32
    slots: int = 64
    max_length: int | None = None
    step_tokens: int = 2048
    prefix_cache: bool = True
    prefix_tokens: int = 65536
    bitwise: bool = False
    weights_root: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something to break on purpose (faults.py), with the numbers or names it takes."""

    name: str
    values: Mapping[str, float | str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read what `title` writes. Raises ConfigError for words that are no name=value."""
        name, *words = text.split()
        values: dict[str, float | str] = {}
        for word in words:
            key, sign, value = word.partition("=")
            if not sign:
                raise ConfigError(f"fault {text!r}: {word!r} is no name=value")
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = value
        return cls(name=name, values=values)

    def title(self) -> str:
        """Return e.g. "window width=24"."""
        return " ".join(
            [self.name, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.values.items())]
        )
