"""Tasks by name, made when they are asked for."""

from __future__ import annotations

from trueup.errors import ConfigError, nearest
from trueup.knobs import TaskConfig
from trueup.tasks.base import Task

REASONING_GYM = "reasoning_gym/"
NAMES = ("repeat", "jsonl", "reasoning_gym/...")


def make_task(config: TaskConfig) -> Task:
    """Return the task that a configuration names. Raises ConfigError for one that is unknown or cannot be made."""
    if config.name == "repeat":
        from trueup.tasks.repeat import Repeat

        return Repeat()
    if config.name == "jsonl":
        from trueup.tasks.jsonl import Jsonl

        if config.path is None:
            raise ConfigError('task.name = "jsonl" needs task.path: one {"prompt": ..., "answer": ...} a line')
        return Jsonl(config.path, scorer=config.scorer, seed=config.seed)
    if config.name.startswith(REASONING_GYM):
        from trueup.tasks.reasoning import ReasoningGym

        return ReasoningGym(config.name.removeprefix(REASONING_GYM), seed=config.seed, settings=config.settings)
    raise ConfigError(f"no task {config.name!r}{nearest(config.name, NAMES)}; there are {', '.join(NAMES)}")
