"""The run folder: the interface of a run. Resume, replay and comparison read only what lies in it.

config.json (resolved), env.json, metrics.jsonl, rollouts/, weights/vNNNNNN/, checkpoints/vNNNNNN/, summary.json.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from trueup.config import build_config, dump_config, without_none
from trueup.env import describe
from trueup.errors import ConfigError
from trueup.knobs import Config

MAY_CHANGE = (
    "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.run", "train.from_log",
    "rollout.eval_every", "rollout.keep_weights", "rollout.retries", "rollout.timeout_s", "task.score_timeout_s",
    "rollout.min_ess", "rollout.concurrency", "rollout.engines", "rollout.score_workers", "task.held_out",
    "vllm.environments", "vllm.run", "vllm.host", "vllm.port", "vllm.reserved_cores", "vllm.start_timeout_s",
)  # fmt: skip
"""Knobs that do not decide what a batch computes: a resumed run may have other ones."""
ACCEPTED = Path("parity") / "accepted.json"
OWN_SECTIONS = ("train", "objective", "correction", "optimizer", "task", "rollout", "sampling", "engine", "vllm")


def config_of(path: Path) -> Config:
    """The configuration that a run has now. Raises ConfigError for a folder that holds no run."""
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path} holds no run (config.json is missing)")
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop("recipe")
    return build_config(without_none(content), where=str(file))


def accept(path: Path, causes: Sequence[str]) -> None:
    """Write down with which causes of a mismatch the run goes on."""
    (path / ACCEPTED).write_text(json.dumps(sorted(causes)), encoding="utf-8")


def accepted_of(path: Path) -> list[str]:
    """Ids of the causes with which the run goes on."""
    file = path / ACCEPTED
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


class RunFolder:
    """An open run; no other process can open it meanwhile."""

    def __init__(self, path: Path, lock: TextIO) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def create(cls, path: Path, config: Config, recipe: Mapping[str, Any]) -> RunFolder:
        """Make a new run; `recipe` is the resolved update, written beside the configuration.

        Raises ConfigError when the folder holds a run already.
        """
        if (path / "config.json").exists():
            raise ConfigError(f"{path} holds a run already: pass --resume to go on with it, or another train.run")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, _locked(path))
        content = json.loads(dump_config(config)) | {"recipe": recipe}
        run.write("env.json", describe())
        run.write("config.json", content)
        return run

    @classmethod
    def resume(cls, path: Path, config: Config) -> RunFolder:
        """Open a run again, with what its configuration may change.

        Raises ConfigError when there is none, or the configuration computes something else.
        """
        file = path / "config.json"
        if not file.is_file():
            raise ConfigError(f"{path} holds no run to resume (config.json is missing)")
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(dump_config(config))
        for section in OWN_SECTIONS:
            for name, value in now[section].items():
                if f"{section}.{name}" not in MAY_CHANGE and before.get(section, {}).get(name) != value:
                    raise ConfigError(
                        f"{section}.{name} is {value!r} now and was {before.get(section, {}).get(name)!r} when the run "
                        "began: resume with the same, or start another run"
                    )
        run = cls(path, _locked(path))
        run.write("config.json", now | {"recipe": before.get("recipe", {})})
        return run

    def require_same_task(self, digest: str | None) -> None:
        """Remember the digest of the task's data set. Raises ConfigError when the run began with another one."""
        file = self.path / "task.json"
        before = json.loads(file.read_text(encoding="utf-8")).get("digest") if file.is_file() else None
        if before is not None and digest != before:
            self.close()
            raise ConfigError(
                f"the data set is not the one that the run began with (sha256 {str(digest)[:12]}, then {before[:12]}): "
                "restore the file, or start another run"
            )
        self.write("task.json", {"digest": digest})

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        part = self.path / f".{name}.part"
        part.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(part, self.path / name)

    def close(self) -> None:
        """Let others open the run."""
        self._lock.close()


def _locked(path: Path) -> TextIO:
    handle = (path / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ConfigError(f"{path} is in use by another process") from None
    return handle
