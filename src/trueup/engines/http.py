"""HTTP as every remote engine uses it: bearer token, errors in the server's own words, and an end to every call.

A timeout of a socket read is no end: a server that sends a byte now and then would be waited for for good. Requests run
in an event loop of the client's own, where a whole exchange has one deadline and answers have a size.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import CancelledError
from typing import Any
from urllib.parse import urlsplit

import httpx

from trueup.errors import EngineBusy, EngineError, UnsupportedByEngine, WeightError

CONNECT_TIMEOUT_S = 10.0
QUICK_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
GRACE_S = 5.0
"""For the loop to notice that a deadline passed; a loop that was stopped meanwhile never does."""
CONNECTIONS = 256
KEPT_IDLE_S = 2.0
"""A connection that idles longer is not used again: servers (uvicorn: 5 s) close them at that very moment."""
TOOK_TOO_LONG = "took longer than allowed"
"""In the message of each error that is a timeout."""
MAX_ANSWER_BYTES = 256 * 2**20
"""Ten thousand tokens with prompt logprobs and alternatives are a tenth of this."""


class HttpClient:
    """JSON over HTTP to one server; may be used from several threads."""

    def __init__(self, url: str, *, token: str | None = None, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        """`url` is the server's root, with or without /v1. Raises EngineError when it is no http(s) address."""
        try:
            parts = urlsplit(url)
            httpx.URL(url)
        except (ValueError, httpx.InvalidURL) as error:
            raise EngineError(f"{url!r} is no engine address: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise EngineError(f"{url!r} is no engine address; expected http://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise EngineError("an engine address holds no user or password: they would be printed; use a token file")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.max_bytes = max_bytes
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        limits = httpx.Limits(
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=KEPT_IDLE_S
        )
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=headers, limits=limits, trust_env=False, timeout=None
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=f"http {self.url}")
        self._thread.start()

    def get(self, path: str, *, timeout_s: float = QUICK_TIMEOUT_S) -> Any:
        """Return the answer's JSON. Raises EngineError."""
        return self._json("GET", path, None, timeout_s)

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float) -> Any:
        """Send JSON and return the answer's. Raises EngineError."""
        return self._json("POST", path, body, timeout_s)

    def text(self, path: str, *, timeout_s: float = QUICK_TIMEOUT_S) -> str:
        """Return the answer as it is. Raises EngineError."""
        status, raw = self._wait(self._exchange("GET", path, None, timeout_s), path, timeout_s)
        if status >= 400:
            raise EngineError(f"{self.url}{path}: {status}")
        return raw.decode("utf-8", errors="replace")

    def stream(self, path: str, body: Mapping[str, Any], on_line: Callable[[str], None], *, timeout_s: float) -> None:
        """Send JSON and hand each line of the answer to `on_line` as it comes, in the thread of the client's loop.

        Returns when the answer has ended. Raises EngineError.
        """
        status, raw = self._wait(self._lines(path, body, on_line, timeout_s), path, timeout_s)
        if status >= 400:
            kind, message = _error(_json_or_text(raw))
            raise kind(f"{self.url}{path}: {status}: {message}")

    def close(self) -> None:
        """Close the connections; calls under way fail."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._loop.is_running():
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and content of an answer, all within `timeout_s`."""
        content = bytearray()
        async with asyncio.timeout(timeout_s):
            timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
            async with self._client.stream(method, path, json=body, timeout=timeout) as answer:
                async for chunk in answer.aiter_bytes():
                    content += chunk
                    if len(content) > self.max_bytes:
                        raise EngineError(f"{self.url}{path} answered more than {self.max_bytes:,} bytes")
                retry_after_s = _seconds(answer.headers.get("retry-after"))
                if answer.status_code == 429 or (answer.status_code == 503 and retry_after_s is not None):
                    said = _error(_json_or_text(bytes(content)))[1]
                    raise EngineBusy(f"{self.url}{path}: {answer.status_code}: {said}", retry_after_s)
                return answer.status_code, bytes(content)

    async def _lines(
        self, path: str, body: Mapping[str, Any], on_line: Callable[[str], None], timeout_s: float
    ) -> tuple[int, bytes]:
        """Status of an answer, and its content if that is an error; `on_line` got the rest."""
        async with asyncio.timeout(timeout_s):
            timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
            async with self._client.stream("POST", path, json=body, timeout=timeout) as answer:
                if answer.status_code >= 400:
                    return answer.status_code, (await answer.aread())[: self.max_bytes]
                async for line in answer.aiter_lines():
                    on_line(line)
                return answer.status_code, b""

    def _wait(self, exchange: Coroutine[Any, Any, tuple[int, bytes]], path: str, timeout_s: float) -> tuple[int, bytes]:
        """Run an exchange in the client's loop. Raises EngineError when it fails or its time is over."""
        if self._loop.is_closed():
            exchange.close()
            raise EngineError(f"the connection to {self.url} was closed")
        work = asyncio.run_coroutine_threadsafe(exchange, self._loop)
        try:
            return work.result(max(timeout_s, 0.0) + GRACE_S)
        except (TimeoutError, httpx.TimeoutException):
            raise EngineError(f"{self.url}{path} {TOOK_TOO_LONG} ({max(timeout_s, 0.0):g} s)") from None
        except CancelledError:
            raise EngineError(f"the connection to {self.url} was closed") from None
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}{path} cannot be reached: {str(error) or type(error).__name__}") from None
        except KeyboardInterrupt:
            work.cancel()
            raise

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        status, raw = self._wait(self._exchange(method, path, body, timeout_s), path, timeout_s)
        try:
            content = json.loads(raw) if raw else {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise EngineError(f"{self.url}{path} answered {status} without JSON") from None
        if status >= 400:
            kind, message = _error(content)
            raise kind(f"{self.url}{path}: {status}: {message}")
        return content


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header; None for a date or anything else."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def _json_or_text(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return raw.decode("utf-8", errors="replace")


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, by its name alone: nothing is looked up."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _error(content: Any) -> tuple[type[EngineError] | type[WeightError], str]:
    """The server's own words, whichever way it writes them, and the kind of error if it is a trueup server."""
    kind = None
    if isinstance(content, dict):
        error = content.get("error", content.get("detail", content))
        kind = error.get("type") if isinstance(error, dict) else None
        content = error.get("message", error) if isinstance(error, dict) else error
    known = {k.__name__: k for k in (WeightError, UnsupportedByEngine)}
    return known.get(str(kind), EngineError), " ".join(str(content).split())[:500]
