"""prime-rl training samples as a trace for `trueup check --trace`. Written from its field names and tried on
samples of that shape, not in prime-rl itself.

Samples are the records that the orchestrator sends to the trainer:

    write_trace(Path("prime.jsonl"), rows_of(samples, temperature=1.0))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def rows_of(samples: Iterable[Any], *, temperature: float) -> Iterator[dict[str, Any]]:
    """Yield one record of `trueup.trace/1` per sample; tokens of tools keep their place, with mask 0."""
    for sample in samples:
        yield {
            "engine": {"name": "vllm", "api": "V1"},
            "sampling": {"temperature": temperature},
            "prompt_token_ids": list(sample.prompt_ids),
            "completion_token_ids": list(sample.completion_ids),
            "completion_logprobs": list(sample.completion_logprobs),
            "mask": [int(m) for m in sample.completion_mask],
        }
