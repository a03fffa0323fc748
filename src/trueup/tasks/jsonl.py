"""Questions from a file, one JSON object a line: {"prompt": ..., "answer": ...}."""

from __future__ import annotations

import json
from pathlib import Path

from trueup.errors import ConfigError
from trueup.tasks.base import Question
from trueup.tasks.mathematics import same_value

SCORERS = ("exact", "contains", "math")


class Jsonl:
    """`scorer`: exact (after stripping), contains, or math (math-verify on the completion's final expression)."""

    def __init__(self, path: Path, *, scorer: str = "exact") -> None:
        """Read the file. Raises ConfigError naming the line that is wrong."""
        if scorer not in SCORERS:
            raise ConfigError(f"scorer must be one of {', '.join(SCORERS)}, not {scorer!r}")
        self.name, self.scorer = f"jsonl/{path.stem}", scorer
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        self._questions = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not self._questions:
            raise ConfigError(f"{path} holds no questions")

    def __len__(self) -> int:
        return len(self._questions)

    def question(self, index: int) -> Question:
        """Return question `index`. Raises IndexError after the last one."""
        return self._questions[index]

    def score(self, answer: str | None, completion: str) -> float:
        """1 or 0, as the scorer says. Raises ConfigError for a question without an answer."""
        if answer is None:
            raise ConfigError(f"{self.name}: a question without an answer cannot be scored")
        if self.scorer == "exact":
            return float(completion.strip() == answer.strip())
        if self.scorer == "contains":
            return float(answer.strip() in completion)
        return float(same_value(answer, completion))


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
        raise ConfigError(f'{where} has no "prompt"')
    answer = record.get("answer")
    return Question(text=record["prompt"], answer=None if answer is None else str(answer))
