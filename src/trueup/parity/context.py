"""What can happen to a prompt between a client that sends token ids and the model that sees them.

Each context is a name and a function on ids; the scorer runs the trainer on what it gives, to see whether that is what
the engine saw.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BOS_ADDED, BOS_REMOVED, RETOKENIZED = "BOS added", "BOS removed", "re-tokenized"
TEMPLATED, SYSTEM_ADDED, GENERATION_PROMPT = "chat template applied", "default system prompt", "no assistant turn"
BOS_TWICE = "two BOS added"
SEPARATORS = {"\n": "a newline", "\n\n": "two newlines", " ": "a space"}
BEHIND, IN_FRONT, NOT_BEHIND = "behind: ", "in front: ", "not behind: "
"""Followed by a separator that is added behind the prompt or in front of it, or taken away behind it."""
MARK = "X"
LAST = "last "
"""Followed by a number: only that many tokens of the prompt are seen."""


class Contexts:
    """The tokenizer's view of prompts; without a tokenizer only cuts can be tried."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer: Any = None
        self._bos = _bos(path)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None."""
        if self._tokenizer is None:
            self._tokenizer = _load(self.path) or False
        return self._tokenizer or None

    def applied(self, context: str | None, ids: Sequence[int]) -> tuple[int, ...]:
        """Return what the model sees of a prompt in a context; the prompt itself where it does not apply."""
        if context is None:
            return tuple(ids)
        if context.startswith(LAST):
            return tuple(ids[-int(context.removeprefix(LAST)) :])
        if context == BOS_ADDED:
            return (self._bos, *ids) if self._bos is not None else tuple(ids)
        if context == BOS_TWICE:
            return (self._bos, self._bos, *ids) if self._bos is not None else tuple(ids)
        for kind in (BEHIND, IN_FRONT, NOT_BEHIND):
            if context.startswith(kind):
                return self._separated(kind, context.removeprefix(kind), tuple(ids))
        if context == BOS_REMOVED:
            return tuple(ids[1:]) if ids[0] == self._bos and len(ids) > 1 else tuple(ids)
        return self._rendered(context, ids) or tuple(ids)

    def _separated(self, kind: str, separator: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if self.tokenizer is None:
            return ids
        added = tuple(self.tokenizer.encode(separator, add_special_tokens=False))
        if kind == NOT_BEHIND:
            return ids[: -len(added)] if ids[-len(added) :] == added and len(ids) > len(added) else ids
        return ids + added if kind == BEHIND else added + ids

    def _rendered(self, context: str, ids: Sequence[int]) -> tuple[int, ...]:
        if self.tokenizer is None:
            return tuple(ids)
        text = self.tokenizer.decode(list(ids))
        if context == RETOKENIZED:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            return tuple(ids)
        encode = self.tokenizer.encode
        wrapped = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
        )
        before, mark, after = wrapped.partition(MARK)
        bare = self.tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
        opening = tuple(encode(wrapped[len(bare) :], add_special_tokens=False)) if wrapped.startswith(bare) else ()
        system = tuple(encode(_system_of(before), add_special_tokens=False))
        if context == TEMPLATED and mark:
            sides = [tuple(encode(side, add_special_tokens=False)) for side in (before, after)]
            return (*sides[0], *ids, *sides[1])
        if context == GENERATION_PROMPT and opening and tuple(ids[-len(opening) :]) == opening:
            return tuple(ids[: -len(opening)])
        if context == SYSTEM_ADDED and system and tuple(ids[: len(system)]) != system:
            return (*system, *ids)
        return tuple(ids)

    def offered(self, prompts: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Contexts, cuts aside, in which at least one of the prompts is another one."""
        names = [BOS_ADDED, BOS_TWICE, BOS_REMOVED, RETOKENIZED, TEMPLATED, SYSTEM_ADDED, GENERATION_PROMPT]
        names += [f"{kind}{separator}" for kind in (BEHIND, IN_FRONT, NOT_BEHIND) for separator in SEPARATORS]
        return tuple(n for n in names if any(self.applied(n, p) != tuple(p) for p in prompts))


def _system_of(before: str) -> str:
    """The system turn that a template puts in front of a lone user turn: everything up to where that turn opens."""
    for mark in ("<|im_start|>user", "<|start_header_id|>user", "<|user|>", "[INST]", "<start_of_turn>user"):
        head, found, _ = before.partition(mark)
        if found and head.strip():
            return head
    return ""


def _bos(path: Path) -> int | None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = config.get("bos_token_id") if isinstance(config, dict) else None
    return value if isinstance(value, int) else None


def _load(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
