"""The updater: a published version into every engine; versions advance only when each engine has confirmed it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trueup.engines.base import Engine, PauseMode, UpdateReceipt
from trueup.errors import EngineError, WeightError

UPDATE_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Updated:
    """What an update of all engines did: its receipts, and seconds from its first request to its last receipt."""

    version: int
    receipts: tuple[UpdateReceipt, ...]
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values for updates.jsonl."""
        return {"version": self.version, "seconds": self.seconds, "receipts": [asdict(r) for r in self.receipts]}


def update_all(engines: Sequence[Engine], path: Path, version: int, *, clear_cache: bool, drain: bool) -> Updated:
    """Load a published version into every engine, side by side; `drain`: once its requests have run to their end.

    Each engine verifies what it loads before it serves it, and says how. Raises WeightError when a version was refused,
    EngineError when an engine could not be updated or confirms another version: then the run must not go on with it.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(len(engines), thread_name_prefix="update") as pool:
        futures = [
            pool.submit(_drained if drain else _in_flight, engine, path, clear_cache=clear_cache) for engine in engines
        ]
        receipts = tuple(future.result() for future in futures)
    for receipt in receipts:
        if receipt.version != version:
            raise EngineError(f"{receipt.engine} confirms version {receipt.version} after an update to {version}")
        if not receipt.verified_by:
            raise WeightError(f"{receipt.engine} did not verify version {version}")
    return Updated(version=version, receipts=receipts, seconds=time.perf_counter() - start)


def _in_flight(engine: Engine, path: Path, *, clear_cache: bool) -> UpdateReceipt:
    return engine.update_weights(path, clear_cache=clear_cache, timeout_s=UPDATE_TIMEOUT_S)


def _drained(engine: Engine, path: Path, *, clear_cache: bool) -> UpdateReceipt:
    """The pause counts from the moment no further request is begun."""
    start = time.perf_counter()
    engine.pause(PauseMode.WAIT, timeout_s=UPDATE_TIMEOUT_S)
    try:
        receipt = _in_flight(engine, path, clear_cache=clear_cache)
    finally:
        engine.resume()
    return replace(receipt, paused_s=time.perf_counter() - start)
