"""Policy-gradient objectives: one surrogate loss a token, and how tokens become one number.

Shapes: T completion tokens of a batch (packed), S sequences. `row_T` (long, ascending) numbers the sequence of each
token. Logprobs are in nats, of the distribution that tokens were drawn from; `logprobs_T` carries the gradient. The
result is a loss, to be minimised. `old_T` is the denominator of the ratio, without gradient: mu (bypass) or pi_prox
(decoupled); policy/proximal.py makes it.

A `clipped_T` token is one whose gradient the objective has cut: to zero (PPO's family), or in size (REINFORCE, CISPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from trueup.errors import NumericsError


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """`loss_T` differentiable; `log_ratio_T` what was clipped, log(pi / old) of the objective's level, detached.

    `beyond_T`: the ratio lies outside the objective's bounds, whether or not that cuts the gradient.
    """

    loss_T: Tensor
    clipped_T: Tensor
    beyond_T: Tensor
    log_ratio_T: Tensor


def sequence_mean(values_T: Tensor, row_T: Tensor) -> Tensor:
    """Mean over each sequence, given to each of its tokens, [T], differentiable."""
    count = torch.bincount(row_T).clamp_min(1)
    total = values_T.new_zeros(len(count)).index_add(0, row_T, values_T)
    return (total / count)[row_T]


def _same_length(logprobs_T: Tensor, *others_T: Tensor) -> None:
    for other in others_T:
        if other.shape != logprobs_T.shape:
            raise NumericsError(f"{tuple(other.shape)} values for {tuple(logprobs_T.shape)} logprobs")


def reinforce(logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, *, max_ratio: float = 5.0) -> Surrogate:
    """-sg(min(pi / old, c)) A log pi with c = 5 (PipelineRL, arXiv 2509.19128, section 2; old is mu there)."""
    return cispo(logprobs_T, old_T, advantage_T, max_ratio=max_ratio)


def cispo(
    logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, *, max_ratio: float = 5.0, min_ratio: float = 0.0
) -> Surrogate:
    """-sg(clip(pi / old, min, max)) A log pi (CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    The bounds are on the ratio itself: `max_ratio` is 1 + epsilon_high, which the report does not give; ScaleRL
    (arXiv 2510.13786) saw no difference between 4, 5 and 8. Infinite bounds make it REINFORCE with full weights.
    """
    _same_length(logprobs_T, old_T, advantage_T)
    log_ratio_T = logprobs_T.detach() - old_T
    ratio_T = log_ratio_T.exp()
    weight_T = ratio_T.clamp(min_ratio, max_ratio)
    cut_T = weight_T != ratio_T
    return Surrogate(
        loss_T=-weight_T * advantage_T * logprobs_T, clipped_T=cut_T, beyond_T=cut_T, log_ratio_T=log_ratio_T
    )


def _clipped(log_ratio_T: Tensor, advantage_T: Tensor, low: float, high: float, dual: float | None = None) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and at least -dual A where A < 0."""
    ratio_T = log_ratio_T.exp()
    within_T = ratio_T.clamp(1 - low, 1 + high)
    plain_T, bounded_T = ratio_T * advantage_T, within_T * advantage_T
    gain_T = torch.minimum(plain_T, bounded_T)
    clipped_T = bounded_T < plain_T
    if dual is not None:
        floor_T = dual * advantage_T
        bound_T = (advantage_T < 0) & (gain_T < floor_T)
        gain_T, clipped_T = torch.where(bound_T, floor_T, gain_T), clipped_T | bound_T
    return Surrogate(
        loss_T=-gain_T, clipped_T=clipped_T.detach(), beyond_T=(within_T != ratio_T).detach(),
        log_ratio_T=log_ratio_T.detach(),
    )  # fmt: skip


def ppo(
    logprobs_T: Tensor,
    old_T: Tensor,
    advantage_T: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Surrogate:
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = pi / old (PPO, arXiv 1707.06347, equation 7).

    `dual`: where A < 0 the loss of a token is at most -dual A, dual > 1 (dual clip, arXiv 1912.09729, equation 5).
    """
    _same_length(logprobs_T, old_T, advantage_T)
    return _clipped(logprobs_T - old_T, advantage_T, low, high, dual)


def grpo(logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, *, low: float = 0.2, high: float = 0.2) -> Surrogate:
    """PPO's surrogate with one advantage a sequence (GRPO, arXiv 2402.03300, equation 3); aggregate by sequence.

    The paper adds a K3 term to a reference policy (`kl_term`) with coefficient 0.04.
    """
    return ppo(logprobs_T, old_T, advantage_T, low=low, high=high)


def dr_grpo(
    logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, *, low: float = 0.2, high: float = 0.2
) -> Surrogate:
    """GRPO's surrogate without its length and difficulty biases (Dr. GRPO, arXiv 2503.20783, section 3.2).

    What differs is around it: advantages that are not divided, and aggregation by a fixed length.
    """
    return ppo(logprobs_T, old_T, advantage_T, low=low, high=high)


def dapo(logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, *, low: float = 0.2, high: float = 0.28) -> Surrogate:
    """PPO's surrogate clipped higher above than below (DAPO, arXiv 2503.14476, equation 8); aggregate by token."""
    return ppo(logprobs_T, old_T, advantage_T, low=low, high=high)


def gspo(
    logprobs_T: Tensor, old_T: Tensor, advantage_T: Tensor, row_T: Tensor, *, low: float = 3e-4, high: float = 4e-4
) -> Surrogate:
    """PPO's surrogate on s = exp(mean_t log(pi / old)), one ratio a sequence (GSPO, arXiv 2507.18071, equation 5).

    Aggregate by sequence. ScaleRL found bands of 4e-3 and 5e-3 to work better than the paper's.
    """
    _same_length(logprobs_T, old_T, advantage_T, row_T)
    return _clipped(sequence_mean(logprobs_T - old_T, row_T), advantage_T, low, high)


def kl_term(
    logprobs_T: Tensor, reference_T: Tensor, *, estimator: str = "k3", weight_T: Tensor | None = None
) -> Tensor:
    """Estimate of KL(pi || reference) a token, [T], differentiable (Schulman 2020; GRPO, equation 4, uses k3).

    k1: log(pi/ref). k2: half its square. k3: ref/pi - log(ref/pi) - 1. As values, k1 and k3 estimate the divergence;
    as a loss without `weight_T`, k2 has its gradient, k3 that of the reverse divergence, and k1 none in expectation.
    `weight_T` = pi/old, carrying its gradient, makes k1 and k3 right, on stale tokens too (DeepSeek-V3.2; TRL's
    use_bias_correction_kl); with it k2 is of no divergence. `reference_T` comes from a
    forward pass of the reference policy over the same tokens. Raises NumericsError for another estimator.
    """
    _same_length(logprobs_T, reference_T)
    log_ratio_T = reference_T - logprobs_T
    if estimator == "k1":
        value_T = -log_ratio_T
    elif estimator == "k2":
        value_T = log_ratio_T.square() / 2
    elif estimator == "k3":
        value_T = log_ratio_T.exp() - log_ratio_T - 1
    else:
        raise NumericsError(f"KL estimator must be k1, k2 or k3, not {estimator!r}")
    return value_T if weight_T is None else value_T * weight_T


class Aggregation(StrEnum):
    """How losses of tokens become one number."""

    TOKEN = "token"
    """Mean over all tokens of the batch (DAPO, CISPO)."""
    SEQUENCE = "sequence"
    """Mean over sequences of the mean over their tokens (GRPO, GSPO)."""
    PROMPT = "prompt"
    """Mean over prompts of the mean over all tokens of their completions (ScaleRL)."""
    FIXED = "fixed"
    """Sum over tokens / (sequences x a fixed length) (Dr. GRPO)."""


def token_weights(
    how: Aggregation, mask_T: Tensor, row_T: Tensor, group_S: Tensor, *, fixed_length: int | None = None
) -> Tensor:
    """Weight of each token, [T] float64, such that the aggregated loss of the whole batch is sum(weight_T loss_T).

    With these, gradients of micro-batches add up to the batch's, however it is split. `mask_T` (bool) selects the
    tokens that count, `group_S` names the prompt of each sequence; sequences and prompts without a counting token are
    not in the denominators. `fixed_length` (tokens) is for FIXED. Raises NumericsError when no token counts.
    """
    mask_T = mask_T.bool()
    if not bool(mask_T.any()):
        raise NumericsError("no token counts: every one is masked")
    ones_T = mask_T.double()
    if how == Aggregation.TOKEN:
        return ones_T / ones_T.sum()
    per_row_S = torch.zeros(len(group_S), dtype=torch.float64).index_add_(0, row_T, ones_T)
    rows = (per_row_S > 0).sum()
    if how == Aggregation.SEQUENCE:
        return ones_T / per_row_S.clamp_min(1)[row_T] / rows
    if how == Aggregation.FIXED:
        if not fixed_length or fixed_length < 1:
            raise NumericsError("aggregation by a fixed length needs that length in tokens")
        return ones_T / (rows * fixed_length)
    _, prompt_S = torch.unique(group_S, return_inverse=True)
    per_prompt = torch.zeros(int(prompt_S.max()) + 1, dtype=torch.float64).index_add_(0, prompt_S, per_row_S)
    return ones_T / per_prompt.clamp_min(1)[prompt_S][row_T] / (per_prompt > 0).sum()


def aggregate(
    loss_T: Tensor,
    how: Aggregation,
    *,
    mask_T: Tensor,
    row_T: Tensor,
    group_S: Tensor,
    fixed_length: int | None = None,
) -> Tensor:
    """One number from the losses of a whole batch; see `token_weights`."""
    weight_T = token_weights(how, mask_T, row_T, group_S, fixed_length=fixed_length)
    return torch.where(mask_T.bool(), loss_T, 0.0) @ weight_T.to(loss_T.dtype)
