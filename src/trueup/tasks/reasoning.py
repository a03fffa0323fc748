"""reasoning-gym's procedural tasks, over a hundred of them: name one as `reasoning_gym/basic_arithmetic`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from trueup.errors import ConfigError, nearest
from trueup.tasks.base import Question

SIZE = 1_000_000
"""Questions of a task; each is drawn from seed + index."""


class ReasoningGym:
    """One task of reasoning-gym; its own scorer gives the reward, 0 to 1."""

    def __init__(self, kind: str, *, seed: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        """`settings` are the task's own. Raises ConfigError when it is not installed, or knows no such task."""
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise ConfigError("reasoning-gym is not installed: pip install 'trueup[tasks]'") from None
        if kind not in DATASETS:
            raise ConfigError(f"reasoning-gym has no task {kind!r}{nearest(kind, DATASETS)}")
        self.name = f"reasoning_gym/{kind}"
        try:
            self._data = reasoning_gym.create_dataset(kind, size=SIZE, seed=seed, **dict(settings or {}))
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"{self.name} does not take these settings: {error}") from None

    def question(self, index: int) -> Question:
        """Return question `index`; the answer is its whole entry as JSON, which the scorer needs."""
        entry = self._data[index]
        kept = {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
        return Question(text=entry["question"], answer=json.dumps(kept, default=str))

    def score(self, answer: str | None, completion: str) -> float:
        """The task's own score of the completion's last line, or of what stands in <answer> tags."""
        return float(self._data.score_answer(final_answer(completion), entry=_entry(answer or "{}")))


@lru_cache(maxsize=256)
def _entry(answer: str) -> dict[str, Any]:
    return dict(json.loads(answer))


def final_answer(completion: str) -> str | None:
    """What stands between the last <answer> and </answer>, else the last line that is not empty; else None."""
    _, opened, rest = completion.rpartition("<answer>")
    if opened:
        return rest.partition("</answer>")[0].strip()
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    return lines[-1] if lines else None
