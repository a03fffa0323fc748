"""The table of what each engine can do, made from what each declares; docs/engines.md holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from trueup.engines.base import EngineCapabilities
from trueup.engines.embedded.options import CAPABILITIES as EMBEDDED
from trueup.engines.openai_http import capabilities_of
from trueup.engines.vllm_v1 import CAPABILITIES as VLLM
from trueup.types import LogprobKind

ENGINES: Mapping[str, EngineCapabilities] = {
    "embedded": EMBEDDED,
    "embedded, bitwise": replace(EMBEDDED, bitwise=True),
    "vLLM 0.32, 0.18.1": VLLM,
    "any OpenAI server": capabilities_of(LogprobKind.PROCESSED, scores=True),
}
WORDS = {
    "logprob_kinds": "logprobs may be of",
    "sampling_fields": "sampling fields honoured",
    "raw_logprobs": "raw logprob beside the behaviour logprob",
    "kept_mass": "mass of the kept set",
    "seeds": "same seed, same tokens, whoever is beside it",
    "scores": "scores given tokens",
    "pause_modes": "pause",
    "updates": "takes new weights while it runs",
    "clears_cache": "an update can clear the cache",
    "keeps_cache": "an update can keep the cache",
    "weight_versions": "stamps every token with its version",
    "cache_lives": "tells which version wrote each cached position",
    "bitwise": "equal to the trainer to the last bit",
}


def capability_table() -> str:
    """The table in Markdown, a row for each field of EngineCapabilities."""
    lines = [f"| | {' | '.join(ENGINES)} |", "|---" * (len(ENGINES) + 1) + "|"]
    for field in fields(EngineCapabilities):
        cells = [_cell(field.name, getattr(capabilities, field.name)) for capabilities in ENGINES.values()]
        lines.append(f"| {WORDS[field.name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    assert isinstance(value, frozenset)
    if name == "sampling_fields":
        return "all" if value == EngineCapabilities(logprob_kinds=frozenset()).sampling_fields else str(len(value))
    return ", ".join(sorted(str(v.value) for v in value)) or "-"
