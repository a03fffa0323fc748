"""The smallest task with a prompt that matters: repeat the letter. For policies that are trained in a minute."""

from __future__ import annotations

import random

from trueup.tasks.base import Question

LETTERS = "abcdefgh"
LENGTH = 6


class Repeat:
    """A word of six letters ends in the letter to repeat; the reward is the share of the answer that is this letter.

    An answer that ignores the prompt earns 1/8 on average, whatever it is.
    """

    name = "repeat"
    blind = 1 / len(LETTERS)

    def question(self, index: int) -> Question:
        """Return question `index`; there is no last one."""
        chooser = random.Random(f"repeat {index}")
        word = "".join(chooser.choice(LETTERS) for _ in range(LENGTH))
        return Question(text=word, answer=word[-1])

    def score(self, answer: str | None, completion: str) -> float:
        """Share of the completion's characters that are the letter; 0 for an empty one."""
        return completion.count(answer or "\0") / max(1, len(completion))
