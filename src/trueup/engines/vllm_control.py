"""vLLM's control plane, which its development endpoints open: the same words in 0.32 and 0.18.1.

Every call but `answers` raises EngineError when it fails or takes longer than `timeout_s`.
"""

from __future__ import annotations

from pathlib import Path

from trueup.engines.base import PauseMode
from trueup.engines.http import HttpClient
from trueup.errors import EngineError

TIMEOUT_S = 60.0


def pause(http: HttpClient, mode: PauseMode, *, timeout_s: float = TIMEOUT_S) -> None:
    """Stop taking steps; what is cached stays, and is cleared by `clear_cache` alone."""
    http.post(f"/pause?mode={mode.value}&clear_cache=false", {}, timeout_s=timeout_s)


def is_paused(http: HttpClient, *, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether it stands still."""
    return bool(http.get("/is_paused", timeout_s=timeout_s)["is_paused"])


def answers(http: HttpClient) -> bool:
    """Whether there is still a server."""
    try:
        is_paused(http)
    except EngineError:
        return False
    return True


def resume(http: HttpClient, *, timeout_s: float = TIMEOUT_S) -> None:
    """Take steps again."""
    http.post("/resume", {}, timeout_s=timeout_s)


def reload(http: HttpClient, folder: Path, *, timeout_s: float = TIMEOUT_S) -> None:
    """Load the weights of a folder in place; vLLM must stand still."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    http.post("/collective_rpc", body, timeout_s=timeout_s)


def clear_cache(http: HttpClient, *, timeout_s: float = TIMEOUT_S) -> None:
    """Forget cached prompts, and keys and values of running requests: they are computed again."""
    http.post("/reset_prefix_cache?reset_running_requests=true", {}, timeout_s=timeout_s)
