"""Bets against the declared distribution: would another one have made the drawn tokens likelier?

A statistic sees what it was made for. A bet sees any way of drawing that somebody can write down: with q the other
distribution and p the declared one, the product of q/p over all tokens has expectation 1 if p was drawn from, so that
it exceeds 1/rate with probability at most rate (Ville 1939; "e-values", Vovk and Wang 2021). The same holds for a mean
of such products, and for a q that was fitted to other tokens.

The others are: filters, as intervals of the mass of likelier tokens; tokens that the completion holds already, as
penalties change them; ranges of ids, even ids and ids that are drawn too often or never; and whatever histogram one
half of the rows shows, tried on the other half.

Shapes: T usable tokens of a setting, B equal ranges of ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.parity.evidence import EngineModel, Evidence
from trueup.parity.places import Places

HEDGE = 0.02
"""Share of every bet that is put on the declared distribution: one token that the other rules out does not end it."""
TOP_MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
RATIOS = (0.05, 0.3, 3.0)
"""How much less or more often the ids of a range may be drawn."""
BINS = 8
SMOOTH = 4.0
"""Tokens that are added to each bin of a fitted histogram."""
TOO_OFTEN, AT_LEAST = 3.0, 8
"""An id is drawn too often in one half from so many times its expectation on, and so many times."""
NEVER = 4.0
"""An id that was not drawn is missed where so many were expected."""
CHANGED_IDS, CHANGED_PLACES = "ids", "places"


@dataclass(frozen=True, kw_only=True)
class Bet:
    """What was bet on, how much it won (nats), and of what kind it is: a distribution, ids, or places."""

    words: str
    nats: float
    kind: str = ""


def best_bet(
    evidence: Evidence, model: EngineModel, usable_T: Tensor, *, rate: float, slack: float
) -> Bet | None:  # fmt: skip
    """The bet that won most, if all bets together won more than chance allows at `rate`; else None.

    `slack` nats are what an engine's rounding of its own distribution may win.
    """
    if not model.source.plain or not bool(usable_T.any()):
        return None
    bets = list(_bets(evidence, model, usable_T))
    total = torch.logsumexp(torch.tensor([bet.nats for bet in bets], dtype=torch.float64), 0) - math.log(len(bets))
    if float(total) <= slack + _of_removed_ends(evidence, model, usable_T) - math.log(rate):
        return None
    return max(bets, key=lambda bet: bet.nats)


def _of_removed_ends(evidence: Evidence, model: EngineModel, usable_T: Tensor) -> float:
    """What a distribution without end tokens may win where the log holds none: they were removed, most likely, and
    draw_ends.py judges whether completions end."""
    ends = evidence.facts.eos_ids
    if not ends or bool(torch.isin(evidence.tokens.targets_T, torch.tensor(ends)).any()):
        return 0.0
    mass_T = evidence.mass(model.source, model.dist.temperature, ends).double()[usable_T]
    return -float(torch.log1p(-mass_T.clamp_max(1 - 1e-6)).sum())


def _bets(evidence: Evidence, model: EngineModel, usable_T: Tensor) -> Iterator[Bet]:
    if model.dist.penalises:
        yield _without_penalties(evidence, model, usable_T)
        return
    places = evidence.places(model.source, model.dist.temperature).at(usable_T)
    kept_T = evidence.scores(model.source, model.dist).log_kept_mass_T.double().exp()[usable_T]
    half_T = evidence.tokens.row_T[usable_T] % 2 == 0
    low_T = places.above_T / kept_T
    high_T = ((places.above_T + places.tied_T) / kept_T).clamp_max(1.0)
    for mass in TOP_MASSES:
        inside_T = ((torch.minimum(high_T, torch.tensor(mass)) - low_T) / (high_T - low_T).clamp_min(1e-30)).clamp(0, 1)
        words = f"tokens beyond the {mass:.0%} that are likeliest are missing"
        yield Bet(words=words, nats=_won(inside_T / mass))
    yield from _on_histogram(low_T, high_T, half_T, "by how much likelier tokens there were")
    if model.dist.truncates:
        return
    for ratio in RATIOS:
        nats = _won_on_set(places.repeats_T > 0, places.earlier_T, ratio)
        yield Bet(words=f"tokens that a completion holds already are drawn {_often(ratio)}", nats=nats)
    low_T, high_T = places.below_T, places.below_T + places.own_T
    yield from _on_histogram(low_T, high_T, half_T, "by the mass of lower ids (a sampler's random numbers)")
    yield from _on_ids(evidence, model, places, usable_T, half_T)


def _won(ratio_T: Tensor) -> float:
    """Nats that a bet wins on tokens which it calls `ratio_T` times as likely."""
    return float(torch.log(HEDGE + (1 - HEDGE) * ratio_T).sum())


def _both_ways(first: float, second: float) -> float:
    """The mean of two bets, in nats."""
    return max(first, second) + math.log((1 + math.exp(-abs(first - second))) / 2)


def _without_penalties(evidence: Evidence, model: EngineModel, usable_T: Tensor) -> Bet:
    """Penalties are declared, and the draws have none."""
    plain = replace(model.dist, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    declared_T, plain_T = (
        evidence.scores(model.source, dist).logprobs_T.double()[usable_T] for dist in (model.dist, plain)
    )
    return Bet(words="the tokens are likelier without penalties", nats=_won((plain_T - declared_T).exp()))


def _won_on_set(inside_T: Tensor, mass_T: Tensor, ratio: float) -> float:
    """Nats that a bet wins on ids of that mass being drawn `ratio` times as often as all others."""
    return _won(torch.where(inside_T, ratio, 1.0) / (1 - mass_T + ratio * mass_T))


def _on_histogram(low_T: Tensor, high_T: Tensor, half_T: Tensor, what: str) -> Iterator[Bet]:
    """Places of tokens, each an interval inside [0, 1] of its own probability, are even if p was drawn from."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    width_T = (high_T - low_T).clamp_min(1e-30)
    share_TN = (
        torch.minimum(high_T[:, None], edges[None, 1:]) - torch.maximum(low_T[:, None], edges[None, :-1])
    ).clamp_min(0) / width_T[:, None]

    def learnt(from_T: Tensor) -> float:
        counts = share_TN[from_T].sum(0) + SMOOTH
        return _won(share_TN[~from_T] @ (counts / counts.sum() * BINS))

    nats = _both_ways(learnt(half_T), learnt(~half_T))
    yield Bet(words=f"half of the completions predict the others {what}", nats=nats, kind=CHANGED_PLACES)


