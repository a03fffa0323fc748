"""Questions from a file, one JSON object per line: {"prompt": ..., "answer": ...}.

A prompt is a text or a list of chat messages. Only a line feed ends a line: other separators (U+2028, for instance) may
stand inside a JSON text. A byte-order mark and Windows line ends are passed over.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path

from trueup.errors import ConfigError
from trueup.tasks.base import Question
from trueup.tasks.mathematics import same_value

SCORERS = ("exact", "contains", "math")
ROLES = ("system", "user", "assistant", "developer", "tool")


class Jsonl:
    """`scorer`: exact (after stripping), contains, or math (math-verify on the completion's final expression).

    Questions come in an order that depends on `seed` alone: a file that is sorted by difficulty is not a curriculum.
    `digest` names the file's content.
    """

    def __init__(self, path: Path, *, scorer: str = "exact", seed: int = 0) -> None:
        """Read the file. Raises ConfigError naming the line that is wrong."""
        if scorer not in SCORERS:
            raise ConfigError(f"scorer must be one of {', '.join(SCORERS)}, not {scorer!r}")
        self.name, self.scorer = f"jsonl/{path.stem}", scorer
        try:
            content = path.read_bytes()
            lines = content.decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from None
        self.digest = hashlib.sha256(content).hexdigest()
        self._questions = [_question(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not self._questions:
            raise ConfigError(f"{path} holds no questions")
        random.Random(seed).shuffle(self._questions)

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
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if isinstance(record, list):
        raise ConfigError(f"{where} holds a JSON array: write one object per line")
    if not isinstance(record, dict):
        raise ConfigError(f'{where} is not a JSON object with "prompt" and "answer"')
    answer = record.get("answer")
    prompt, text = record.get("prompt"), None if answer is None else str(answer)
    if isinstance(prompt, list) and prompt:
        return Question(messages=tuple(_message(m, where) for m in prompt), answer=text)
    if not isinstance(prompt, str) or not prompt:
        has = ", ".join(sorted(map(str, record)))[:80] or "nothing"
        raise ConfigError(f'{where} has no "prompt" (it has {has}): rename the key that holds the question')
    return Question(text=prompt, answer=text)


def _message(message: object, where: str) -> Mapping[str, str]:
    if isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str):
        return {"role": message["role"], "content": message["content"]}
    raise ConfigError(f'{where}: a message of a prompt is {{"role": ..., "content": text}}, not {str(message)[:80]!r}')
