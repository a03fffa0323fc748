"""The prompts of a live check: short and long, plain and as a chat, and some as no tokenizer would write them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trueup.parity.context import Contexts

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: A farmer has 17 sheep and buys 25 more. How many sheep does he have?\nAnswer:",
    "The three laws of thermodynamics state that",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 12 March. I am writing to",
    "12 + 30 = 42\n17 + 25 = 42\n9 + 33 =",
    "In 1969, the first astronauts landed on the Moon. Their names were",
    "SELECT name, price FROM products WHERE price > 100 ORDER BY",
    "To bake a loaf of bread you need flour, water, salt and yeast. First,",
    "La lluvia en Sevilla es una maravilla, y",
    "Photosynthesis converts light, water and carbon dioxide into",
    '{"name": "Ada", "born": 1815, "occupation":',
    "Why is the sky blue? Explain it to a child.",
    "The quick brown fox jumps over the lazy dog. The dog then",
    "Step 1: let x be the number of apples. Step 2: then 3x + 4 = 19, so x =",
)
LONG_TEXT = "Lines of the ledger: " + " ".join(
    f"on day {day} the mill ground {7 * day % 50 + 3} sacks and sold {5 * day % 41 + 1};" for day in range(1, 90)
)
RANDOM_LENGTHS = (8, 12, 16, 20, 24, 28, 32, 36)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Token ids: the ordinary prompts, and one long enough to fill several blocks of a prefix cache."""

    ordinary: tuple[tuple[int, ...], ...]
    long: tuple[int, ...]


def make_prompts(contexts: Contexts, *, count: int, long_tokens: int, vocab: int, seed: int = 0) -> Prompts:
    """Make `count` prompts: every fourth re-spelled in single characters, every eighth a chat, and the last two cut
    from the long one, to a quarter and a half of it; random ids where the checkpoint has no tokenizer."""
    tokenizer = contexts.tokenizer
    chooser = random.Random(seed)
    if tokenizer is None:

        def some(length: int) -> tuple[int, ...]:
            return tuple(chooser.randrange(min(4, vocab - 1), vocab) for _ in range(length))

        ordinary = [some(RANDOM_LENGTHS[i % len(RANDOM_LENGTHS)]) for i in range(count)]
        long = some(long_tokens)
    else:
        ordinary = [_spelled(tokenizer, TEXTS[i % len(TEXTS)], i) for i in range(count)]
        long = tuple(tokenizer.encode(LONG_TEXT, add_special_tokens=False))[:long_tokens]
    if count >= 8:
        ordinary[-2:] = [long[: len(long) // 4], long[: len(long) // 2]]
    return Prompts(ordinary=tuple(ordinary), long=long)


def _spelled(tokenizer: object, text: str, index: int) -> tuple[int, ...]:
    encode = tokenizer.encode  # type: ignore[attr-defined]
    if index % 8 == 5 and getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        return tuple(encode(chat, add_special_tokens=False))
    if index % 4 == 3:
        return tuple(i for character in text for i in encode(character, add_special_tokens=False))
    return tuple(encode(text, add_special_tokens=False))