def _on_ids(
    evidence: Evidence, model: EngineModel, places: Places, usable_T: Tensor, half_T: Tensor
) -> Iterator[Bet]:  # fmt: skip
    """Ids that are drawn more or less often, as ranges, as even ones, or one by one (but end tokens)."""
    ids_T = evidence.tokens.targets_T[usable_T]
    size = -(-places.vocab // places.blocks_TB.shape[1])
    for block in range(places.blocks_TB.shape[1]):
        words = f"ids {block * size} to {min(places.vocab, (block + 1) * size) - 1} are drawn"
        for ratio in RATIOS:
            nats = _won_on_set(ids_T // size == block, places.blocks_TB[:, block], ratio)
            yield Bet(words=f"{words} {_often(ratio)}", nats=nats, kind=CHANGED_IDS)
    for ratio in (0.5, 2.0):
        nats = _won_on_set(ids_T % 2 == 0, places.even_T, ratio)
        yield Bet(words=f"even ids are drawn {_often(ratio)}", nats=nats, kind=CHANGED_IDS)
    expected_V = places.expected_V / 2 * (len(ids_T) / len(usable_T))
    for words, pick, ratio in (("drawn far too often", _too_often, 10.0), ("never drawn", _never, 0.02)):
        found: list[tuple[float, Sequence[int]]] = []
        for from_T in (half_T, ~half_T):
            ids = pick(torch.bincount(ids_T[from_T], minlength=places.vocab), expected_V)
            ids = [i for i in ids if i not in (evidence.facts.eos_ids or ())]
            if not ids:
                found.append((0.0, ids))
                continue
            mass_T = evidence.mass(model.source, model.dist.temperature, tuple(ids)).double()[usable_T][~from_T]
            inside_T = torch.isin(ids_T[~from_T], torch.tensor(ids))
            found.append((_won_on_set(inside_T, mass_T, ratio), ids))
        shown = ", ".join(map(str, sorted({*found[0][1], *found[1][1]})[:5]))
        yield Bet(words=f"ids are {words}: {shown}", nats=_both_ways(found[0][0], found[1][0]), kind=CHANGED_IDS)


def _often(ratio: float) -> str:
    return "too often" if ratio > 1 else "too seldom"


def _too_often(counts_V: Tensor, expected_V: Tensor) -> list[int]:
    return torch.nonzero((counts_V >= AT_LEAST) & (counts_V > TOO_OFTEN * expected_V))[:, 0].tolist()


def _never(counts_V: Tensor, expected_V: Tensor) -> list[int]:
    return torch.nonzero((counts_V == 0) & (expected_V > NEVER))[:, 0].tolist()
