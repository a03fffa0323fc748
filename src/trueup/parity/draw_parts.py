"""Draws of some tokens only: one replica, one row, one position of every completion, the first halves.

What is wrong with a part disappears in the whole, or is cancelled there by another part. The count of most likely
tokens is judged in every part, exactly; the surprise of tokens, whose tail is heavy, in large parts only.

Shapes: T usable tokens of a setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.parity.evidence import Tokens
from trueup.parity.floor import normal_quantile

LARGE = 256
"""Tokens from which on the surprise of a part is taken as normal, but for SKEW."""
WORTH_COUNTING = 2.5
"""Standard deviations below which the count of a part is not worth an exact sum."""
NOISE_SIGMAS = 4.0


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is known of tokens as draws: which are the most likely ones, how probable that was, their surprise above
    its expectation (nats) and its variance, and the contexts that are the same (equal numbers)."""

    top_T: Tensor
    chance_T: Tensor
    offset_T: Tensor
    variance_T: Tensor
    context_T: Tensor

    def at(self, where_T: Tensor) -> Drawn:
        """The same of some tokens (a mask)."""
        return Drawn(**{name: getattr(self, name)[where_T] for name in self.__dataclass_fields__})

    def counted(self, noise_rms: float) -> int:
        """How many are the most likely token, brought closer to the expectation by what an engine's rounding may do.

        Two logits that move by noise of rms s each move the odds of the most likely token by sqrt(2) s nats, up or
        down, alike in equal contexts; where tokens are uncertain s is twice the average.
        """
        odds_T = self.chance_T.clamp(1e-12, 1 - 1e-12).logit()
        lower_T, upper_T = (torch.sigmoid(odds_T + sign * 2 * math.sqrt(2) * noise_rms) for sign in (-1, 1))
        moved_T = torch.maximum(self.chance_T - lower_T, upper_T - self.chance_T)
        bent_T = (lower_T + upper_T) / 2 - self.chance_T
        _, same_T = torch.unique(self.context_T, return_inverse=True)
        by_context = torch.zeros(int(same_T.max()) + 1, dtype=moved_T.dtype).index_add_(0, same_T, moved_T)
        slack = abs(float(bent_T.sum())) + NOISE_SIGMAS * float(by_context.square().sum().sqrt())
        seen, expected = int(self.top_T.sum()), float(self.chance_T.sum())
        if seen > expected:
            return max(round(expected), math.ceil(seen - slack))
        return min(round(expected), math.floor(seen + slack))


@dataclass(frozen=True, kw_only=True)
class OddPart:
    """A part whose tokens chance does not explain: `words` says which, what was seen and what was expected."""

    words: str
    tokens: int
    top_tokens: int


def contexts(tokens: Tokens) -> Tensor:
    """A number for what stands before each token, [T]: the same for the same prompt and beginning."""
    known: dict[tuple[int, int], int] = {}
    prompts: dict[tuple[int, ...], int] = {}
    found, state, last = [], -1, -1
    for target, row in zip(tokens.targets_T.tolist(), tokens.row_T.tolist(), strict=True):
        if row != last:
            state, last = -1 - prompts.setdefault(tuple(tokens.prompts[row].tolist()), len(prompts)), row
        found.append(state)
        state = known.setdefault((state, target), len(known))
    return torch.tensor(found)


def _divisions(tokens: Tokens) -> Iterator[tuple[Tensor, Callable[[int], str]]]:
    """(part of each token [T], how to call a part) for every way of dividing tokens."""
    lengths_S = torch.bincount(tokens.row_T, minlength=len(tokens.lines))
    yield tokens.row_T, lambda row: f"line {tokens.lines[row]}"
    yield tokens.position_T, lambda position: f"token {position} of the completions"
    later_T = (2 * tokens.position_T >= lengths_S[tokens.row_T]).long()
    yield later_T, lambda half: f"the {'second' if half else 'first'} halves of the completions"
    names = sorted(set(tokens.replicas))
    if len(names) > 1:
        index = torch.tensor([names.index(name) for name in tokens.replicas])
        yield index[tokens.row_T], lambda replica: f"replica {names[replica] or 'without a name'}"


def odd_parts(
    drawn: Drawn, tokens: Tokens, usable_T: Tensor, *, rate: float, skew: float, noise_rms: float,
    chance_of: Callable[[Tensor, int], float],
) -> list[OddPart]:  # fmt: skip
    """The worst part of each division that chance rules out at `rate` a division.

    `drawn` is of the usable tokens alone. `chance_of(probabilities, count)` is the probability of such a count.
    """
    found = []
    for part_T, called in _divisions(tokens):
        here_T = part_T[usable_T]
        parts = torch.unique(here_T).tolist()
        share = rate / 2 / max(1, len(parts))
        worst: tuple[float, OddPart] | None = None
        for part in parts if len(parts) > 1 else ():
            own = drawn.at(here_T == part)
            chance, what = _judged(own, share, skew, noise_rms, chance_of)
            if what and (worst is None or chance < worst[0]):
                words = f"{called(part)}: {what}"
                worst = chance, OddPart(words=words, tokens=len(own.top_T), top_tokens=int(own.top_T.sum()))
        found += [worst[1]] if worst is not None else []
    return found


def _judged(
    own: Drawn, rate: float, skew: float, noise_rms: float, chance_of: Callable[[Tensor, int], float]
) -> tuple[float, str]:
    """(probability, what is odd about the tokens of a part), "" if nothing is."""
    count, expected = own.counted(noise_rms), float(own.chance_T.sum())
    spread = math.sqrt(float((own.chance_T * (1 - own.chance_T)).sum()))
    if abs(count - expected) > WORTH_COUNTING * spread and (chance := chance_of(own.chance_T, count)) < rate:
        seen, size = int(own.top_T.sum()), len(own.top_T)
        return chance, f"{seen} of {size} tokens are the most likely one, where {expected:.0f} were expected"
    if len(own.top_T) >= LARGE:
        offset, spread = float(own.offset_T.sum()), math.sqrt(float(own.variance_T.sum()))
        slack = len(own.top_T) * noise_rms**2
        z = math.copysign(max(0.0, abs(offset) - slack), offset) / max(spread, 1e-12)
        if abs(z) > skew * normal_quantile(rate / 2):
            chance = math.erfc(abs(z) / skew / math.sqrt(2))
            return chance, f"tokens are {'less' if z < 0 else 'more'} surprising than their distribution (z {z:+.1f})"
    return 1.0, ""
