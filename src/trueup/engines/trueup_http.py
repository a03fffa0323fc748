"""The embedded engine in another process: `trueup serve` behind the engine protocol, nothing lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trueup.engines.base import (
    DEFAULT_TIMEOUT_S,
    EngineStatus,
    GenerationRequest,
    PauseMode,
    Result,
    Scores,
    UpdateReceipt,
    require,
)  # fmt: skip
from trueup.engines.embedded.options import Fault
from trueup.engines.embedded.wire import capabilities_from_json, rollout_from_json
from trueup.engines.http import QUICK_TIMEOUT_S
from trueup.engines.openai_http import OpenAIEngine
from trueup.errors import EngineError
from trueup.model.scoring import ScoredRow
from trueup.types import LogprobKind, SamplingParams

NAME = "trueup"
STATUS_TIMEOUT_S = 10.0
GRACE_S = 5.0
"""How much longer than the server the client waits, so that the server's own words arrive."""


class TrueupEngine(OpenAIEngine):
    """See engines/base.py for the protocol. The server declares its own capabilities."""

    def __init__(self, url: str, *, token: str) -> None:
        """Connect. Raises EngineError when nobody answers, or it is no trueup server, or the token is wrong."""
        super().__init__(url, kind=LogprobKind.PROCESSED, token=token)
        self.name = NAME
        content = self._http.get("/control/status")
        self.capabilities = capabilities_from_json(content.get("capabilities") or {})

    def score(self, rows: Sequence[ScoredRow], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Scores]:
        """See Engine.score. Raises EngineError."""
        require(self.capabilities, "scores", self.name)
        body = {
            "rows": [
                {"prompt_token_ids": list(row.prompt_ids), "completion_token_ids": list(row.completion_ids)}
                for row in rows
            ]
        }
        content = self._http.post("/control/score", body, timeout_s=timeout_s)
        try:
            return [Scores(logprobs=tuple(s["logprobs"]), version=s["version"]) for s in content["scores"]]
        except (KeyError, TypeError):
            raise EngineError(f"{self._http.url} sent no scores") from None

    def pause(self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """See Engine.pause."""
        body = {"mode": PauseMode(mode).value, "timeout_s": timeout_s}
        self._http.post("/control/pause", body, timeout_s=timeout_s + GRACE_S)

    def resume(self) -> None:
        """See Engine.resume."""
        self._http.post("/control/resume", {}, timeout_s=QUICK_TIMEOUT_S)

    def clear_cache(self) -> None:
        """Forget every key and value: running sequences are computed again, prefixes are dropped."""
        self._http.post("/control/clear_cache", {}, timeout_s=QUICK_TIMEOUT_S)

    def update_weights(self, path: Path, *, clear_cache: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> UpdateReceipt:
        """See Engine.update_weights; the server reads `path` itself, under the folder that it was given."""
        body = {"path": str(path.absolute()), "clear_cache": clear_cache}
        content = self._http.post("/control/update_weights", body, timeout_s=timeout_s)
        return UpdateReceipt(**content | {"verified_by": tuple(content["verified_by"])})

    def plant(self, faults: Sequence[Fault]) -> None:
        """Break the engine on purpose, instead of what was broken before; none heals. Raises EngineError."""
        body = {"faults": [{"name": fault.name, "values": dict(fault.values)} for fault in faults]}
        self._http.post("/control/faults", body, timeout_s=QUICK_TIMEOUT_S)

    def status(self) -> EngineStatus:
        """See Engine.status."""
        content = self._http.get("/control/status", timeout_s=STATUS_TIMEOUT_S)
        content.pop("capabilities", None)
        return EngineStatus(**content)

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        limit = request.sampling.max_tokens
        known = request if limit is not None else replace(request, sampling=replace(request.sampling, max_tokens=1))
        return super()._body(known) | {"return_rollout": True, "max_tokens": limit}

    def _read(self, choice: dict[str, Any], request: GenerationRequest, sample: int) -> Result:
        sampling: SamplingParams = request.sampling
        return rollout_from_json(choice.get("rollout") or {}, request.prompt, sampling, self.name)
