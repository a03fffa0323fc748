"""The embedded engine over HTTP: OpenAI's completions and chat, health, metrics, and the control plane.

Thin by design: requests become engine calls, records become JSON. Everything but /health wants the bearer token.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Body, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from trueup.engines.base import GenerationRequest, Result
from trueup.engines.embedded import completions
from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.faults import Transport
from trueup.engines.embedded.wire import (
    ChatRequest,
    CompletionRequest,
    FaultsRequest,
    PauseRequest,
    ScoreRequest,
    UpdateRequest,
    capabilities_to_json,
)  # fmt: skip
from trueup.errors import EngineError, TrueupError
from trueup.model.scoring import ScoredRow

Answer = TypeVar("Answer")
MAX_BODY_BYTES = 32 * 2**20
DISCONNECT_POLL_S = 0.5
BAD_REQUEST, UNAUTHENTICATED, TIMED_OUT, NO_LENGTH, TOO_LARGE, TOO_MANY, GONE = 400, 401, 408, 411, 413, 429, 503
OPEN_PATHS = ("/health", "/openapi.json")
BEARER = HTTPBearer(auto_error=False)
"""Declares the scheme in the OpenAPI document; the token is checked before anything of a body is read."""
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in (
        (BAD_REQUEST, "The request cannot be served as it is; the message says why."),
        (UNAUTHENTICATED, "No bearer token, or a wrong one."),
        (TIMED_OUT, "Not done in time, e.g. because the engine is paused; the request was aborted."),
        (NO_LENGTH, "A body without content-length."),
        (TOO_LARGE, "The body is too large."),
        (TOO_MANY, "The queue is full."),
        (GONE, "The engine has stopped."),
    )
}


class Served:
    """What the endpoints share: the engine, the token, limits."""

    def __init__(
        self, engine: EmbeddedEngine, token: str, *, request_timeout_s: float, max_queue: int, allow_faults: bool
    ) -> None:
        self.engine, self.token, self.allow_faults = engine, token, allow_faults
        self.transport = Transport()
        self.request_timeout_s, self.max_queue = request_timeout_s, max_queue
        self.model = engine.path.name
        self.started = int(time.time())
        self.quick, self.waiting, self.updating, self.scoring = (
            ThreadPoolExecutor(threads, thread_name_prefix=f"trueup-{kind}")
            for kind, threads in (("quick", 2), ("waiting", 8), ("updating", 1), ("scoring", 8))
        )

    def knows(self, request: Request) -> bool:
        """Whether a request may come in: it carries the token, or asks for something open to all."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        holds = scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.token.encode())
        return holds or request.scope["path"] in OPEN_PATHS

    def check_room(self, requests: list[GenerationRequest]) -> None:
        """Refuse requests that would overfill the queue."""
        if self.engine.status().waiting + sum(request.n for request in requests) > self.max_queue:
            raise _Busy

    async def apart(self, executor: ThreadPoolExecutor, function: Callable[[], Answer]) -> Answer:
        """Run a blocking call among its own kind, so that calls that wait never keep out those they wait for."""
        return await asyncio.get_running_loop().run_in_executor(executor, function)

    async def generate(self, requests: list[GenerationRequest], client: Request) -> list[list[Result]]:
        """Run requests to their end; abort them if the client goes away or the time is over."""
        self.check_room(requests)
        for request in requests:
            self.engine.check(request)
        submitted = [self.engine.submit(request) for request in requests]
        done = asyncio.gather(*(asyncio.wrap_future(future) for _, future in submitted))
        deadline = time.monotonic() + self.request_timeout_s
        try:
            while not done.done():
                await asyncio.wait({done}, timeout=DISCONNECT_POLL_S)
                if time.monotonic() > deadline:
                    raise _TimedOut
                if not done.done() and await client.is_disconnected():
                    raise _TimedOut
            return list(await done)
        finally:
            if not done.done():
                for group_id, _ in submitted:
                    self.engine.abort(group_id)
                done.cancel()


class _Busy(Exception):
    pass


