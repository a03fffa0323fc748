"""Were the tokens drawn from the distribution that is declared? The numbers reported beside them cannot say.

An engine that takes the most likely token and reports that token's right logprob has a policy ratio of exactly 1, an
effective sample size of 1, and does not explore: the worst case for training, invisible in every gap.

Five statistics are held against what the trainer's own distributions predict: the surprise of all tokens, how many of
them are the most likely token, the same of first tokens alone, how many end a completion (draw_ends.py), and beginnings
that completions of one prompt share. The first two are judged in parts of the tokens as well (draw_parts.py). If none
of them shows anything, bets on other distributions are made (draw_bets.py).

Shapes: T completion tokens. Entropies are in nats, varentropies in nats squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from trueup.knobs import LimitsConfig
from trueup.parity.draw_bets import best_bet
from trueup.parity.draw_ends import missing_ends
from trueup.parity.draw_parts import Drawn, OddPart, contexts, odd_parts
from trueup.parity.evidence import EngineModel, Evidence, skipped
from trueup.parity.floor import normal_quantile
from trueup.policy.logprobs import TokenScores

STATISTICS = 10
"""Five of all tokens, those of parts in four divisions, and bets."""
SKEW = 1.2
"""The surprise of a token is skewed: a sum of few dozen leaves the range of a normal one more often than it should."""
SAME_NATS = 1e-6
ALIKE_NATS = 1e-4
"""Tokens are about equally likely if the most likely one is at most so far above their mean."""
LIKELY_END = 0.1
"""A position where an end token is more probable than this is not judged when end tokens are left out."""
LIKELY_END_OUTSIDE = 1e-3
"""The same under a kept set, which may or may not hold the end token."""
SURE_END = 0.999
"""The same where end tokens were removed after they were drawn: then the others are judged at any probability."""
EXPECTED_ENDS = 3.0
"""End tokens are taken to have been removed from a log where so many were expected and none is there."""
MAX_COMPARED = 64
"""Completions of a prompt that each further one is compared with."""
COLDER = 0.9
"""Draws rule something out only if they could show this share of the declared temperature."""
TOO_FEW_FIRST = "so few completions could not show that only their first tokens are drawn greedily"
EXACT_COUNT = 512
"""Up to so many tokens the number of most likely ones is judged exactly, beyond that as a normal number."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the tokens of a setting were drawn. `verdict`: "agree", "mismatch", or "not judged" with `why`.

    `surprise_z` is sum(-log p - H) / sqrt(sum Var(-log p)), 0 on average and 1 in spread for an honest engine; negative
    for draws that are colder than declared. `top_tokens` counts tokens that are the most likely ones, where
    `top_expected` were expected; `first_top` and `first_expected` do so for the first token of each completion.
    `copies` counts completions that repeat another one of the same prompt: they are left out of the rest.
    `no_ends`: ends of completions are missing. `blind` says what these tokens could not have shown. `where` names the
    part that is off if all together are not, `part_tokens` and `part_top_tokens` count its tokens and its most likely
    ones. `bet` says what else was likelier, if only that shows that something is off: "ids", "places" or "other".
    """

    verdict: str
    why: str
    tokens: int = 0
    surprise_z: float = math.nan
    top_tokens: int = 0
    top_expected: float = math.nan
    first_tokens: int = 0
    first_top: int = 0
    first_expected: float = math.nan
    copies: int = 0
    shared_seed: bool = False
    no_ends: bool = False
    blind: str = ""
    where: str = ""
    bet: str = ""
    part_tokens: int = 0
    part_top_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return asdict(self)


def not_judged(why: str) -> Draws:
    """Draws about which nothing is said."""
    return Draws(verdict="not judged", why=why)


def judge_draws(
    evidence: Evidence, model: EngineModel, limits: LimitsConfig, *, noise_rms: float, token_limit: float,
    whatever_length: bool = False,
) -> Draws:  # fmt: skip
    """Judge the evidence's tokens as draws from a model of the engine.

    `noise_rms` is the noise floor in nats: the engine draws from its own rounding of the distribution, which moves the
    expected surprise by half of its square. `token_limit` is how far rounding may move a logprob. `whatever_length`:
    the completions may have been selected by length (the first to finish, say). End tokens are then left out, and every
    other token is judged under the distribution without them.
    """
    tokens = evidence.tokens
    scores = evidence.spread(model.source, model.dist)  # first: others ask for less of the same
    fresh_T, copies, shared = independent(evidence, model, limits)
    alike_T = _alike(scores)
    top_T = is_top(scores) | alike_T
    if evidence.case.sampling.temperature == 0:
        near_T = is_top(scores, token_limit)[fresh_T]
        wrong = int((~near_T).sum())
        why = f"temperature 0 was declared, yet {wrong} of {len(near_T)} tokens are not the most likely one"
        return Draws(
            verdict="mismatch" if wrong else "agree", why=why if wrong else "the most likely token each time",
            tokens=len(near_T), top_tokens=int(near_T.sum()), top_expected=float(len(near_T)),
        )  # fmt: skip
    usable_T = fresh_T & torch.isfinite(scores.logprobs_T)
    removed = not whatever_length and _ends_removed(evidence, model, usable_T)
    if whatever_length or removed:
        scores, apart_T = _among_others(evidence, model, scores, likely=SURE_END if removed else None)
        usable_T &= apart_T
    count = int(usable_T.sum())
    if count < limits.min_tokens and not shared:
        return not_judged(f"{count} independent tokens are too few ({limits.min_tokens} needed)")
    rate = limits.false_alarm_rate / STATISTICS
    z = _surprise(scores, usable_T, slack=count * noise_rms**2)
    assert scores.varentropy_T is not None
    chance_T = scores.top_logprobs_T.double().exp().clamp(0, 1).masked_fill(alike_T, 1.0)
    drawn = Drawn(
        top_T=top_T[usable_T], chance_T=chance_T[usable_T],
        offset_T=(-scores.logprobs_T - scores.entropy_T).double()[usable_T],
        variance_T=scores.varentropy_T.double()[usable_T], context_T=contexts(tokens)[usable_T],
    )  # fmt: skip
    top_T, chance_T, first_T = drawn.top_T, drawn.chance_T, (tokens.position_T == 0)[usable_T]
    reasons = []
    if abs(z) > SKEW * normal_quantile(rate / 2):
        reasons.append(f"the tokens are {'less' if z < 0 else 'more'} surprising than their distribution (z {z:+.1f})")
    for name, of_T in (("", torch.ones_like(first_T)), ("first ", first_T)):
        seen, expected = int(top_T[of_T].sum()), float(chance_T[of_T].sum())
        if bool(of_T.any()) and top_count_chance(chance_T[of_T], drawn.at(of_T).counted(noise_rms)) < rate:
            reasons.append(
                f"{seen} of {int(of_T.sum())} {name}tokens are the most likely one, where {expected:.0f} were expected"
            )
    ends = ""
    if not (reasons or shared or whatever_length):
        ends = missing_ends(evidence, model, usable_T, rate=rate, noise_rms=noise_rms)
    odd: list[OddPart] = []
    if not (reasons or shared or ends):
        odd = odd_parts(drawn, tokens, usable_T, rate=rate, skew=SKEW, noise_rms=noise_rms, chance_of=top_count_chance)
        reasons += [part.words for part in odd]
    bet = None
    if not (reasons or shared or ends or whatever_length):
        bet = best_bet(evidence, model, usable_T, rate=rate, slack=count * noise_rms**2)
    reasons += [f"{bet.words} ({bet.nats:.0f} nats)"] if bet is not None else []
    reasons += [ends] if ends else []
    if shared:
        reasons.append(f"completions of one prompt begin alike, which chance rules out ({copies} are whole copies)")
    blind = _blind(scores, usable_T, rate)
    if not blind and top_count_chance(chance_T[first_T], int(first_T.sum())) >= rate:
        blind = TOO_FEW_FIRST
    return Draws(
        verdict="mismatch" if reasons else "agree", why="; ".join(reasons) or "as the distribution says",
        tokens=count, surprise_z=z, top_tokens=int(top_T.sum()), top_expected=float(chance_T.sum()),
        first_tokens=int(first_T.sum()), first_top=int(top_T[first_T].sum()),
        first_expected=float(chance_T[first_T].sum()), copies=copies, shared_seed=shared, no_ends=bool(ends),
        blind=blind, bet="" if bet is None else bet.kind or "other", where=odd[0].words if odd else "",
        part_tokens=odd[0].tokens if odd else 0, part_top_tokens=odd[0].top_tokens if odd else 0,
    )  # fmt: skip


def _ends_removed(evidence: Evidence, model: EngineModel, usable_T: Tensor) -> bool:
    """Whether completions ended and the log holds none of the end tokens that were expected: what is left was drawn
    from the other tokens."""
    ends, reasons = evidence.facts.eos_ids, evidence.tokens.finish_reasons
    if not ends or "stop" not in reasons or bool(torch.isin(evidence.tokens.targets_T, torch.tensor(ends)).any()):
        return False
    return float(evidence.mass(model.source, model.dist.temperature, ends)[usable_T].sum()) > EXPECTED_ENDS


def _among_others(
    evidence: Evidence, model: EngineModel, scores: TokenScores, *, likely: float | None = None
) -> tuple[TokenScores, Tensor]:
    """Scores under the distribution without end tokens, and a mask of the tokens for which they hold, [T].

    The mask leaves out end tokens, and positions where one was more probable than `likely` or the most likely token of
    all. With P the probability of an end, p becomes p / (1 - P) and H becomes (H + P log P) / (1 - P) + log(1 - P).
    """
    ends = evidence.facts.eos_ids
    if not ends:
        return scores, torch.ones_like(scores.logprobs_T, dtype=torch.bool)
    likely = likely or (LIKELY_END_OUTSIDE if model.dist.truncates else LIKELY_END)
    mass_T = evidence.mass(model.source, model.dist.temperature, ends).double()
    end_T = (mass_T / scores.log_kept_mass_T.double().exp()).clamp(1e-30, max(likely, LIKELY_END))
    unlikely_T = (end_T < likely) & (end_T < scores.top_logprobs_T.double().exp())
    apart_T = unlikely_T & ~torch.isin(evidence.tokens.targets_T, torch.tensor(ends))
    left_T = torch.log1p(-end_T)
    entropy_T = (scores.entropy_T.double() + end_T * end_T.log()) / (1 - end_T) + left_T
    return replace(
        scores, logprobs_T=scores.logprobs_T.double() - left_T, entropy_T=entropy_T,
        top_logprobs_T=scores.top_logprobs_T.double() - left_T,
    ), apart_T  # fmt: skip


def is_top(scores: TokenScores, within_nats: float = SAME_NATS) -> Tensor:
    """True where the chosen token is the most likely one, or as likely as that within so many nats, [T]."""
    return scores.logprobs_T >= scores.top_logprobs_T - within_nats


def _alike(scores: TokenScores) -> Tensor:
    """True where all tokens that are kept are about equally likely: which of them is drawn says nothing, [T]."""
    above_T = scores.entropy_T.double() + scores.top_logprobs_T.double()
    return (above_T < ALIKE_NATS) & (scores.top_logprobs_T < math.log(0.51))


def _blind(scores: TokenScores, usable_T: Tensor, rate: float) -> str:
    """Say how cold draws must be to show in 19 of 20 checks; "" if COLDER times the declared temperature would do.

    At T' the surprise changes by Var(-log p) (1 - 1/T') to first order, which is sqrt(sum Var) (1 - 1/T') standard
    deviations.
    """
    assert scores.varentropy_T is not None
    spread = math.sqrt(float(scores.varentropy_T.double()[usable_T].sum()))
    needed = (SKEW * normal_quantile(rate / 2) + normal_quantile(0.05)) / max(spread, 1e-12)
    if needed <= 1 / COLDER - 1:
        return ""
    return f"in so few tokens draws show only from {1 / (1 + needed):.2g} times the declared temperature down"


def _surprise(scores: TokenScores, usable_T: Tensor, *, slack: float) -> float:
    """The surprise of the usable tokens in standard deviations; `slack` nats of it are not counted."""
    assert scores.varentropy_T is not None
    offset = float((-scores.logprobs_T - scores.entropy_T).double()[usable_T].sum())
    spread = math.sqrt(float(scores.varentropy_T.double()[usable_T].sum()))
    return math.copysign(max(0.0, abs(offset) - slack), offset) / spread if spread > 0 else 0.0


def top_count_chance(chance_T: Tensor, seen: int) -> float:
    """Probability of as many most likely tokens as were seen, or of any number that is farther out on that side.

    The number of successes in independent trials with probabilities `chance_T` is Poisson binomial; its distribution is
    built up trial by trial. For many trials it is taken as normal.
    """
    chance_T = chance_T.clamp(0, 1)
    if len(chance_T) > EXACT_COUNT:
        spread = math.sqrt(float((chance_T * (1 - chance_T)).sum()))
        z = (abs(seen - float(chance_T.sum())) - 0.5) / max(spread, 1e-12)
        return math.erfc(z / math.sqrt(2)) / 2 if z > 0 else 0.5
    mass = torch.zeros(len(chance_T) + 1, dtype=torch.float64)
    mass[0] = 1.0
    for chance in chance_T.tolist():
        mass[1:] = mass[1:] * (1 - chance) + mass[:-1] * chance
        mass[0] *= 1 - chance
    return min(float(mass[seen:].sum()), float(mass[: seen + 1].sum()))


def independent(evidence: Evidence, model: EngineModel, limits: LimitsConfig) -> tuple[Tensor, int, bool]:
    """(tokens that count as draws [T], copies, whether chance rules shared beginnings out).

    Tokens that the model says nothing about were appended, or made by other weights, and do not count. Copies do not
    count if chance rules them out, or at temperature 0. Otherwise a completion that repeats another one is a draw like
    any other; without it, the remaining ones would be too surprising. Two completions of a prompt share a given
    beginning with its own probability, so that the chance of any shared beginning as unlikely as p, among n pairs, is
    at most n p.
    """
    tokens = evidence.tokens
    counts = torch.bincount(tokens.row_T, minlength=len(tokens.prompts)).tolist()
    logprobs_T = evidence.scores(model.source, model.dist).logprobs_T.double()
    seen: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    fresh: list[bool] = []
    copies, pairs, least_likely = 0, 0, 0.0
    parts = zip(tokens.prompts, tokens.targets_T.split(counts), logprobs_T.split(counts), strict=True)
    for prompt, targets, logprobs in parts:
        ids = tuple(targets.tolist())
        others = seen.setdefault(tuple(prompt.tolist()), [])
        fresh += [ids not in others] * len(ids)
        copies += ids in others
        for other in others[:MAX_COMPARED]:
            pairs += 1
            shared = logprobs[: shared_beginning(ids, other)]
            least_likely = min(least_likely, float(shared[torch.isfinite(shared)].sum()))
        others.append(ids)
    rate = limits.false_alarm_rate / STATISTICS
    ruled_out = pairs > 0 and least_likely < math.log(rate / pairs) and evidence.case.sampling.temperature > 0
    counts_all = not ruled_out and evidence.case.sampling.temperature > 0
    fresh_T = torch.tensor(fresh) | counts_all
    if model.skip is not None:
        fresh_T &= ~skipped(tokens, model.skip)
    return fresh_T, copies, ruled_out


def shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two completions share from the start."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
