"""Probes: the same request twice, with one thing changed. What differs between two answers is that thing's doing.

Each probe returns a paired gap in nats over the tokens that both answers share, counted from the start; where the
answers part, the token before which they had the same context is the last one compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from trueup.engines.probe_http import Answer, Ask, ProbeClient
from trueup.parity.floor import FLOAT32_NATS
from trueup.trace import TraceRow

EXPLICIT = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Every shaping field at its neutral value, for requests that leave nothing to the engine."""


MIN_COMPARED = 16
"""Tokens below which two answers that agree show nothing."""
ALL_PARTED = 6
"""Rounding in 16 bits alone lets one seed draw two tokens where the distribution is flat: first tokens that part say
something there only if so many do, and none does not."""
DRAWS_AGAIN = 6
"""Times each side of a pair that parted is asked again: had rounding drawn one token or the other, at even odds, six
answers alike on either side, and not the same, would come once in 2,048 pairs."""
PAIRS_AGAIN = 3
"""Pairs that are asked again, at most."""
CACHE_SEEDS, CACHE_ROUNDS, CACHE_TOKENS = 3, 4, 8
"""Requests a round of the cache probe, and rounds until enough tokens are shared."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How far two answers to the same requests are apart: rms and largest |difference| in nats, over `tokens`.

    `parted` counts pairs that drew different tokens, `at_once` those that did so at the first, `failed` pairs of which
    one did not come back.
    """

    tokens: int
    rms: float
    max_abs: float
    parted: int
    at_once: int
    failed: int

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """A probe's outcome. `limit_rms` is what its gap was held against, nats; `text` says it in a line."""

    name: str
    gap: Gap | None
    limit_rms: float
    text: str

    @property
    def differs(self) -> bool:
        """Whether the changed thing made a difference beyond the limit, in numbers or in the first tokens drawn."""
        if self.gap is None:
            return False
        if self.numbers_differ:
            return True
        if self.limit_rms < FLOAT32_NATS:
            return self.gap.at_once > 1
        return self.gap.at_once >= ALL_PARTED and not self.gap.tokens

    @property
    def numbers_differ(self) -> bool:
        """Whether the numbers of tokens that both sides share are apart by more than the limit."""
        return self.gap is not None and self.gap.tokens > 0 and self.gap.rms > self.limit_rms

    @property
    def compared(self) -> bool:
        """Whether there was enough to compare for "alike" to mean something."""
        return self.gap is not None and self.gap.tokens >= MIN_COMPARED

    def as_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "gap": None if self.gap is None else self.gap.as_dict(),
            "limit_rms": self.limit_rms,
            "differs": self.differs,
            "text": self.text,
        }


def paired(first: Sequence[Answer], second: Sequence[Answer]) -> Gap:
    """Compare answers pair by pair over their common beginning; two logprobs that are both no numbers are alike."""
    squares: list[float] = []
    parted = at_once = failed = 0
    for one, other in zip(first, second, strict=True):
        if one.error or other.error:
            failed += 1
            continue
        for token, (mine, theirs) in enumerate(zip(one.ids, other.ids, strict=False)):
            if mine != theirs:
                parted += 1
                at_once += token == 0
                break
            if token < min(len(one.logprobs), len(other.logprobs)):
                squares.append(_squared(one.logprobs[token], other.logprobs[token]))
    rms = math.sqrt(sum(squares) / len(squares)) if squares else 0.0
    return Gap(
        tokens=len(squares),
        rms=rms,
        max_abs=math.sqrt(max(squares, default=0.0)),
        parted=parted,
        at_once=at_once,
        failed=failed,
    )


def _squared(mine: float, theirs: float) -> float:
    """Squared difference; 0 between numbers that are both not finite, infinite where one is."""
    if not (math.isfinite(mine) or math.isfinite(theirs)):
        return 0.0
    difference = mine - theirs
    return difference**2 if math.isfinite(difference) else math.inf