class _TimedOut(Exception):
    pass


def _error(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def make_app(
    engine: EmbeddedEngine,
    token: str,
    *,
    request_timeout_s: float = 600.0,
    max_queue: int = 4096,
    allow_faults: bool = False,
) -> FastAPI:
    """Return the application; `engine` stays the caller's to close. `allow_faults` lets it be broken on purpose."""
    served = Served(engine, token, request_timeout_s=request_timeout_s, max_queue=max_queue, allow_faults=allow_faults)
    app = FastAPI(title="trueup serve", version="1", docs_url=None, redoc_url=None)
    app.state.served = served
    _handle_errors(app)
    app.add_middleware(_Admission, served=served)
    _add_openai(app, served)
    _add_observation(app, served)
    _add_control(app, served)
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(TrueupError)
    async def refused(request: Request, error: TrueupError) -> Response:
        stopped = str(error).startswith(("the engine stopped", "the engine is closed"))
        late = "took longer than allowed" in str(error)
        status = GONE if stopped else TIMED_OUT if late else BAD_REQUEST
        return _error(status, str(error), type(error).__name__)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:4])
        return _error(BAD_REQUEST, f"{where}: {first['msg']}"[:500])

    for kind, answer in (
        (_Busy, _error(TOO_MANY, "the queue is full; try again later")),
        (_TimedOut, _error(TIMED_OUT, "not done in time: the engine may be paused; the request was aborted")),
    ):  # fmt: skip

        async def known(request: Request, error: Exception, answer: Response = answer) -> Response:
            return answer

        app.add_exception_handler(kind, known)


class _Admission:
    """Refuses a request before anything of its body is read.

    Not Starlette's BaseHTTPMiddleware: what is behind that never learns that a client has gone away.
    """

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if not self.served.knows(request):
            message = "send the server's token as a bearer token"
            return _error(UNAUTHENTICATED, message, **{"WWW-Authenticate": "Bearer"})
        if "transfer-encoding" in request.headers:
            return _error(NO_LENGTH, "send a content-length: bodies of unknown size are not read")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return _error(TOO_LARGE, f"the body may have at most {MAX_BODY_BYTES} bytes")
        return None


def _add_openai(app: FastAPI, served: Served) -> None:
    guarded: dict[str, Any] = {"dependencies": [Depends(BEARER)], "responses": ERRORS}

    @app.get("/v1/models", **guarded)
    async def models() -> dict[str, Any]:
        entry = {"id": served.model, "object": "model", "created": served.started, "owned_by": "trueup",
                 "max_model_len": served.engine.max_length}  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.post("/v1/completions", response_model=None, **guarded)
    async def complete(client: Request, body: Annotated[CompletionRequest, Body()]) -> Response:
        requests = completions.requests_of(served.transport.incoming(body), served.engine.tokens)
        writer = served.transport.writer(body, served.model, served.engine.tokens)
        if body.stream:
            return await _stream(client, requests, writer)
        results = await served.generate(requests, client)
        scores = None
        if body.prompt_logprobs is not None:
            rows = [completions.prompt_row(request) for request in requests]
            run = partial(served.engine.score, rows, timeout_s=served.request_timeout_s)
            scores = await served.apart(served.scoring, run)
        return JSONResponse(writer.whole(requests, results, scores))

    @app.post("/v1/chat/completions", response_model=None, **guarded)
    async def chat(client: Request, body: Annotated[ChatRequest, Body()]) -> Response:
        requests = completions.requests_of_chat(body, served.engine.tokens)
        writer = completions.ChatWriter(body, served.model, served.engine.tokens)
        if body.stream:
            return await _stream(client, requests, writer)
        return JSONResponse(writer.whole(requests, await served.generate(requests, client), None))

    async def _stream(
        client: Request, requests: list[GenerationRequest], writer: completions.Writer
    ) -> StreamingResponse:
        if len(requests) != 1:
            raise EngineError("a stream carries one prompt; send one request each")
        served.check_room(requests)
        loop = asyncio.get_running_loop()
        drawn: asyncio.Queue[Any] = asyncio.Queue()

        def on_token(sequence: Any) -> None:
            event = (sequence.sample, sequence.tokens[-1], sequence.logprobs[-1], sequence.versions[-1])
            loop.call_soon_threadsafe(drawn.put_nowait, event)

        group_id, future = served.engine.submit(requests[0], on_token=on_token)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(drawn.put_nowait, None))

        async def events() -> AsyncIterator[str]:
            try:
                async with asyncio.timeout(served.request_timeout_s):
                    while (event := await drawn.get()) is not None:
                        yield writer.piece(*event)
                for text in writer.ending(requests[0], future.result(timeout=0)):
                    yield text
            except TimeoutError:
                yield completions.event({"error": {"message": "not done in time", "code": TIMED_OUT}})
            finally:
                if not future.done():
                    served.engine.abort(group_id)

        return StreamingResponse(events(), media_type="text/event-stream")


def _add_observation(app: FastAPI, served: Served) -> None:
    @app.get("/health", responses={GONE: ERRORS[GONE]})
    async def health() -> dict[str, str]:
        served.engine.status()
        return {"status": "ok", "id": uuid.uuid5(uuid.NAMESPACE_URL, f"{served.started}").hex}

    @app.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(BEARER)], responses=ERRORS)
    async def metrics() -> str:
        return completions.prometheus(served.engine.status())

    @app.get("/control/status", dependencies=[Depends(BEARER)], responses=ERRORS)
    async def status() -> dict[str, Any]:
        return asdict(served.engine.status()) | {"capabilities": capabilities_to_json(served.engine.capabilities)}


def _add_control(app: FastAPI, served: Served) -> None:
    guarded: dict[str, Any] = {"dependencies": [Depends(BEARER)], "responses": ERRORS}

    @app.post("/control/pause", **guarded)
    async def pause(body: Annotated[PauseRequest, Body()]) -> dict[str, Any]:
        timeout_s = body.timeout_s or served.request_timeout_s
        await served.apart(served.waiting, lambda: served.engine.pause(body.mode, timeout_s=timeout_s))
        return {"paused": True}

    @app.post("/control/resume", **guarded)
    async def resume() -> dict[str, Any]:
        await served.apart(served.quick, served.engine.resume)
        return {"paused": False}

    @app.post("/control/clear_cache", **guarded)
    async def clear_cache() -> dict[str, Any]:
        await served.apart(served.quick, served.engine.clear_cache)
        return {"cleared": True}

    @app.post("/control/update_weights", **guarded)
    async def update_weights(body: Annotated[UpdateRequest, Body()]) -> dict[str, Any]:
        if served.engine.options.weights_root is None:
            raise EngineError("this server takes no weights: start it with --weights FOLDER")
        update = partial(
            served.engine.update_weights, Path(body.path), clear_cache=body.clear_cache,
            timeout_s=served.request_timeout_s,
        )  # fmt: skip
        return asdict(await served.apart(served.updating, update))

    @app.post("/control/faults", **guarded)
    async def faults(body: Annotated[FaultsRequest, Body()]) -> dict[str, Any]:
        if not served.allow_faults:
            raise EngineError("this server cannot be broken on purpose: start it with --allow-faults")
        plant = partial(served.engine.plant, [f.to_fault() for f in body.faults], served.transport)
        await served.apart(served.updating, plant)
        return {"faults": served.engine.status().details["faults"]}

    @app.post("/control/score", **guarded)
    async def score(body: Annotated[ScoreRequest, Body()]) -> dict[str, Any]:
        rows = [
            ScoredRow(prompt_ids=tuple(row.prompt_token_ids), completion_ids=tuple(row.completion_token_ids))
            for row in body.rows
        ]
        run = partial(served.engine.score, rows, timeout_s=served.request_timeout_s)
        scores = await served.apart(served.scoring, run)
        return {"scores": [{"logprobs": s.logprobs, "version": s.version} for s in scores]}
