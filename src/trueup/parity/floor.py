"""The noise floor, predicted from the arithmetic on both sides, and the judgement of a gap against it.

For an engine of precision p the floor is not what the trainer does against itself (batch shape alone moves a bf16
forward ten times less than a second implementation does) but how far p is from exact: the trainer's rounding error
against the next higher precision and the engine's, taken as independent, add in squares. With equal precision on both
sides that is sqrt(2) times the trainer's own error.

Shapes: T tokens. r = trainer - engine in nats.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from trueup.knobs import LimitsConfig

BOOTSTRAPS = 400
FEW_SEQUENCES = 6
BLOCK_TOKENS = 8
FLOAT32_NATS = 1e-3
"""Rms below which a gap or a floor is one of float32 (below 1e-4) and cannot be one of 16 bits (0.03 and more)."""


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A predicted floor in nats: rms of r from rounding on both sides, the shares of each, and the |r| quantile.

    `q99_abs` comes from the same tokens with the engine's error given a random sign. `basis` says how it was made.
    """

    rms: float
    trainer_rms: float
    engine_rms: float
    q99_abs: float
    basis: str

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers for JSON."""
        return asdict(self)


def predict(
    trainer_T: Tensor, engine_T: Tensor, reference_T: Tensor, *, basis: str, min_floor: float, seed: int = 0
) -> Floor:
    """Predict the floor from logprobs of the same tokens in trainer, engine and reference precision, [T] each.

    Tokens that are not finite in all three (outside a kept set) are left out. Errors on the two sides are taken as
    independent: rms = sqrt(rms(trainer - reference)^2 + rms(engine - reference)^2).
    """
    trainer, engine, reference = trainer_T.double(), engine_T.double(), reference_T.double()
    usable = torch.isfinite(trainer) & torch.isfinite(engine) & torch.isfinite(reference)
    if not bool(usable.any()):
        return Floor(rms=math.nan, trainer_rms=math.nan, engine_rms=math.nan, q99_abs=math.nan, basis=basis)
    trainer_error, engine_error = (x[usable] - reference[usable] for x in (trainer, engine))
    sides = [float(e.square().mean().sqrt()) for e in (trainer_error, engine_error)]
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(0, 2, engine_error.shape, generator=generator).double() * 2 - 1
    typical = (trainer_error + sign * engine_error).abs()
    rms = max(min_floor, math.hypot(*sides))
    return Floor(
        rms=rms,
        trainer_rms=sides[0],
        engine_rms=sides[1],
        q99_abs=max(float(torch.quantile(typical, 0.99)), 2.0 * rms),
        basis=basis,
    )


def cluster_bootstrap(statistic_S2: Tensor, *, seed: int = 0) -> Tensor:
    """Resample sequences; `statistic_S2` holds (sum, count) per sequence. Returns the resampled means, sorted."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(statistic_S2), (BOOTSTRAPS, len(statistic_S2)), generator=generator)
    totals = statistic_S2[picks].sum(1)
    return (totals[:, 0] / totals[:, 1]).sort().values


def sum_per_row(values: Tensor, row: Tensor) -> Tensor:
    """Return (sum, count) of the values of each sequence, [S, 2] float64: what `cluster_bootstrap` resamples.

    With fewer than FEW_SEQUENCES sequences, blocks of BLOCK_TOKENS neighbouring tokens take their place: one or two
    sequences alone have no spread.
    """
    if len(torch.unique(row)) < FEW_SEQUENCES:
        row = row * len(row) + torch.arange(len(row)) // BLOCK_TOKENS
    _, inverse = torch.unique(row, return_inverse=True)
    rows = int(inverse.max()) + 1
    sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, inverse, values)
    counts = torch.zeros(rows, dtype=torch.float64).index_add_(0, inverse, torch.ones_like(values))
    return torch.stack([sums, counts], dim=1)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Rms, bias and tail of a gap, each against its own limit; `reasons` holds those that failed.

    `rms_low` is the lower end of a 98 % bootstrap interval over sequences. `bias` is mean(r) + mean(r^2)/2, zero for
    pure noise, since noise alone makes mean(r) = -KL = -mean(r^2)/2 to second order; `bias_se` its standard error.
    """

    tokens: int
    rms: float
    rms_low: float
    bias: float
    bias_se: float
    tail_tokens: int
    reasons: tuple[str, ...]
    enough: bool

    @property
    def within(self) -> bool:
        """Whether the gap is what rounding alone predicts."""
        return self.enough and not self.reasons


def judge(r_T: Tensor, row_T: Tensor, floor: Floor, limits: LimitsConfig) -> Judgement:
    """Judge the finite entries of r against a floor."""
    usable = torch.isfinite(r_T)
    r, row = r_T[usable].double(), row_T[usable]
    tokens = len(r)
    if not tokens:
        return Judgement(
            tokens=0, rms=math.nan, rms_low=math.nan, bias=math.nan, bias_se=math.nan, tail_tokens=0,
            reasons=(), enough=False,
        )  # fmt: skip
    rms = float(r.square().mean().sqrt())
    squares = cluster_bootstrap(sum_per_row(r.square(), row))
    rms_low = float(squares[int(0.01 * BOOTSTRAPS)].sqrt())
    centred = r + r.square() / 2
    bias = float(centred.mean())
    bias_se = max(
        float(cluster_bootstrap(sum_per_row(centred, row), seed=1).std()),
        float(centred.std(unbiased=False)) / math.sqrt(tokens),
    )
    tail_limit = limits.tail_factor * floor.q99_abs
    tail_tokens = int((r.abs() > tail_limit).sum())
    reasons = []
    if rms_low > limits.rms_factor * floor.rms:
        reasons.append(f"rms {rms:.3g} nats is {rms / floor.rms:.1f} times the predicted floor {floor.rms:.3g}")
    if abs(bias) > max(limits.min_bias, limits.bias_factor * floor.rms, limits.bias_sigmas * bias_se):
        reasons.append(f"bias {bias:+.3g} nats, {abs(bias) / max(bias_se, 1e-300):.0f} standard errors from zero")
    if tail_tokens >= 3 and tail_tokens > limits.tail_share * tokens:
        reasons.append(f"{tail_tokens} of {tokens} tokens beyond {tail_limit:.3g} nats")
    return Judgement(
        tokens=tokens, rms=rms, rms_low=rms_low, bias=bias, bias_se=bias_se, tail_tokens=tail_tokens,
        reasons=tuple(reasons), enough=tokens >= limits.min_tokens,
    )  # fmt: skip
