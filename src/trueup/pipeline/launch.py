"""Engines as processes of a run: started, watched, started again, ended. Each is spoken to over HTTP only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from trueup.engines.base import Engine
from trueup.engines.embedded.serve import read_or_make_token
from trueup.engines.trueup_http import TrueupEngine
from trueup.engines.vllm_server import VllmServer
from trueup.engines.vllm_v1 import VllmEngine
from trueup.errors import EngineError
from trueup.knobs import Config, VllmConfig

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


class EngineProcess(Protocol):
    """An engine that a run owns."""

    name: str
    url: str
    token_file: Path | None

    def start(self) -> Engine:
        """Start it, serving the run's model as version 0. Raises EngineError with its own words."""
        ...

    def alive(self) -> bool:
        """Whether the process is there."""
        ...

    def stop(self) -> None:
        """End it and everything it started."""
        ...

    def kill(self) -> None:
        """End it at once, whatever it is at."""
        ...


class EmbeddedProcess:
    """`trueup serve` on a free port of this machine."""

    def __init__(self, config: Config, run: Path, number: int) -> None:
        self.name, self.url = f"embedded-{number}", ""
        self.token_file: Path | None = run / ".token"
        self._config, self._run = config, run
        self._process: subprocess.Popen[str] | None = None

    def _command(self) -> list[str]:
        train, rollout = self._config.train, self._config.rollout
        knobs = {
            "model": train.model, "dtype": train.dtype, "head": train.head, "bitwise": str(train.bitwise).lower(),
            "port": 0, "threads": rollout.threads, "weights": self._run / "weights", "token_file": self.token_file,
            "slots": max(1, rollout.concurrency * rollout.group_size), "until_stdin_closes": "true",
            "allow_faults": str(bool(self._config.engine.faults)).lower(),
        }  # fmt: skip
        sets = [f"--set=serve.{name}={value}" for name, value in knobs.items()]
        return [sys.executable, "-m", "trueup.cli", "serve", *sets]

    def start(self) -> Engine:
        """See EngineProcess.start."""
        assert self.token_file is not None
        token = read_or_make_token(self.token_file)
        log = (self._run / "logs" / f"{self.name}.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.url = self._address(time.monotonic() + START_TIMEOUT_S)
        return TrueupEngine(self.url, token=token)

    def _address(self, deadline: float) -> str:
        """Read the line that says where it listens, then wait until it does."""
        process = self._process
        assert process is not None and process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            self.stop()
            log = self._run / "logs" / f"{self.name}.log"
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise EngineError(f"{self.name} did not start: {last[0] if last else 'see ' + str(log)}")
        url = line.split()[1]
        import httpx

        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"{url}/health", timeout=1.0, trust_env=False)
            except httpx.HTTPError:
                time.sleep(0.05)
            else:
                return url
        self.stop()
        raise EngineError(f"{self.name} did not answer at {url} within {START_TIMEOUT_S:.0f} s")

    def alive(self) -> bool:
        """See EngineProcess.alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process, if it was started."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """See EngineProcess.kill."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """See EngineProcess.stop."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
            try:
                self._process.wait(STOP_TIMEOUT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class VllmProcess:
    """A real vLLM in the configuration that agrees with the trainer, but for what [vllm] says."""

    def __init__(self, config: Config, run: Path, number: int) -> None:
        self.name, self.url = f"vllm-{number}", ""
        self.token_file: Path | None = None
        train, rollout = config.train, config.rollout
        known = config.vllm.model_dump() | {
            "model": train.model, "dtype": train.dtype, "head": train.head, "port": 0,
            "run": run / "logs" / self.name, "slots": max(1, rollout.concurrency * rollout.group_size),
        }  # fmt: skip
        self._server = VllmServer(VllmConfig(**known))
        self._weights = run / "weights"

    def start(self) -> Engine:
        """See EngineProcess.start."""
        self.url = self._server.start()
        return VllmEngine.of(self._server, weights_root=self._weights)

    def alive(self) -> bool:
        """See EngineProcess.alive."""
        return self._server.alive

    def stop(self) -> None:
        """See EngineProcess.stop."""
        self._server.stop()

    def kill(self) -> None:
        """See EngineProcess.kill."""
        self._server.kill()


def engine_processes(config: Config, run: Path) -> list[EngineProcess]:
    """The engines of a run, not started yet."""
    numbers = range(config.rollout.engines)
    if config.engine.kind == "embedded":
        return [EmbeddedProcess(config, run, number) for number in numbers]
    return [VllmProcess(config, run, number) for number in numbers]
