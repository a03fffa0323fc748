"""What a task is: questions with an answer, and the reward of a completion.

One's own task is a class with `name`, `question` and `score`, given to `trueup.pipeline.run.train(config, task=...)`:

    class Reverse:
        name = "reverse"

        def question(self, index: int) -> Question:
            word = random.Random(index).choice(WORDS)
            return Question(text=f"Write {word} backwards.", answer=word[::-1])

        def score(self, answer: str | None, completion: str) -> float:
            return float(completion.strip() == answer)

It must be picklable: rewards are computed in processes of their own, which are ended when they take too long.
`question` is a function of its index alone, so that a run can be repeated and resumed. `answer` is all that `score`
gets besides the completion, so that a rollout log can be scored again. Text from a model is data: score it, never run
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What the model is asked, as `text` or as chat `messages` ({"role", "content"}), and the `answer` that the task
    scores against (plain text, or JSON of its own)."""

    text: str = ""
    answer: str | None
    messages: tuple[Mapping[str, str], ...] = ()


class Task(Protocol):
    """See the top of this file."""

    name: str

    def question(self, index: int) -> Question:
        """Return question number `index` (0, 1, ...). Raises IndexError after the last one, if there is one."""
        ...

    def score(self, answer: str | None, completion: str) -> float:
        """Return the reward of a completion, finite."""
        ...
