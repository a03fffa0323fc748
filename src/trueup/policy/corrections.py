"""Corrections of the gap between trainer and engine: weights a token, made from pi_train / pi_rollout.

Shapes: T completion tokens (packed), S sequences; `row_T` (long, ascending) numbers the sequence of each token. Every
function takes r = log pi_train - log pi_rollout in nats, where pi_train is the trainer *before* the step (pi_prox): it
acts on the backend and staleness shares of pi/mu and never on the policy's own change, which the objective bounds.
Bounds are on the ratio pi_train / pi_rollout, never on its inverse. Results are float64, without gradient.

A correction belongs on top of a backend that was verified: on a broken one it hides the fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trueup.errors import NumericsError
from trueup.policy.diagnostics import ess
from trueup.policy.proximal import CORRECTED, Component
from trueup.policy.ratios import geometric_log_ratio, sequence_log_ratio


@dataclass(frozen=True, kw_only=True)
class Correction:
    """`weight_T` multiplies the loss of a token, 0 where `kept_T` is False; `acts_on` names the shares it sees.

    `truncated_T` marks kept tokens whose weight a bound has changed.
    """

    weight_T: Tensor
    kept_T: Tensor
    truncated_T: Tensor
    acts_on: tuple[Component, ...] = CORRECTED

    def of(self, token_T: Tensor) -> Correction:
        """The same for some tokens (positions)."""
        return Correction(
            weight_T=self.weight_T[token_T], kept_T=self.kept_T[token_T], truncated_T=self.truncated_T[token_T]
        )

    def spread(self, token_T: Tensor, size: int) -> Correction:
        """The same as part of `size` tokens, at the positions given; the others are dropped."""
        values = (self.weight_T, self.kept_T, self.truncated_T)
        weight_T, kept_T, truncated_T = (v.new_zeros(size).index_copy(0, token_T, v) for v in values)
        return Correction(weight_T=weight_T, kept_T=kept_T, truncated_T=truncated_T)

    def then(self, other: Correction) -> Correction:
        """Both: weights multiply, what either drops is dropped."""
        return Correction(
            weight_T=self.weight_T * other.weight_T,
            kept_T=self.kept_T & other.kept_T,
            truncated_T=self.truncated_T | other.truncated_T,
        )

    def normalised(self, row_T: Tensor | None = None) -> Correction:
        """Weights divided by their mean over the batch (verl, rollout_is_batch_normalize); needs the whole batch.

        Token weights average over tokens. Sequence weights average over sequences, each counted once however long it
        is: pass `row_T`. Weights that a band has set to 0 are in no mean; what is rejected afterwards (veto) is.
        """
        weight_T = self.weight_T[self.kept_T]
        if row_T is not None and len(weight_T):
            rows = row_T[self.kept_T]
            weight_T = weight_T[torch.cat([rows.new_ones(1, dtype=torch.bool), rows[1:] != rows[:-1]])]
        mean = float(weight_T.mean()) if len(weight_T) else 1.0
        return Correction(weight_T=self.weight_T / mean, kept_T=self.kept_T, truncated_T=self.truncated_T)


def _check(log_ratio_T: Tensor) -> Tensor:
    log_ratio_T = log_ratio_T.detach().double()
    bad = int((~torch.isfinite(log_ratio_T)).sum())
    if bad:
        raise NumericsError(f"{bad} of {len(log_ratio_T)} log ratios are not finite; mask those tokens first")
    return log_ratio_T


def _bounds(lower: float, upper: float) -> tuple[float, float]:
    if not 0 <= lower <= upper:
        raise NumericsError(f"bounds on pi_train/pi_rollout must satisfy 0 <= lower <= upper, not {lower}, {upper}")
    return math.log(lower) if lower > 0 else -math.inf, math.log(upper) if upper < math.inf else math.inf


def _to_tokens(values_S: Tensor, row_T: Tensor) -> Tensor:
    """Give each token the value of its sequence; sequences are ordered by number, as policy/ratios.py orders them."""
    return values_S[torch.unique(row_T, return_inverse=True)[1]]


def _truncated(log_weight_T: Tensor, lower: float, upper: float) -> Correction:
    low, high = _bounds(lower, upper)
    bounded_T = log_weight_T.clamp(low, high)
    return Correction(
        weight_T=bounded_T.exp(),
        kept_T=torch.ones_like(log_weight_T, dtype=torch.bool),
        truncated_T=bounded_T != log_weight_T,
    )


def _masked(log_weight_T: Tensor, lower: float, upper: float) -> Correction:
    low, high = _bounds(lower, upper)
    kept_T = (log_weight_T >= low) & (log_weight_T <= high)
    return Correction(
        weight_T=torch.where(kept_T, log_weight_T, -math.inf).exp(),
        kept_T=kept_T,
        truncated_T=torch.zeros_like(kept_T),
    )


def _only_kept(kept_T: Tensor) -> Correction:
    return Correction(weight_T=kept_T.double(), kept_T=kept_T, truncated_T=torch.zeros_like(kept_T))


def no_correction(log_ratio_T: Tensor) -> Correction:
    """Weight 1 for every token, whatever its ratio."""
    return _only_kept(torch.ones_like(log_ratio_T, dtype=torch.bool))


def truncate_tokens(log_ratio_T: Tensor, *, upper: float = 2.0, lower: float = 0.0) -> Correction:
    """w = clip(ratio, lower, upper): token TIS (Yao, Liu et al. 2025, C of 2 to 8; OpenRLHF bounds it below too)."""
    return _truncated(_check(log_ratio_T), lower, upper)


def truncate_sequences(log_ratio_T: Tensor, row_T: Tensor, *, upper: float = 2.0, lower: float = 0.0) -> Correction:
    """w = clip(product of the sequence's ratios, lower, upper), for all its tokens: sequence TIS (verl)."""
    return _truncated(_to_tokens(sequence_log_ratio(_check(log_ratio_T), row_T), row_T), lower, upper)


def mask_tokens(log_ratio_T: Tensor, *, lower: float = 0.5, upper: float = 5.0) -> Correction:
    """w = ratio inside the band and 0 outside it: IcePop (Ring-1T, arXiv 2510.18855)."""
    return _masked(_check(log_ratio_T), lower, upper)


def mask_sequences(log_ratio_T: Tensor, row_T: Tensor, *, upper: float = 2.0, lower: float = 0.0) -> Correction:
    """w = product of the sequence's ratios inside the band, 0 outside it: MIS (verl; TRL's sequence_mask, 3.0)."""
    return _masked(_to_tokens(sequence_log_ratio(_check(log_ratio_T), row_T), row_T), lower, upper)


def geometric_band(log_ratio_T: Tensor, row_T: Tensor, *, lower: float = 0.999, upper: float = 1.001) -> Correction:
    """Drop sequences whose geometric mean ratio leaves the band; weight 1 for the rest (verl's geometric rejection)."""
    low, high = _bounds(lower, upper)
    mean_T = _to_tokens(geometric_log_ratio(_check(log_ratio_T), row_T), row_T)
    return _only_kept((mean_T >= low) & (mean_T <= high))


def k3_rejection(log_ratio_T: Tensor, row_T: Tensor, *, upper: float = 1e-3) -> Correction:
    """Drop sequences whose mean K3 = e^r - 1 - r exceeds `upper` nats; weight 1 for the rest (verl, 0.001 to 0.01)."""
    r = _check(log_ratio_T)
    return _only_kept(_to_tokens(geometric_log_ratio(r.expm1() - r, row_T), row_T) <= upper)


def veto(log_ratio_T: Tensor, row_T: Tensor, *, lower: float = 1e-4) -> Correction:
    """Drop sequences in which any token's ratio is below `lower`; weight 1 for the rest (slime and miles, 1e-4)."""
    below_T = _check(log_ratio_T) < _bounds(lower, math.inf)[0]
    return _only_kept(_to_tokens(sequence_log_ratio(below_T.double(), row_T), row_T) == 0)


def vcpo_scale(log_ratio_T: Tensor, row_T: Tensor, *, on_policy_ess: float = 1.0) -> float:
    """Factor in (0, 1] on the learning rate: sqrt(ESS / ESS on policy) (VCPO, arXiv 2602.17616, for AdamW).

    VCPO's other half, its minimum-variance baseline, needs each sequence's gradient norm: not offered. The ESS is of
    untruncated sequence weights, as a share of the sequences. `on_policy_ess` is what it is at lag 0 (1.0; the authors
    report 0.55 for multi-turn tools). Capped at 1: the learning rate was chosen for on-policy data.
    Raises NumericsError for an ESS outside (0, 1] or a ratio that is not finite.
    """
    if not 0 < on_policy_ess <= 1:
        raise NumericsError(f"on_policy_ess must lie in (0, 1], not {on_policy_ess}")
    return min(1.0, math.sqrt(ess(sequence_log_ratio(_check(log_ratio_T), row_T)) / on_policy_ess))
