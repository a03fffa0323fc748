"""HTTP as every remote engine uses it: bearer token, a timeout on every call, errors in the server's own words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from trueup.errors import EngineError, UnsupportedByEngine, WeightError

CONNECT_TIMEOUT_S = 10.0
QUICK_TIMEOUT_S = 30.0
CONNECTIONS = 256


class HttpClient:
    """JSON over HTTP to one server; may be used from several threads."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        """`url` is the server's root, with or without /v1. Raises EngineError when it is no http(s) address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise EngineError(f"{url!r} is no engine address; expected http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise EngineError(f"{url!r} is no engine address: {error}") from None
        self._client = httpx.Client(base_url=self.url, headers=headers, limits=limits, trust_env=False)

    def get(self, path: str, *, timeout_s: float = QUICK_TIMEOUT_S) -> Any:
        """Return the answer's JSON. Raises EngineError."""
        return self._json("GET", path, None, timeout_s)

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Send JSON and return the answer's. Raises EngineError."""
        return self._json("POST", path, body, timeout_s)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        timeout = httpx.Timeout(max(timeout_s, 0.001), connect=min(CONNECT_TIMEOUT_S, max(timeout_s, 0.001)))
        try:
            answer = self._client.request(method, path, json=body, timeout=timeout)
            content = answer.json() if answer.content else {}
        except httpx.TimeoutException:
            raise EngineError(f"{self.url}{path} took longer than allowed ({timeout_s:g} s)") from None
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}{path} cannot be reached: {error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise EngineError(f"{self.url}{path} answered {answer.status_code} without JSON") from None
        if answer.status_code >= 400:
            kind, message = _error(content)
            raise kind(f"{self.url}{path}: {answer.status_code}: {message}")
        return content


def _error(content: Any) -> tuple[type[EngineError] | type[WeightError], str]:
    """The server's own words, whichever way it writes them, and the kind of error if it is a trueup server."""
    kind = None
    if isinstance(content, dict):
        error = content.get("error", content.get("detail", content))
        kind = error.get("type") if isinstance(error, dict) else None
        content = error.get("message", error) if isinstance(error, dict) else error
    known = {k.__name__: k for k in (WeightError, UnsupportedByEngine)}
    return known.get(str(kind), EngineError), " ".join(str(content).split())[:500]
