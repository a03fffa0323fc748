"""What a running vLLM says of itself, as far as an engine needs it.

Its configuration is shown by the development endpoints only, which the control plane needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trueup.engines.base import GenerationRequest
from trueup.engines.vllm_completion import COMPLETERS
from trueup.errors import EngineError
from trueup.types import LogprobKind

TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class VllmFacts:
    """What a running vLLM says of itself."""

    version: str
    model: str
    kind: LogprobKind
    dtype: torch.dtype
    max_length: int
    slots: int
    capacity_tokens: int
    block_tokens: int
    prefix_caching: bool
    whole_prefill: bool

    def blocks(self, tokens: int) -> int:
        """Tokens of cache that a sequence of `tokens` holds: whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens

    def require_room(self, request: GenerationRequest, vocab: int) -> None:
        """Raise EngineError for a request that can never run: too long, or ids outside the vocabulary."""
        ids, wanted = request.prompt.token_ids, request.sampling.max_tokens or 1
        if len(ids) + wanted > self.max_length:
            raise EngineError(
                f"a prompt of {len(ids)} tokens and {wanted} more exceed the engine's length of {self.max_length}"
            )
        if max(ids) >= vocab:
            raise EngineError(f"token id {max(ids)} is outside the model's vocabulary of {vocab}")


def read_facts(get: Callable[..., Any], model: str) -> VllmFacts:
    """Ask a server what it is. Raises EngineError for a version that was never tried, or a closed control plane."""
    version = str(get("/version").get("version"))
    if minor(version) not in COMPLETERS:
        raise EngineError(
            f"vLLM {version}: its control plane was never tried; use one of {', '.join(COMPLETERS)} "
            "(trueup vllm serve --version), or check it with trueup check"
        )
    try:
        info = get("/server_info?config_format=json", timeout_s=TIMEOUT_S)["vllm_config"]
    except (EngineError, KeyError, TypeError) as error:
        raise EngineError(
            f"vLLM's control plane is closed ({error}): start it with trueup vllm serve, or with VLLM_SERVER_DEV_MODE=1"
        ) from None
    try:
        config, cache, scheduler = info["model_config"], info["cache_config"], info["scheduler_config"]
        mode = str(config["logprobs_mode"])
        kinds = {"processed_logprobs": LogprobKind.PROCESSED, "raw_logprobs": LogprobKind.RAW}
        if mode not in kinds:
            raise EngineError(f"vLLM reports {mode}: start it with --logprobs-mode processed_logprobs")
        block = int(cache["block_size"])
        return VllmFacts(
            version=version, model=model, kind=kinds[mode],
            dtype=getattr(torch, str(config["dtype"]).removeprefix("torch.")),
            max_length=int(config["max_model_len"]), slots=int(scheduler["max_num_seqs"]),
            capacity_tokens=block * (int(cache["num_gpu_blocks"]) - 1), block_tokens=block,
            prefix_caching=bool(cache["enable_prefix_caching"]),
            whole_prefill=not scheduler["enable_chunked_prefill"],
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"vLLM {version} describes itself in a way that cannot be read ({error!r})") from None


def minor(version: str) -> str:
    """Return "0.32" for "0.32.0"."""
    return ".".join(version.split(".")[:2])
