"""Questions as token ids, and which of them are held out: by the hash of their tokens, so that the two never meet.

A question is tokenised once, here; what an engine returns is never tokenised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trueup.errors import ConfigError, ModelError
from trueup.tasks.base import Question, Task
from trueup.types import Prompt

BUCKETS = 16
HELD_OUT_BUCKETS = 2
"""One prompt in eight is held out."""
SEARCH = 100_000
"""Questions looked through before a split is called empty."""


def held_out(token_ids: Sequence[int]) -> bool:
    """Whether a prompt belongs to the held-out ones."""
    digest = hashlib.sha256(" ".join(map(str, token_ids)).encode()).digest()
    return digest[0] % BUCKETS < HELD_OUT_BUCKETS


class PromptSource:
    """The prompts of a task for one tokenizer."""

    def __init__(self, task: Task, model: Path, *, chat: bool, system: str = "") -> None:
        """`chat`: through the model's chat template, with a system message if one is given.

        Raises ModelError without a usable tokenizer, ConfigError for a chat without a template.
        """
        from transformers import AutoTokenizer

        if not model.is_dir():
            raise ModelError(f"model folder {model} does not exist")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{model} has no usable tokenizer: {str(error).splitlines()[0][:200]}") from None
        if chat and not self.tokenizer.chat_template:
            raise ConfigError(f"{model} has no chat template: set task.chat = false")
        if system and not chat:
            raise ConfigError("task.system needs task.chat")
        self.task, self.chat, self.system = task, chat, system

    def prompt(self, index: int) -> Prompt:
        """Question number `index` as a prompt. Raises IndexError after a task's last question."""
        question = self.task.question(index)
        return Prompt(
            prompt_id=f"{self.task.name}/{index}", task=self.task.name, token_ids=self._ids(question),
            answer=question.answer,
        )  # fmt: skip

    def _ids(self, question: Question) -> tuple[int, ...]:
        if not question.messages:
            return self.encode(question.text)
        if not self.chat:
            raise ConfigError(f"{self.task.name}: a prompt is a list of chat messages: set task.chat = true")
        return self._chat(question.messages)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that the model is asked."""
        if not self.chat:
            return tuple(self.tokenizer(text)["input_ids"])
        return self._chat([{"role": "user", "content": text}])

    def _chat(self, turns: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Token ids of chat messages, behind the task's system message unless they bring their own."""
        own = any(turn["role"] in ("system", "developer") for turn in turns)
        messages = [{"role": "system", "content": self.system}] if self.system and not own else []
        messages += [dict(turn) for turn in turns]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """A completion as text for the scorer, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def training(self, start: int = 0) -> Iterator[tuple[int, Prompt]]:
        """Yield (index, prompt) of training prompts from question `start` on, for ever: a task that ends begins anew.

        Raises ConfigError when none of the first questions is one.
        """
        index, missed = start, 0
        while True:
            prompt = self._wrapped(index)
            if held_out(prompt.token_ids):
                missed += 1
                if missed > SEARCH:
                    raise ConfigError(f"{self.task.name}: every question is held out")
            else:
                missed = 0
                yield index, prompt
            index += 1

    def _wrapped(self, index: int) -> Prompt:
        """Question `index`, counted on past a task's last one; its prompt_id carries the index itself."""
        length = getattr(self.task, "__len__", lambda: 0)()
        prompt = self.prompt(index % length if length else index)
        return replace(prompt, prompt_id=f"{self.task.name}/{index}")

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` different held-out prompts, or all there are.

        Raises ConfigError when there is none.
        """
        found: dict[tuple[int, ...], Prompt] = {}
        for index in range(SEARCH):
            try:
                prompt = self.prompt(index)
            except IndexError:
                break
            if held_out(prompt.token_ids):
                found.setdefault(prompt.token_ids, prompt)
                if len(found) == count:
                    break
        if not found:
            raise ConfigError(f"{self.task.name} has no held-out question: it needs more of them")
        return list(found.values())
