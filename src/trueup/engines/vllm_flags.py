"""What a vLLM was asked to be, against what it says it is and what it is seen to do.

A flag is *verified* when a probe shows it, *reported* when the server's own configuration holds it and nothing could be
probed, *untested* when it can be neither read nor probed, and *differs* when either says otherwise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trueup.engines.http import HttpClient
from trueup.engines.vllm_plugin import SWITCH
from trueup.errors import EngineError
from trueup.knobs import VllmConfig

TIMEOUT_S = 120.0
LONG_PROMPT = 300
"""More than two blocks of the CPU's cache, which holds 128 tokens a block."""
ALTERNATIVES = 20
BF16_GRID = 2.0**-8
"""Logits of magnitude 1/2 and more are multiples of this in bfloat16, and so are the differences of their logprobs."""
ON_GRID = 2e-5
CERTAINLY = 1e-5
MOST_EQUALS = 4
FIRST_ID = 5


@dataclass(frozen=True, kw_only=True)
class FlagReport:
    """One flag: what was asked, what the server's configuration holds, what a probe found (None: not known)."""

    flag: str
    asked: object
    reported: object
    found: object

    @property
    def state(self) -> str:
        """verified, reported, untested or differs (see the top of this file)."""
        known = [value for value in (self.reported, self.found) if value is not None]
        if any(value != self.asked for value in known):
            return "differs"
        return "verified" if self.found is not None else "reported" if known else "untested"


def report_flags(config: VllmConfig, http: HttpClient, model: str, max_length: int) -> list[FlagReport]:
    """Every flag that decides numbers. A probe that fails leaves its flag as the server reports it."""
    try:
        info = http.get("/server_info?config_format=json", timeout_s=TIMEOUT_S)["vllm_config"]
    except (EngineError, KeyError, TypeError):
        info = {}
    ask = Asker(http, model)
    probes: dict[str, Callable[[], object]] = {
        "logprobs-mode": ask.logprobs_mode,
        "fp32 head": ask.fp32_head,
        "enable-prefix-caching": lambda: ask.prefix_caching() if max_length > LONG_PROMPT else None,
    }
    asked = {
        "logprobs-mode": config.logprobs_mode, "dtype": config.dtype, "fp32 head": config.head == "float32",
        "generation-config": "vllm", "enable-prefix-caching": config.prefix_caching,
        "async-scheduling": config.async_scheduling,
    }  # fmt: skip
    reported = reported_flags(info)
    return [
        FlagReport(flag=flag, asked=value, reported=reported.get(flag), found=_quietly(probes.get(flag)))
        for flag, value in asked.items()
    ]


def reported_flags(info: Mapping[str, Any]) -> dict[str, object]:
    """The same flags out of a server's own configuration ({}: it shows none)."""
    model, cache = info.get("model_config") or {}, info.get("cache_config") or {}
    scheduler, extra = info.get("scheduler_config") or {}, info.get("additional_config") or {}
    if not model:
        return {}
    dtype = str(model.get("dtype")).removeprefix("torch.")
    overrides = model.get("hf_overrides")
    native = overrides.get("head_dtype") if isinstance(overrides, dict) else None
    return {
        "logprobs-mode": model.get("logprobs_mode"),
        "dtype": dtype,
        "fp32 head": bool(extra.get(SWITCH)) or (native or dtype) == "float32",
        "generation-config": model.get("generation_config"),
        "enable-prefix-caching": cache.get("enable_prefix_caching"),
        "async-scheduling": scheduler.get("async_scheduling"),
    }


class Asker:
    """Probes of one server by completions alone; each raises EngineError or another error of reading an answer."""

    def __init__(self, http: HttpClient, model: str) -> None:
        self._http, self._model = http, model

    def logprobs_mode(self) -> str:
        """With one token kept, a processed logprob is 0 (less among equals, which are kept too); a raw one is not."""
        choice = self._complete([FIRST_ID, FIRST_ID + 1], max_tokens=16, top_k=1, temperature=0.7, logprobs=0)
        values = choice["logprobs"]["token_logprobs"]
        return "processed_logprobs" if all(is_one_of_few(v) for v in values) else "raw_logprobs"

    def fp32_head(self) -> bool | None:
        """Differences of logprobs at one position are differences of logits: on a bfloat16 head's grid, or not."""
        choice = self._complete([FIRST_ID, FIRST_ID + 1], max_tokens=16, temperature=1.0, logprobs=ALTERNATIVES)
        gaps = [
            max(values) - value
            for values in (list(top.values()) for top in choice["logprobs"]["top_logprobs"])
            for value in values
            if value < max(values)
        ]
        if len(gaps) < ALTERNATIVES:
            return None
        on_grid = sum(abs(gap / BF16_GRID - round(gap / BF16_GRID)) * BF16_GRID < ON_GRID for gap in gaps) / len(gaps)
        return False if on_grid > 0.9 else True if on_grid < 0.1 else None

    def prefix_caching(self) -> bool | None:
        """Whether a long prompt that was just asked is computed again."""
        chooser = random.Random()
        prompt = [FIRST_ID + chooser.randrange(64) for _ in range(LONG_PROMPT)]
        for _ in range(2):
            usage = self._answer(prompt, max_tokens=1, temperature=1.0)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return None if cached is None else cached > 0

    def _complete(self, prompt: list[int], **fields: object) -> dict[str, Any]:
        choice: dict[str, Any] = self._answer(prompt, ignore_eos=True, return_tokens_as_token_ids=True, **fields)[
            "choices"
        ][0]
        return choice

    def _answer(self, prompt: list[int], **fields: object) -> dict[str, Any]:
        body = {"model": self._model, "prompt": prompt, **fields}
        content: dict[str, Any] = self._http.post("/v1/completions", body, timeout_s=TIMEOUT_S)
        return content


def is_one_of_few(logprob: float) -> bool:
    """Whether it is that of a draw from one token or from a few that are equal, as a bfloat16 head makes them."""
    return any(abs(logprob + math.log(equals)) < CERTAINLY for equals in range(1, MOST_EQUALS + 1))


def _quietly(probe: Callable[[], object] | None) -> object:
    try:
        return None if probe is None else probe()
    except (EngineError, AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None
