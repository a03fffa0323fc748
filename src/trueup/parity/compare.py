"""Comparing a prediction with what the engine reported, and two predictions with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.knobs import LimitsConfig
from trueup.parity.evidence import TRAINER, EngineModel, Evidence, render
from trueup.parity.floor import BOOTSTRAPS, Floor, cluster_bootstrap, judge, normal_quantile, sum_per_row
from trueup.policy.processing import Distribution

INFEASIBLE_NATS = 3.0
"""Charged for a token that a prediction rules out, beyond the share that edges of the kept set account for."""
TRACKING_CORRELATION = 0.95
"""Correlation of predicted and reported logprobs below which an incomplete explanation explains nothing."""
DRIFT, DRIFT_TOKENS = 2.0, 16
"""An incomplete cause is not named if its remainder is so many times as large in one third of the completions as in
another; for an error of the model the share that this is of the gap must be, too, in one of CHANCE cases by chance."""
CHANCE = 1000


@dataclass(frozen=True, kw_only=True)
class Residual:
    """What a prediction leaves: residual_T = prediction - engine in nats over all tokens of the evidence.

    `usable_T` marks tokens where both are finite. `edge_T` marks tokens outside the prediction's kept set.
    """

    residual_T: Tensor
    usable_T: Tensor
    edge_T: Tensor
    row_T: Tensor

    @property
    def edge_share(self) -> float:
        """Share of tokens the prediction rules out."""
        judged = int(self.usable_T.sum()) + int(self.edge_T.sum())
        return int(self.edge_T.sum()) / judged if judged else 1.0

    def charged_T(self, edge_allowance: float) -> Tensor:
        """|residual| with the charge for ruled-out tokens, on tokens that are usable or ruled out (others NaN)."""
        values = self.residual_T.abs()
        charge = 0.0 if self.edge_share <= edge_allowance else INFEASIBLE_NATS
        values = torch.where(self.edge_T, charge, values)
        return values.masked_fill(~(self.usable_T | self.edge_T), torch.nan)


def residual(evidence: Evidence, model: EngineModel) -> Residual:
    """Render a model and subtract what the engine reported."""
    predicted_T, engine_T = render(evidence, model), evidence.tokens.engine_T
    finite_T = torch.isfinite(engine_T)
    return Residual(
        residual_T=predicted_T - engine_T,
        usable_T=finite_T & torch.isfinite(predicted_T),
        edge_T=finite_T & torch.isneginf(predicted_T),
        row_T=evidence.tokens.row_T,
    )


def loss(res: Residual, edge_allowance: float) -> float:
    """Mean charged |residual| in nats; infinite when nothing could be compared."""
    values = res.charged_T(edge_allowance)
    values = values[~torch.isnan(values)]
    return float(values.mean()) if len(values) else float("inf")


def clearly_better(better: Residual, worse: Residual, edge_allowance: float) -> bool:
    """Whether `better` has the smaller mean |residual| in 99 % of paired bootstraps over sequences."""
    low, high = better.charged_T(edge_allowance), worse.charged_T(edge_allowance)
    both = ~(torch.isnan(low) | torch.isnan(high))
    if not bool(both.any()):
        return False
    means = cluster_bootstrap(sum_per_row(high[both] - low[both], better.row_T[both]))
    return float(means[int(0.01 * BOOTSTRAPS)]) > 0


def would_show(
    evidence: Evidence, base: EngineModel, models: Sequence[EngineModel], floor: Floor, limits: LimitsConfig
) -> bool:
    """Whether each of some models would be beyond a limit by its difference from `base` alone, in an engine that adds
    no rounding of its own."""
    tokens, before = evidence.tokens, residual(evidence, base)

    def shows(model: EngineModel) -> bool:
        after = residual(evidence, model)
        usable_T = before.usable_T & after.usable_T
        shift_T = (before.residual_T - after.residual_T).masked_fill(~usable_T, torch.nan)
        return bool(judge(shift_T, tokens.row_T, floor, limits, lines=tokens.lines).reasons)

    return all(shows(model) for model in models)


def separation(first: Residual, second: Residual) -> float:
    """Rms difference between two predictions in nats, over tokens both can compare; 0 if none."""
    both = first.usable_T & second.usable_T
    if not bool(both.any()):
        return 0.0
    return float((first.residual_T[both] - second.residual_T[both]).square().mean().sqrt())


def log_likelihood(evidence: Evidence, dist: Distribution) -> float:
    """Log-likelihood in nats of the evidence's tokens under the trainer's `dist`; NaN if it rules one of them out."""
    logprobs_T = evidence.scores(TRAINER, dist).logprobs_T.double()
    return float(logprobs_T.sum()) if bool(torch.isfinite(logprobs_T).all()) else float("nan")


def tracks(evidence: Evidence, left: Residual) -> bool:
    """Whether a prediction follows the engine token by token.

    Flattening a wrong model's prediction also shrinks |r|; it does not correlate with what the engine reported.
    """
    engine_T = evidence.tokens.engine_T[left.usable_T]
    pair = torch.stack([engine_T, engine_T + left.residual_T[left.usable_T]])
    return pair.shape[1] > 2 and float(torch.corrcoef(pair)[0, 1]) > TRACKING_CORRELATION


def drifts(evidence: Evidence, before: Residual, left: Residual, *, grows: bool) -> bool:
    """Whether what a prediction leaves depends on the position in the completion.

    A distribution, or a fitted number, holds for every token alike: a remainder that does not is an average of
    something else. An error of the model `grows` as it goes and leaves a share of itself everywhere, and few tokens
    with a heavy tail differ by their largest one alone (Kruskal and Wallis, 1952, compare ranks).
    """
    position_T = evidence.tokens.position_T.double()
    cuts = position_T.quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    part_T = torch.bucketize(position_T, cuts)
    both_T = before.usable_T & left.usable_T
    parts = [both_T & (part_T == part) for part in range(3)]
    if min(int(part.sum()) for part in parts) < DRIFT_TOKENS:
        return False

    def uneven(sizes: Sequence[float]) -> bool:
        return max(sizes) > DRIFT**2 * max(min(sizes), 1e-300)

    gap, rest = ([float(r.residual_T[part].square().mean()) for part in parts] for r in (before, left))
    if not (grows and uneven(rest)):
        return uneven(rest)
    shares = [r / max(g, 1e-300) for r, g in zip(rest, gap, strict=True)]
    return uneven(shares) and _chance_of_ranks([left.residual_T[part].abs() for part in parts]) < 1 / CHANCE


def number_moves(evidence: Evidence, below: Residual, above: Residual) -> bool:
    """Whether a fitted number is too small at one end of the completions and too large at the other.

    `below` and `above` are what a smaller and a larger number leave. Which of the two fits better must go with the
    position (Spearman's rank correlation, one of CHANCE cases), and the other one must at the other end.
    """
    usable_T = below.usable_T & above.usable_T
    position_T = evidence.tokens.position_T[usable_T].double()
    worse_T = below.residual_T[usable_T].abs() - above.residual_T[usable_T].abs()
    if len(worse_T) < 3 * DRIFT_TOKENS:
        return False
    order_T = position_T.argsort()
    ends = worse_T[order_T[: len(order_T) // 3]].mean(), worse_T[order_T[-(len(order_T) // 3) :]].mean()
    ranks = torch.stack([worse_T.argsort().argsort().double(), position_T])
    trend = abs(float(torch.corrcoef(ranks)[0, 1])) * math.sqrt(len(worse_T) - 1)
    return float(ends[0] * ends[1]) < 0 and trend > normal_quantile(1 / CHANCE)


def _chance_of_ranks(parts: Sequence[Tensor]) -> float:
    """How often three samples of one distribution have ranks as uneven as these (chi squared of two degrees)."""
    sizes = [len(part) for part in parts]
    tokens = sum(sizes)
    rank_T = torch.cat(list(parts)).argsort().argsort().double() + 1
    squares = sum(float(own.sum()) ** 2 / len(own) for own in rank_T.split(sizes))
    return math.exp(-(12 / (tokens * (tokens + 1)) * squares - 3 * (tokens + 1)) / 2)