def paired_values(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Gap:
    """Compare two passes over the same tokens."""
    answers = [[Answer(ids=tuple(range(len(v))), logprobs=tuple(v)) for v in side] for side in (first, second)]
    return paired(*answers)


def outcome(name: str, gap: Gap, limit_rms: float, words: str) -> Probed:
    """Name a gap and put it into words."""
    if not gap.tokens:
        text = f"{words}: nothing to compare ({gap.at_once} drew another first token, {gap.failed} failed)"
    else:
        text = f"{words}: rms {gap.rms:.2g} nats over {gap.tokens} tokens (limit {limit_rms:.2g})"
        text += f", {gap.at_once} drew another first token" if gap.at_once else ""
    return Probed(name=name, gap=gap, limit_rms=limit_rms, text=text)


def asks_of(
    prompts: Sequence[tuple[int, ...]],
    sampling: dict[str, object],
    *,
    max_tokens: int,
    seed: int = 0,
    salt: str | None = None,
) -> list[Ask]:
    """One request a prompt, seeded by `seed` and its place."""
    return [
        Ask(
            prompt=p,
            sampling=sampling,
            seed=1000 * (seed + 1) + i,
            max_tokens=max_tokens,
            salt=None if salt is None else f"{salt}-{i}",
        )
        for i, p in enumerate(prompts)
    ]


def scored(client: ProbeClient, rows: Sequence[TraceRow], *, together: bool) -> list[Answer]:
    """The engine's own raw scores of rows it generated."""
    return client.score([(r.prompt_token_ids, r.completion_token_ids) for r in rows], together=together)


def twice(once: Sequence[Answer], again: Sequence[Answer], *, limit_rms: float) -> Probed:
    """The same requests, alone, two times."""
    return outcome("repeat", paired(once, again), limit_rms, "the same request twice, alone")


def drawn_apart(client: ProbeClient, pairs: Sequence[tuple[Ask, Ask]], answers: Sequence[Sequence[Answer]]) -> int:
    """How many of the pairs whose `answers` parted (the first few) do so again, each side the same way every time.

    One pair that parts once is nothing: 16 bits round differently in another batch, and where the distribution is flat
    a last bit decides. Sides are asked alone and in turns (A B B A), so that what drifts on the server hits both.
    """
    apart = asked = 0
    for pair, one, other in zip(pairs, *answers, strict=True):
        until = next((i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b), None)
        if until is None or one.error or other.error or asked == PAIRS_AGAIN:
            continue
        asked += 1
        apart += _parts_again(client, [replace(ask, max_tokens=until + 1) for ask in pair])
    return apart


def _parts_again(client: ProbeClient, pair: Sequence[Ask]) -> bool:
    """Whether two requests draw apart in every one of `DRAWS_AGAIN` rounds, each as it did in the first."""
    first: dict[int, tuple[int, ...]] = {}
    for turn in range(DRAWS_AGAIN):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            answer = client.generate([pair[side]], together=False)[0]
            if answer.error or answer.ids != first.setdefault(side, answer.ids) or first.get(1 - side) == answer.ids:
                return False
    return True


def against_itself(
    client: ProbeClient,
    once: Sequence[Answer],
    again: Sequence[Answer],
    together: Sequence[Answer],
    rows: Sequence[TraceRow],
    *,
    limit_rms: float,
) -> tuple[list[Probed], list[Answer]]:
    """The engine against itself: the same requests alone, `once` and `again`, and `together`, generated and scored.

    `rows` carry the engine's scores of given tokens, made together (none: it cannot score). Given tokens never part, so
    that every one of them is compared. Returns the probes and the scores of `rows` made alone.
    """
    alone: list[Answer] = []
    probes = [
        twice(once, again, limit_rms=limit_rms),
        outcome("batch", paired(once, together), limit_rms, "alone against together with others"),
    ]
    if rows:
        alone, again = (scored(client, rows, together=False) for _ in range(2))
        batched = [Answer(ids=r.completion_token_ids, logprobs=r.completion_logprobs) for r in rows]
        probes += [
            outcome("repeat, scored", paired(alone, again), limit_rms, "the same tokens scored twice, alone"),
            outcome("batch, scored", paired(alone, batched), limit_rms, "tokens scored alone against with others"),
        ]
    return probes, alone


def cached_against_fresh(
    client: ProbeClient, prompt: tuple[int, ...], *, limit_rms: float, salt: str, warm: bool = True
) -> Probed:
    """A prompt from the cache against the same prompt under a salt of its own.

    With `warm` it is asked for once before, so that it is in the cache; without, whatever is cached is used.
    """
    sampling: dict[str, object] = {"temperature": 1.0}
    from_cache: list[Answer] = []
    computed: list[Answer] = []
    for turn in range(CACHE_ROUNDS):
        seeds = range(7 + turn * CACHE_SEEDS, 7 + (turn + 1) * CACHE_SEEDS)
        shared = [Ask(prompt=prompt, sampling=sampling, seed=s, max_tokens=CACHE_TOKENS) for s in seeds]
        if warm and not turn:
            client.generate(shared[:1], together=False)
        from_cache += client.generate(shared, together=False)
        fresh = [replace(ask, salt=f"{salt}-{ask.seed}") for ask in shared]
        computed += client.generate(fresh, together=False)
        if limit_rms < FLOAT32_NATS or paired(from_cache, computed).tokens >= MIN_COMPARED:
            break
    hits = [a.cached_tokens for a in from_cache if a.cached_tokens is not None]
    words = "cached prompt against the same under a fresh salt" + (f" ({max(hits)} tokens cached)" if hits else "")
    return outcome("cache", paired(from_cache, computed), limit_rms, words)
