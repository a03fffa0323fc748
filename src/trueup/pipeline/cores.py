"""How the threads of a run's processes wait for one another, which depends on who else wants their cores."""

from __future__ import annotations

import os

from trueup.knobs import Config


def waiting(config: Config, *, cores: int | None = None) -> dict[str, str]:
    """Return environment variables for the processes of a run; `cores` are this machine's unless given.

    By default libgomp's threads spin at the end of every operation. Alone that gains a tenth; while trainer and engine
    want more threads than there are cores, a thread spins where another's should run, and both lose a third to a half.
    """
    cores = cores or len(os.sched_getaffinity(0))
    rollout = config.rollout
    engines = cores if config.engine.kind == "vllm" else rollout.engines * rollout.threads
    beside = rollout.max_lag > 0 and rollout.update != "synchronous"
    return {"OMP_WAIT_POLICY": "PASSIVE"} if beside and (config.train.threads or cores) + engines > cores else {}
