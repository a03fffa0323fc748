"""Single tokens that are far off: at the edge of a kept set, or filled in where a number was missing.

Both are told from what stands at the token alone, before any cause is searched for: rounding at an edge is not a fault,
and a filler says what it is at its first occurrence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trueup.parity.compare import Residual
from trueup.parity.evidence import TRAINER, Evidence, skipped
from trueup.parity.floor import FLOAT32_NATS
from trueup.parity.hypotheses.alignment import END_IDS
from trueup.parity.report import Cause
from trueup.policy.processing import Distribution
from trueup.trace import TraceRow
from trueup.types import LOGPROB_SLACK

SENTINEL = -900.0
"""Nothing that a language model samples has a logprob below this: -999 and -9999 are fill values."""
FILLED_NATS = 1.0
"""A number is taken for a filler only if it is off by this much, because numbers on a coarse grid repeat as well."""
MOST_VALUES = 3
"""More different fillers than this are something else: a number for each completion, or a coarse grid."""
ZERO_NATS = 0.1
"""The same for 0.0, which no grid but the coarsest gives to a token that is not certain."""
EDGE_FLOORS = 6.0
"""A token may lie so many floors below the cut, in 16 bits: rounding moves it and the least likely kept one apart."""
COARSE_EDGE, FINE_EDGE = 0.5, 1e-3
"""By which share of itself (of the mass it leaves out, for top-p) a cut may move, in 16 bits and in float32."""
SHOWN = 3


def neighbours(dist: Distribution, noise_rms: float) -> list[Distribution]:
    """Kept sets that rounding may turn this one into: a little wider or narrower in each of its cuts.

    In 16 bits two tokens next to the cut change places, and the mass of one of them goes in or out; in float32 they do
    not, and only the comparison with the cut itself may turn out otherwise.
    """
    coarse = noise_rms > FLOAT32_NATS
    share = COARSE_EDGE if coarse else FINE_EDGE
    found = []
    if dist.top_p < 1:
        moved = share * min(dist.top_p, 1 - dist.top_p)
        found += [replace(dist, top_p=min(1.0, dist.top_p + sign * moved)) for sign in (-1, 1)]
    if dist.top_k:
        count = max(1, dist.top_k // 4) if coarse else 1
        found += [replace(dist, top_k=k) for k in (dist.top_k - count, dist.top_k + count) if k > 0]
    if dist.min_p:
        found += [replace(dist, min_p=min(1.0, dist.min_p * (1 + sign * share))) for sign in (-1, 1)]
    return found


def tied_nats(evidence: Evidence, dist: Distribution) -> Tensor:
    """By how much a logprob may be off because tokens tie at the cut of top-k, [T] nats; -inf where none do.

    The trainer keeps all of them, an engine as many as top-k says.
    """
    kept_T = evidence.scores(TRAINER, dist).kept_T.double()
    limit = dist.top_k or math.inf
    return torch.where(kept_T > limit, (kept_T / limit).log(), -math.inf)


def at_edge(evidence: Evidence, now: Residual, *, noise_rms: float, token_limit: float) -> Tensor:
    """True for tokens that rounding at the edge of the kept set explains, [T].

    Of those far off: that a neighbouring kept set leaves within `token_limit` nats (in 16 bits within EDGE_FLOORS noise
    floors, because a kept set of one token has no noise and its neighbour has), or that lie in a kept set which ties
    make larger than top-k. Of those outside the kept set: that a neighbouring one holds them, or that they lie within
    EDGE_FLOORS noise floors below the cut.
    """
    dist = evidence.case.trainer_distribution
    far_T = now.edge_T | (now.usable_T & (now.residual_T.abs() > token_limit))
    excused_T = torch.zeros_like(far_T)
    if not dist.truncates or not bool(far_T.any()):
        return excused_T
    below_T = evidence.scores(TRAINER, dist).below_cut_T
    if noise_rms > FLOAT32_NATS and below_T is not None:
        excused_T |= now.edge_T & (below_T <= EDGE_FLOORS * noise_rms)
    excused_T |= far_T & now.usable_T & (now.residual_T.abs() <= tied_nats(evidence, dist) + token_limit)
    near = max(token_limit, EDGE_FLOORS * noise_rms) if noise_rms > FLOAT32_NATS else token_limit
    around = neighbours(dist, noise_rms)
    evidence.prefetch(TRAINER, around)
    for other in around:
        logprobs_T = evidence.scores(TRAINER, other).logprobs_T.double()
        near_T = (logprobs_T - evidence.tokens.engine_T).abs() <= near
        excused_T |= far_T & torch.where(now.edge_T, torch.isfinite(logprobs_T), near_T)
    return excused_T


@dataclass(frozen=True, kw_only=True)
class Fillers:
    """Values that stand where numbers were missing, how often each occurs, and the tokens that carry them [T]."""

    counts: dict[float, int]
    at_T: Tensor
    others: bool = False
    """Whether other numbers are impossible, too: then the column as a whole holds no logprobs."""

    @property
    def certain(self) -> bool:
        """Whether every value is none that any distribution gives: far below all logprobs, or above 0."""
        return not self.others and all(value < SENTINEL or value > 0 for value in self.counts)

    def _clamp(self, evidence: Evidence, now: Residual) -> bool:
        """Whether the value is a lower limit: the lowest number of all, at tokens that are less likely than it says."""
        engine_T = evidence.tokens.engine_T[now.usable_T]
        above_T = now.residual_T[self.at_T] < 0
        lowest = min(self.counts)
        return len(self.counts) == 1 and lowest < 0 and lowest == float(engine_T.min()) and bool(above_T.all())

    def cause(self, evidence: Evidence, now: Residual) -> Cause:
        """S9, with the first places; S14 for a lower limit."""
        tokens = evidence.tokens
        first = [
            f"line {tokens.lines[int(tokens.row_T[t])]} token {int(tokens.position_T[t])}"
            for t in self.at_T.nonzero()[:SHOWN, 0].tolist()
        ]
        if self._clamp(evidence, now):
            value = next(iter(self.counts))
            return Cause(
                id="S14", layer="semantic", title=f"logprobs are clamped at {value:g}", confidence="high", side="log",
                explained=1.0, fix="report each token's logprob as it is, without a lower limit",
                evidence=f"{self.counts[value]} of {len(tokens)} tokens carry exactly {value:g}, the lowest number "
                f"here, and each of them is less likely than that (first {', '.join(first)})",
            )  # fmt: skip
        values = ", ".join(f"{count} carry exactly {value:g}" for value, count in self.counts.items())
        off_T = now.residual_T.abs().masked_fill(~now.usable_T, 0.0)
        own = evidence.case.side == "trainer"
        return Cause(
            id="S9", layer="semantic", side="trainer" if own else "log", confidence="high",
            title=("the trainer's" if own else "missing") + " logprobs are filled with a constant",
            explained=float(off_T[self.at_T].sum() / off_T.sum().clamp_min(1e-300)),
            fix="log what the trainer computes for each token (trainer_logprobs), or leave the column out"
            if own
            else "fail or mask tokens without a logprob; never fill them in",
            evidence=f"of {len(tokens)} tokens {values}, which their probability rules out (first {', '.join(first)})",
        )  # fmt: skip


def fillers(evidence: Evidence, now: Residual, suspects_T: Tensor) -> Fillers | None:
    """Find fillers among the tokens that are off by more than rounding; None if there are none.

    A filler is a whole number, or one that occurs more than once. Where only last tokens carry it the token itself was
    put there (T7), and where only end tokens do, a trainer took them for padding (T8): those are left to the search.
    """
    tokens = evidence.tokens
    counts = Counter(tokens.engine_T[suspects_T].tolist())
    values = {
        value: count
        for value, count in counts.items()
        if (count > 1 or value == round(value))
        and float(now.residual_T[suspects_T & (tokens.engine_T == value)].abs().max())
        > (ZERO_NATS if value == 0 else FILLED_NATS)
    }
    if not values or len(values) > MOST_VALUES:  # logits in 16 bits, say, repeat by themselves
        return None
    at_T = suspects_T & torch.isin(tokens.engine_T, torch.tensor(list(values), dtype=torch.float64))
    only_last = bool((~at_T | skipped(tokens, "last")).all()) and len(torch.unique(tokens.targets_T[at_T])) <= END_IDS
    ends = torch.isin(tokens.targets_T, torch.tensor(evidence.facts.eos_ids or (-1,)))
    if (only_last and int(at_T.sum()) > 1) or (evidence.facts.batch_rows and bool((~at_T | ends).all())):
        return None
    beside_T = tokens.engine_T[suspects_T & ~at_T]
    others = bool(((beside_T < SENTINEL) | (beside_T > LOGPROB_SLACK)).any())
    return Fillers(counts=values, at_T=at_T, others=others)


def without(rows: Sequence[TraceRow], evidence: Evidence, at_T: Tensor) -> list[TraceRow]:
    """The rows with NaN in place of the logprobs that are marked."""
    counts = [len(r.completion_token_ids) for r in rows]
    marked = zip(rows, at_T.split(counts), strict=True)
    return [
        replace(
            row,
            completion_logprobs=tuple(
                float("nan") if at else value for at, value in zip(at_R.tolist(), row.completion_logprobs, strict=True)
            ),
        )
        if bool(at_R.any())
        else row
        for row, at_R in marked
    ]
