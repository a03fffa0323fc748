"""The engines of a run together: started, watched, started again, and given every new version.

An engine that ends, or answers nothing for `HUNG_S`, is replaced by a new process that serves what the others serve.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from trueup.engines.base import Engine, PauseMode
from trueup.engines.embedded.options import Fault
from trueup.engines.trueup_http import TrueupEngine
from trueup.errors import EngineError
from trueup.knobs import Config
from trueup.pipeline.launch import EngineProcess, engine_processes
from trueup.pipeline.updater import Updated, update_all
from trueup.weights.store import WeightStore

POLL_S = 0.05
NOTICED_S = 2.0
"""From a broken connection until the process is known to have ended."""
HEARTBEAT_S = 2.0
HUNG_S = 120.0
"""Without an answer to any question for this long an engine hangs, and is killed."""
ABORT_S = 30.0
RESTARTS = 20
"""Of all engines in one run."""
ATTEMPTS = 4
"""At something that every engine must do: a connection may break, an engine may end."""
Result = TypeVar("Result")


class Fleet:
    """`engines[i]` speaks to `processes[i]`, and is None while that is being started again."""

    def __init__(self, config: Config, run: Path, store: WeightStore, announce: Callable[[str], None]) -> None:
        self.config, self.run, self.store, self.announce = config, run, store, announce
        self.processes: list[EngineProcess] = engine_processes(config, run)
        self.engines: list[Engine | None] = [None] * len(self.processes)
        self.served = 0
        """Version that every engine has confirmed."""
        self.restarts = 0
        self._broken = False
        self._ended = threading.Event()
        self._heard = [time.monotonic()] * len(self.processes)
        self._heart = threading.Thread(target=self._listen, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Start every engine on version 0. Raises EngineError."""
        for number, process in enumerate(self.processes):
            self.engines[number] = process.start()
        self._heart.start()
        self.after(0)

    def after(self, batches: int) -> None:
        """Break engines on purpose if that is asked for from now on (engine.faults). Raises EngineError."""
        engine = self.config.engine
        if engine.faults and not self._broken and batches >= engine.faults_from:
            self.announce(f"faults     planted after batch {batches}: {', '.join(engine.faults)}")
            self._broken = True
            self.with_engines(self._break)

    def _break(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            assert isinstance(engine, TrueupEngine)
            engine.plant([Fault.parse(text) for text in self.config.engine.faults])

    def abort(self) -> None:
        """End the requests under way, whose completions nobody waits for any more; engines stay ready."""
        for engine in self.living():
            with suppress(EngineError):
                if PauseMode.ABORT in engine.capabilities.pause_modes:
                    engine.pause(PauseMode.ABORT, timeout_s=ABORT_S)
                    engine.resume()

    def close(self) -> None:
        """End every engine."""
        self._ended.set()
        for engine in self.engines:
            if engine is not None:
                engine.close()
        for process in self.processes:
            process.stop()

    def living(self) -> list[Engine]:
        """Engines that can be asked."""
        return [engine for engine in self.engines if engine is not None]

    def watch(self) -> None:
        """Start engines again that ended. Raises EngineError when that happens too often."""
        for number, process in enumerate(self.processes):
            if not process.alive():
                self._revive(number)

    def with_engines(self, work: Callable[[list[Engine]], Result]) -> Result:
        """Do something with every engine, and again if one ended on the way or one failed. Raises EngineError."""
        for attempt in range(ATTEMPTS):
            self.watch()
            try:
                return work(self.living())
            except EngineError as error:
                deadline = time.monotonic() + NOTICED_S
                while all(process.alive() for process in self.processes) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                if attempt + 1 == ATTEMPTS:
                    raise
                self.announce(f"engine     {error}; trying again")
        raise AssertionError("unreachable")

    def serve(self, version: int) -> Updated | None:
        """Have every engine serve a version; None if they do. Raises WeightError, EngineError."""
        if version == self.served:
            return None
        path, rollout = self.store.open(version).path, self.config.rollout
        updated = self.with_engines(
            lambda engines: update_all(
                engines, path, version, clear_cache=rollout.clear_cache, drain=rollout.update == "drain"
            )
        )
        self.served = version
        return updated

    def _revive(self, number: int) -> None:
        """A new process in the place of one that ended, serving what the others serve. Raises EngineError."""
        process, old = self.processes[number], self.engines[number]
        self.announce(f"engine     {process.name} ended; starting it again")
        self.engines[number] = None
        if old is not None:
            old.close()
        while self.engines[number] is None:
            self.restarts += 1
            process.stop()
            try:
                engine = self._started(process)
            except EngineError as error:
                if self.restarts >= RESTARTS:
                    raise
                self.announce(f"engine     {error}; once more")
                continue
            self._heard[number] = time.monotonic()
            self.engines[number] = engine

    def _started(self, process: EngineProcess) -> Engine:
        engine = process.start()
        try:
            if self.served:
                update_all([engine], self.store.open(self.served).path, self.served, clear_cache=True, drain=False)
            if self._broken:
                self._break([engine])
        except EngineError:
            engine.close()
            raise
        return engine

    def _listen(self) -> None:
        """Ask every engine how it is, again and again; kill one that has not answered for too long."""
        while not self._ended.wait(HEARTBEAT_S):
            for number, engine in enumerate(self.engines):
                if engine is None or not self.processes[number].alive():
                    self._heard[number] = time.monotonic()
                    continue
                with suppress(EngineError):
                    engine.status()
                    self._heard[number] = time.monotonic()
                if time.monotonic() - self._heard[number] > HUNG_S and not self._ended.is_set():
                    self.announce(f"engine     {self.processes[number].name} answers nothing for {HUNG_S:.0f} s")
                    self.processes[number].kill()
