"""Text at the edge of the engine: end tokens, stop strings and chat templates. Inside there are only ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trueup.engines.base import GenerationRequest
from trueup.errors import EngineError
from trueup.model.load import LoadedModel

MAX_STOPS = 16
WINDOW_SLACK = 8


class Tokens:
    """A checkpoint's tokenizer, if it has one, and the ids that end a completion."""

    def __init__(self, path: Path, model: LoadedModel) -> None:
        self.path = path
        self.eos_ids = _eos_ids(model)
        self.tokenizer = _tokenizer(path)

    def check(self, request: GenerationRequest) -> None:
        """Raise EngineError for stop strings that cannot be looked for."""
        stop = request.sampling.stop
        if stop and self.tokenizer is None:
            raise EngineError(f"{self.path} has no tokenizer: stop strings cannot be recognised, use token ids")
        if len(stop) > MAX_STOPS or any(not isinstance(s, str) or not s for s in stop):
            raise EngineError(f"stop must be at most {MAX_STOPS} strings, none of them empty")

    def stopped(self, completion: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the newest token completed a stop string."""
        if not stop:
            return False
        window = 4 * max(map(len, stop)) + WINDOW_SLACK
        text = self.decode(completion[-window:])
        return any(s in text for s in stop)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises EngineError without a tokenizer or for text that gives no token."""
        ids: list[int] = list(self._need().encode(text))
        if not ids:
            raise EngineError("the prompt is empty")
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the assistant speaks. Raises EngineError without a template."""
        from jinja2 import TemplateError

        tokenizer = self._need()
        if not getattr(tokenizer, "chat_template", None):
            raise EngineError(f"{self.path} has no chat template; use /v1/completions")
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise EngineError(f"the chat template refuses these messages: {error}") from None
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; "" without a tokenizer."""
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _need(self) -> Any:
        if self.tokenizer is None:
            raise EngineError(f"{self.path} has no tokenizer; send token ids")
        return self.tokenizer


def _eos_ids(model: LoadedModel) -> frozenset[int]:
    found: list[int | None] = []
    for source in (getattr(model.lm, "generation_config", None), model.lm.config):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, list) else [value]
    return frozenset(i for i in found if i is not None)


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
