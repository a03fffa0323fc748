"""Starts a real vLLM that agrees with the trainer, waits until it is warm, and ends it with all its children.

The flags are the parity configuration: processed logprobs, no prefix cache, no asynchronous scheduling, an fp32 head,
and no sampling defaults from the checkpoint. What the server then says of itself is compared with what was asked.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trueup.engines import tether
from trueup.engines.http import HttpClient, is_loopback
from trueup.engines.vllm_checkpoint import Checkpoint, read_checkpoint, serve_folder
from trueup.engines.vllm_flags import FlagReport, report_flags
from trueup.engines.vllm_install import ensure_plugin, find_environment, launch_prefix
from trueup.engines.vllm_plugin import SWITCH
from trueup.env import child_environment
from trueup.errors import ConfigError, EngineError
from trueup.knobs import VllmConfig

STOP_TIMEOUT_S = 30.0
POLL_S = 0.5
POLL_TIMEOUT_S = 5.0
LOG_LINE = 400
MAX_BATCHED_TOKENS = 4096
NEEDS_PLUGIN = ("0.18.1",)
"""Versions without an fp32 head of their own for generation."""
MODULE = "vllm.entrypoints.openai.api_server"


class VllmServer:
    """One vLLM process group, started by `start` and ended by `stop`; `restart` may serve other weights."""

    def __init__(self, config: VllmConfig) -> None:
        """Read the model and find the environment. Raises ConfigError or ModelError, with what to do."""
        if config.model is None:
            raise ConfigError("name the policy to serve: --model FOLDER")
        environment = find_environment(config.version, config.environments)
        if environment is None:
            raise ConfigError(
                f"vLLM {config.version} is not installed under {config.environments.absolute()}: "
                f"trueup vllm install --version {config.version}"
            )
        self.config, self.environment = config, environment
        self.checkpoint: Checkpoint = read_checkpoint(config.model)
        self.run = config.run.absolute()
        self.log = self.run / "vllm.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self, folder: Path | None = None, *, announce: Callable[[str], None] = lambda line: None) -> str:
        """Start vLLM on `folder` (default: the model, prepared), wait until it answers requests, return its address.

        `announce` is told what is waited for. Raises EngineError with the log's error when it dies or takes
        longer than `start_timeout_s`.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        if folder is None:
            assert self.config.model is not None
            folder = serve_folder(
                self.checkpoint, self.config.model, self.run / "served" / "start", untie=self.config.untie
            )
        if not self.url:
            self.url = f"http://{self.config.host}:{self.config.port or _free_port(self.config.host)}"
        ensure_plugin(self.environment)
        if not is_loopback(self.url):
            announce("warning  reachable from other machines: vLLM guards its control plane with no key")
        deadline = time.monotonic() + self.config.start_timeout_s
        announce(f"starting vLLM {self.config.version}, log in {self.log}")
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(tether.__file__)), *self.command(folder)], stdin=subprocess.PIPE,
                stdout=out, stderr=out, start_new_session=True,
                env=child_environment(self.variables()),
            )  # fmt: skip
        try:
            self._wait_until_warm(deadline, announce)
        except BaseException:
            self.stop()
            raise
        return self.url

    def restart(self, folder: Path) -> None:
        """End what runs and start again on a prepared folder. Raises EngineError like `start`."""
        self.stop()
        self.start(folder)

    def stop(self) -> None:
        """End the process and everything it started."""
        if self.process is None:
            return
        process, self.process = self.process, None
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT_S)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_TIMEOUT_S)
        if process.stdin is not None:
            process.stdin.close()

    def kill(self) -> None:
        """End the process and everything it started at once."""
        if self.process is not None:
            _signal_group(self.process.pid, signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def max_length(self) -> int:
        """Longest sequence: what was asked, or what the model allows if that is less."""
        allowed = self.checkpoint.config.get("max_position_embeddings")
        return min(self.config.max_length, allowed) if isinstance(allowed, int) else self.config.max_length

    def command(self, folder: Path) -> list[str]:
        """The command line that is started, for this configuration."""
        config = self.config
        flags = [
            "--dtype", config.dtype, "--max-model-len", str(self.max_length), "--max-num-seqs", str(config.slots + 1),
            "--max-num-batched-tokens", str(max(MAX_BATCHED_TOKENS, self.max_length)),
            "--logprobs-mode", config.logprobs_mode, "--generation-config", "vllm",
            "--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching",
            "--async-scheduling" if config.async_scheduling else "--no-async-scheduling",
            "--no-enable-chunked-prefill", "--enable-prompt-tokens-details", "--enforce-eager",
            "--gpu-memory-utilization", "0.3",
        ]  # fmt: skip
        if config.version != "0.18.1":
            flags.append("--enable-scale-out")  # its endpoint with ids in and out and weight versions
        if config.head != config.dtype:
            flags += _head_flags(config)
        return [*self.launch(folder), *flags, *config.flags]

    def launch(self, folder: Path) -> list[str]:
        """The part of the command line that decides no number: interpreter, module, model and address."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return [
            *launch_prefix(self.environment), "-m", MODULE, "--model", str(folder),
            "--served-model-name", str(self.config.model), "--host", host, "--port", port,
        ]  # fmt: skip

    def variables(self) -> dict[str, str]:
        """vLLM's own environment variables: the control plane, and the CPU's memory and cores."""
        return {
            "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": str(self.config.cache_gib),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": str(self.config.reserved_cores), "VLLM_LOGGING_LEVEL": "WARNING",
        }  # fmt: skip

    def report(self) -> list[FlagReport]:
        """Compare what was asked with what the running server says and does. Raises EngineError."""
        http = HttpClient(self.url)
        try:
            return report_flags(self.config, http, str(self.config.model), self.max_length)
        finally:
            http.close()

    def _wait_until_warm(self, deadline: float, announce: Callable[[str], None]) -> None:
        http = HttpClient(self.url)
        try:
            while not self._answers(http):
                if not self.alive or time.monotonic() > deadline:
                    state = "took too long to start" if self.alive else "ended while it started"
                    raise EngineError(f"vLLM {state}; {self.log}: {_cause(self.log)}")
                time.sleep(POLL_S)
            announce("first request (vLLM sets itself up during it)")
            body = {"model": str(self.config.model), "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 1.0}
            try:
                http.post("/v1/completions", body, timeout_s=max(1.0, deadline - time.monotonic()))
            except EngineError as error:
                raise EngineError(f"vLLM cannot generate ({error}); {self.log}: {_cause(self.log)}") from None
        finally:
            http.close()

    def _answers(self, http: HttpClient) -> bool:
        try:
            http.get("/v1/models", timeout_s=POLL_TIMEOUT_S)
        except EngineError:
            return False
        return True


def serve(config: VllmConfig, *, announce: Callable[[str], None]) -> None:
    """Start, say what was seen of each flag, and serve until interrupted or asked to end. Raises like VllmServer.

    Raises EngineError when vLLM ends by itself.
    """
    server = VllmServer(config)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        url = server.start(announce=announce)
        announce(f"serving  {url}  {config.model}  vLLM {config.version}")
        for row in server.report():
            seen = "" if row.state != "differs" else f", but reports {row.reported} and behaves as {row.found}"
            announce(f"  {row.state:9}{row.flag}={row.asked}{seen}")
        while server.alive:
            time.sleep(POLL_S)
        raise EngineError(f"vLLM ended by itself; {server.log}: {_cause(server.log)}")
    except KeyboardInterrupt:
        announce("stopping")
    finally:
        server.stop()
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _head_flags(config: VllmConfig) -> list[str]:
    if config.version in NEEDS_PLUGIN:
        return ["--additional-config", json.dumps({SWITCH: True})] if config.head == "float32" else []
    return ["--hf-overrides", json.dumps({"head_dtype": config.head})]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _cause(log: Path) -> str:
    """The line of a log that says what went wrong: a worker's death, else the last exception, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    died = [line for line in lines if "died unexpectedly" in line]
    named = [line for line in lines if re.search(r"\w+Error: ", line) and "EngineDeadError" not in line]
    return (died or named or lines or ["it is empty"])[-1][:LOG_LINE]
