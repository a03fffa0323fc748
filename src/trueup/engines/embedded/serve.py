"""`trueup serve`: from a configuration to a listening server, and its end."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import uvicorn

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.embedded.server import make_app
from trueup.errors import ConfigError
from trueup.knobs import ServeConfig

TOKEN_BYTES = 32
MIN_TOKEN = 16
SHUTDOWN_S = 5


def read_or_make_token(path: Path | None) -> str:
    """Return the token in a file, made with mode 0600 if it does not exist; without a file a fresh one.

    Raises ConfigError when the file cannot be used or others may read it.
    """
    if path is None:
        return secrets.token_urlsafe(TOKEN_BYTES)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text(encoding="utf-8").strip()
        if len(token) < MIN_TOKEN or not token.isascii() or any(c.isspace() for c in token):
            raise ConfigError(f"{path} holds no token of at least {MIN_TOKEN} ASCII characters") from None
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others: chmod 600 {path}") from None
        return token
    except OSError as error:
        raise ConfigError(f"{path} cannot be made: {error.strerror}") from None
    token = secrets.token_urlsafe(TOKEN_BYTES)
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(token + "\n")
    return token


def options_of(config: ServeConfig) -> EngineOptions:
    """The engine's part of the configuration. Raises ConfigError for a weights folder that is not there."""
    if config.weights is not None and not config.weights.is_dir():
        raise ConfigError(f"weights folder {config.weights} does not exist")
    return EngineOptions(
        dtype=getattr(torch, config.dtype),
        head_dtype=getattr(torch, config.head),
        slots=config.slots,
        max_length=config.max_length,
        step_tokens=config.step_tokens,
        prefix_cache=config.prefix_cache,
        bitwise=config.bitwise,
        weights_root=config.weights,
    )


def serve(config: ServeConfig, *, announce: Callable[[str], None]) -> None:
    """Serve until interrupted. `announce` gets the lines a person needs: address, model, token if it was made here.

    Raises ConfigError or ModelError before the port is opened, and ConfigError when the port is taken.
    """
    if config.model is None:
        raise ConfigError("name the policy to serve: --model FOLDER")
    token = read_or_make_token(config.token_file)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    options = options_of(config)
    listener = _listen(config.host, config.port)
    try:
        engine = EmbeddedEngine(config.model, options)
    except BaseException:
        listener.close()
        raise
    app = make_app(
        engine, token, request_timeout_s=config.request_timeout_s, max_queue=config.max_queue,
        allow_faults=config.allow_faults,
    )  # fmt: skip
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S, server_header=False
    )
    host, port = listener.getsockname()[:2]
    announce(f"serving  http://{host}:{port}  {config.model}  body {config.dtype}, head {config.head}"
             f"{', bitwise' if config.bitwise else ''}")  # fmt: skip
    announce(f"token    {token if config.token_file is None else config.token_file}")
    if config.allow_faults:
        announce("faults   may be planted by whoever holds the token: for trying the checker, never for training")
    announce(f"weights  {'no updates (--weights FOLDER allows them)' if config.weights is None else config.weights}")
    if not config.host.startswith("127.") and config.host not in ("localhost", "::1"):
        announce("warning  reachable from other machines, without TLS: whoever holds the token controls the policy")
    server = uvicorn.Server(settings)
    if config.until_stdin_closes:
        threading.Thread(target=_end_with_stdin, args=(server,), daemon=True, name="stdin").start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.close()


def _end_with_stdin(server: uvicorn.Server) -> None:
    """Wait until the other end of our standard input is closed, as it is when a parent was killed; then end."""
    sys.stdin.buffer.read()
    server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener
