"""Diagnostics of a log ratio, all in float64 and on raw values: nothing is clipped, truncated or filled in first.

Shapes: T tokens (packed), S sequences. r = trainer - behaviour in nats, w = exp(r). A mask arrives as a selection: pass
only the tokens that count.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.ratios import geometric_log_ratio, sequence_log_ratio

QUANTILES = (0.5, 0.9, 0.99, 0.999)


def select(log_ratio_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return the selected entries; NumericsError for an empty mask or a non-finite selected value."""
    chosen = log_ratio_T[mask_T.bool()].double()
    if not len(chosen):
        raise NumericsError("the mask selects no tokens")
    bad = int((~torch.isfinite(chosen)).sum())
    if bad:
        raise NumericsError(f"{bad} of {len(chosen)} selected log ratios are not finite; count and drop them first")
    return chosen


def ess(log_weight: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), the effective share of samples in (0, 1] (PipelineRL, arXiv 2509.19128, section 4).

    Takes log weights [n] of any level, so that long sequences cannot overflow.
    """
    x = log_weight.double()
    return math.exp(min(0.0, float(2 * x.logsumexp(0) - (2 * x).logsumexp(0)) - math.log(len(x))))


def kl_k1(log_ratio_T: Tensor) -> float:
    """Mean of -r: unbiased, high-variance estimate of KL(behaviour || trainer) (Schulman 2020)."""
    return float(-log_ratio_T.double().mean())


def kl_k2(log_ratio_T: Tensor) -> float:
    """Mean of r^2 / 2 (Schulman 2020)."""
    return float((log_ratio_T.double() ** 2).mean() / 2)


def kl_k3(log_ratio_T: Tensor) -> float:
    """Mean of e^r - 1 - r, never negative (Schulman 2020)."""
    r = log_ratio_T.double()
    return float((r.expm1() - r).mean())


def chi2(log_weight: Tensor) -> float:
    """Mean of w^2 - 1 at the level of the weights given; infinite when a sequence weight overflows."""
    return float((2 * log_weight.double()).exp().mean() - 1)


def ppl_ratio(log_ratio_T: Tensor, row_T: Tensor) -> float:
    """Mean over sequences of trainer perplexity / behaviour perplexity = exp(-mean r) (verl, rollout correction)."""
    return float((-geometric_log_ratio(log_ratio_T, row_T)).exp().mean())


def probability_pearson(trainer_logprobs_T: Tensor, behaviour_logprobs_T: Tensor) -> float:
    """Correlation of probabilities (MiniMax-M1, arXiv 2506.13585, figure 3); NaN when either side is constant.

    Dominated by likely tokens: nearly blind to errors on rare ones.
    """
    p, q = trainer_logprobs_T.double().exp(), behaviour_logprobs_T.double().exp()
    p, q = p - p.mean(), q - q.mean()
    scale = float((p.square().sum() * q.square().sum()).sqrt())
    return float((p * q).sum()) / scale if scale > 0 else math.nan


def clip_fraction(log_weight: Tensor, *, low: float, high: float) -> float:
    """Share of weights outside [1 - low, 1 + high] (PPO, arXiv 1707.06347, equation 7)."""
    w = log_weight.double().exp()
    return float(((w < 1 - low) | (w > 1 + high)).double().mean())


def gspo_clip_fraction(log_ratio_T: Tensor, row_T: Tensor, *, low: float = 3e-4, high: float = 4e-4) -> float:
    """Share of sequences whose geometric ratio leaves [1 - low, 1 + high] (GSPO, arXiv 2507.18071, section 5.1)."""
    return clip_fraction(geometric_log_ratio(log_ratio_T, row_T), low=low, high=high)


def gspo_clip_fraction_expected(log_ratio_T: Tensor, row_T: Tensor, *, low: float = 3e-4, high: float = 4e-4) -> float:
    """What `gspo_clip_fraction` would be if r were independent zero-mean noise of the same rms.

    The mean of n tokens then has standard deviation rms / sqrt(n). A measured fraction well above this one means that
    errors inside a sequence share a sign.
    """
    rms = float(log_ratio_T.double().square().mean().sqrt())
    if rms == 0:
        return 0.0
    counts = torch.unique(row_T, return_counts=True)[1].double()
    scale = counts.sqrt() / (rms * math.sqrt(2))
    below = torch.special.erfc(-math.log1p(-low) * scale) / 2
    above = torch.special.erfc(math.log1p(high) * scale) / 2
    return float((below + above).mean())


def advantage_skew(log_ratio_T: Tensor, advantage_T: Tensor) -> tuple[float, float]:
    """Mean of -(w - 1) A over tokens with A > 0 and over those with A < 0 (VeXact, arXiv 2605.14220).

    What the mismatch adds to the surrogate loss, split by sign: it drifts where K3 stays flat. NaN where no token has
    that sign.
    """
    contribution = -log_ratio_T.double().expm1() * advantage_T.double()
    sides = [contribution[side] for side in (advantage_T > 0, advantage_T < 0)]
    positive, negative = (float(side.mean()) if len(side) else math.nan for side in sides)
    return positive, negative


def lag_histogram(version_T: Tensor, current_version: int) -> dict[int, int]:
    """Tokens by lag (current version - stamped version), in versions; a negative lag is a labelling error, kept."""
    return dict(sorted(Counter((current_version - version_T).tolist()).items()))


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The numbers of one comparison. Nats unless the name says otherwise; all on raw values."""

    tokens: int
    sequences: int
    mean_abs: float
    max_abs: float
    rms: float
    mean: float
    abs_quantiles: dict[str, float]
    mean_w: float
    k1: float
    k2: float
    k3: float
    chi2_token: float
    chi2_sequence: float
    ppl_ratio: float
    ess_token: float
    ess_sequence: float
    ess_geometric: float
    probability_pearson: float
    gspo_clip_fraction: float
    gspo_clip_fraction_expected: float

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers for JSON."""
        return asdict(self)


def diagnose(trainer_logprobs_T: Tensor, behaviour_logprobs_T: Tensor, row_T: Tensor) -> Diagnostics:
    """Compute every diagnostic of r = trainer - behaviour over finite, already selected tokens [T].

    `row_T` numbers the sequence of each token. Raises NumericsError when empty or non-finite.
    """
    r = trainer_logprobs_T.double() - behaviour_logprobs_T.double()
    r = select(r, torch.ones_like(r, dtype=torch.bool))
    magnitude = r.abs()
    quantiles = torch.quantile(magnitude, torch.tensor(QUANTILES, dtype=torch.float64))
    sequence, geometric = sequence_log_ratio(r, row_T), geometric_log_ratio(r, row_T)
    return Diagnostics(
        tokens=len(r),
        sequences=len(sequence),
        mean_abs=float(magnitude.mean()),
        max_abs=float(magnitude.max()),
        rms=float(r.square().mean().sqrt()),
        mean=float(r.mean()),
        abs_quantiles={f"q{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        mean_w=float(r.exp().mean()),
        k1=kl_k1(r),
        k2=kl_k2(r),
        k3=kl_k3(r),
        chi2_token=chi2(r),
        chi2_sequence=chi2(sequence),
        ppl_ratio=ppl_ratio(r, row_T),
        ess_token=ess(r),
        ess_sequence=ess(sequence),
        ess_geometric=ess(geometric),
        probability_pearson=probability_pearson(trainer_logprobs_T, behaviour_logprobs_T),
        gspo_clip_fraction=gspo_clip_fraction(r, row_T),
        gspo_clip_fraction_expected=gspo_clip_fraction_expected(r, row_T),
    )
